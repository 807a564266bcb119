"""nqkv-plus: what this library found to work best at 4, 3 and 2 bits, without calibration.

Keys are stored before RoPE, which would turn the means of their channels with the position, and
each channel is coded over groups of 64 tokens, after its mean. Channels are ranked by how much an
error in them costs (variance of the keys times energy of the queries, both from the first tokens of
the sequence), and the ranks have widths from bits + 2 down to bits - 2 (`quantizers/ranked.py`).

Values are coded per token and head after a Hadamard rotation, which brings them near the normal
distribution that the Lloyd-Max levels are for, scaled by their root mean square.

The first 4 tokens stay in full precision, and so do the latest 64 to 127. Keys cost bits + 0.25,
values bits + 16 / head_dim.

Every piece can be switched off, to see what it buys.
"""

from nqkv_jax import codebooks
from nqkv_jax.cache import Window
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.ranked import RankedQuantizer, widths_by_rank
from nqkv_jax.quantizers.transforms import Hadamard, Transformed, largest_power_of_two
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import LayerScheme, one_of, register


@register("nqkv-plus")
def nqkv_plus(
    *,
    bits: int = 4,
    group_size: int = 64,
    recent: int = 64,
    sinks: int = 4,
    ranking: str = "queries",
    keys: str = "unrotated",
    hadamard: bool = True,
):
    """Keys before RoPE with bits where queries look, rotated values, sinks and a recent window."""
    one_of("nqkv-plus: bits", bits, (2, 3, 4))
    one_of("nqkv-plus: ranking", ranking, ("queries", "variance", "none"))
    one_of("nqkv-plus: keys", keys, ("rotated", "unrotated"))
    if recent < 0:
        raise ValueError(f"nqkv-plus: expected recent >= 0 tokens; got {recent}")
    window = Window(keep=recent, chunk=group_size)

    def layer(shape):
        if shape.head_dim % 2:
            raise ValueError(
                f"nqkv-plus: expected an even head_dim, for channel pairs; got {shape.head_dim}"
            )
        pairs = shape.head_dim // 2
        widths = widths_by_rank(bits, shape.head_dim) if ranking != "none" else (bits,) * pairs
        key = RankedQuantizer(
            widths, group_size, ranking="variance" if ranking == "none" else ranking
        )
        value = BlockQuantizer(
            codebooks.lloyd_max_normal(bits), block_size=shape.head_dim, scale="rms"
        )
        rotation = Hadamard(size=largest_power_of_two(shape.head_dim))
        return LayerScheme(
            key=key if keys == "rotated" else Unrotated(key),
            value=Transformed(value, (rotation,)) if hadamard else value,
            sinks=sinks,
            key_window=window,
            value_window=window,
            rotated=keys == "rotated",
        )

    return layer
