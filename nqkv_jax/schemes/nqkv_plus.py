"""nqkv-plus: what this library found to work best at 4, 3 and 2 bits, without calibration.

Keys are stored before RoPE, which would turn the means of their channels with the position, and
each channel is coded over groups of 64 tokens, after its mean. Channels are ranked by how much an
error in them costs (variance of the keys times energy of the queries, both from the first tokens of
the sequence), and the ranks have widths from bits + 2 down to bits - 2 (`quantizers/ranked.py`).

Values are coded per token and head after a Hadamard rotation, which brings them near the normal
distribution that the Lloyd-Max levels are for, scaled by their root mean square.

The first 4 tokens stay in full precision, and so do the latest 64 to 127. Keys cost bits + 0.25,
values bits + 16 / head_dim.

With `fused` it is what a fused kernel can read as fast as it reads integers: all channels have one
width, keys are coded after RoPE, with a scale for each channel and 128 tokens, which multiplies the
query, and the levels of both sides are cubics in the code. The latest 0 to 127 tokens stay in full
precision. Keys cost bits + 0.125.

Every piece can be switched off, to see what it buys.
"""

from nqkv_jax import codebooks, tiles
from nqkv_jax.cache import Window
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.ranked import RankedQuantizer, widths_by_rank
from nqkv_jax.quantizers.transforms import Centre, Hadamard, Transformed, largest_power_of_two
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import LayerScheme, one_of, register


@register("nqkv-plus")
def nqkv_plus(
    *,
    bits: int = 4,
    group_size: int = 64,
    recent: int | None = None,
    sinks: int = 4,
    ranking: str = "queries",
    keys: str = "unrotated",
    hadamard: bool = True,
    fused: bool = False,
):
    """Keys before RoPE with bits where queries look, rotated values, sinks and a recent window."""
    one_of("nqkv-plus: bits", bits, (2, 3, 4))
    one_of("nqkv-plus: ranking", ranking, ("queries", "variance", "none"))
    one_of("nqkv-plus: keys", keys, ("rotated", "unrotated"))
    if fused and (ranking, keys, group_size) != ("queries", "unrotated", 64):
        raise ValueError(
            "nqkv-plus: fused=True has keys after RoPE, no ranking and groups of 128, and takes no "
            f"ranking, keys or group_size; got {ranking}, {keys} and {group_size}"
        )
    if recent is None:
        recent = 0 if fused else 64
    if recent < 0:
        raise ValueError(f"nqkv-plus: expected recent >= 0 tokens; got {recent}")
    window = Window(keep=recent, chunk=tiles.TOKENS if fused else group_size)

    def sides(head_dim):
        if fused:
            return _fused_sides(bits, head_dim)
        pairs = head_dim // 2
        widths = widths_by_rank(bits, head_dim) if ranking != "none" else (bits,) * pairs
        key = RankedQuantizer(
            widths, group_size, ranking="variance" if ranking == "none" else ranking
        )
        value = BlockQuantizer(codebooks.lloyd_max_normal(bits), block_size=head_dim, scale="rms")
        return key if keys == "rotated" else Unrotated(key), value

    def layer(shape):
        if shape.head_dim % 2:
            raise ValueError(
                f"nqkv-plus: expected an even head_dim, for channel pairs; got {shape.head_dim}"
            )
        key, value = sides(shape.head_dim)
        rotation = Hadamard(size=largest_power_of_two(shape.head_dim))
        return LayerScheme(
            key=key,
            value=Transformed(value, (rotation,)) if hadamard else value,
            sinks=sinks,
            key_window=window,
            value_window=window,
            rotated=fused or keys == "rotated",
        )

    return layer


def _fused_sides(bits: int, head_dim: int) -> tuple[Transformed, BlockQuantizer]:
    channels = BlockQuantizer(
        codebooks.cubic_normal(bits, tiles.TOKENS, signed=True),
        block_size=tiles.TOKENS,
        axis="tokens",
        scale="signed_absmax",
    )
    if bits == 2:  # the four levels of least error lie on a cubic
        codebook, scale = codebooks.lloyd_max_normal(bits), "rms"
    else:
        codebook, scale = codebooks.cubic_normal(bits, head_dim), "absmax"
    return Transformed(channels, (Centre(),)), BlockQuantizer(
        codebook, block_size=head_dim, scale=scale
    )
