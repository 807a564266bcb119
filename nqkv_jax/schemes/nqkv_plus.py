"""nqkv-plus: what this library found to work best at 4, 3 and 2 bits, without calibration.

Only <q, k> matters, so channels of keys are ranked by how much an error in them costs (variance of
the keys times energy of the queries, both from the first tokens of the sequence), and the ranks
have widths of their own.

Values are coded per token and head after a Hadamard rotation, which brings them near the normal
distribution that their levels are for. The first 4 tokens stay in full precision.

What fused kernels can read is the default: keys after RoPE, less the means that their channels have
before it (with `keys=rotated`: after it), in tiles of 128 tokens of evenly spaced codes. Some
channels have two digits, as many have none, the others one, as is best for each head
(`quantizers/digits.py`); scales of channels and means meet the query. The latest 0 to 127 tokens
stay in full precision. Keys cost bits + 0.125, values bits + 16 / head_dim.

With `fused=False` it is the best that we found without regard to kernels: keys before RoPE over
groups of 64 tokens, in five widths from bits + 2 down to bits - 2 (`quantizers/ranked.py`);
Lloyd-Max levels for values; the latest 64 to 127 tokens in full precision. Keys cost bits + 0.25.

Every piece can be switched off, to see what it buys.
"""

from typing import Literal

from nqkv_jax import codebooks, tiles
from nqkv_jax.hadamard import largest_hadamard
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.digits import DigitQuantizer
from nqkv_jax.quantizers.ranked import RankedQuantizer, widths_by_rank
from nqkv_jax.quantizers.transforms import Hadamard, Transformed
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import Keys, LayerScheme
from nqkv_jax.schemes.registry import register
from nqkv_jax.side import Window


@register("nqkv-plus")
def nqkv_plus(
    *,
    bits: Literal[2, 3, 4] = 4,
    fused: bool = True,
    group_size: int | None = None,
    recent: int | None = None,
    sinks: int = 4,
    ranking: Literal["queries", "variance", "none"] = "queries",
    keys: Keys = "unrotated",
    hadamard: bool = True,
):
    """Keys with bits where queries look, rotated values, sinks and a recent window."""
    if fused and group_size is not None:
        raise ValueError(
            "nqkv-plus: expected group_size=None with fused=True, as keys that a fused kernel "
            f"reads are coded 128 at a time; got group_size={group_size}. Take fused=False"
        )
    if group_size is None:
        group_size = tiles.TOKENS if fused else 64
    if recent is None:
        recent = 0 if fused else 64
    if recent < 0 or group_size < 1:
        raise ValueError(
            "nqkv-plus: expected recent >= 0 and group_size >= 1 tokens; got "
            f"recent={recent}, group_size={group_size}"
        )
    window = Window(keep=recent, chunk=group_size)

    def key_quantizer(head_dim):
        if fused:
            return DigitQuantizer(bits, ranking=ranking, turning=keys == "unrotated")
        ranked, by = ranking != "none", "variance" if ranking == "none" else ranking
        pairs = head_dim // 2
        widths = widths_by_rank(bits, head_dim) if ranked else (bits,) * pairs
        key = RankedQuantizer(widths, group_size, ranking=by)
        return key if keys == "rotated" else Unrotated(key)

    def layer(shape):
        if shape.head_dim % 2:
            raise ValueError(
                f"nqkv-plus: expected an even head_dim, for channel pairs; got {shape.head_dim}"
            )
        if fused:
            try:
                tiles.check(shape.head_dim, bits)
            except ValueError as error:
                raise ValueError(
                    f"nqkv-plus: {error}. Take fused=False, which has no tiles"
                ) from None
        levels = _computed_levels(bits, shape.head_dim) if fused else _lloyd_max(bits)
        value = BlockQuantizer(**levels, block_size=shape.head_dim)
        rotation = Hadamard(size=largest_hadamard(shape.head_dim))
        return LayerScheme(
            key=key_quantizer(shape.head_dim),
            value=Transformed(value, (rotation,)) if hadamard else value,
            sinks=sinks,
            key_window=window,
            value_window=window,
        )

    return layer


def _lloyd_max(bits: int) -> dict:
    return dict(codebook=codebooks.lloyd_max_normal(bits), scale="rms")


def _computed_levels(bits: int, head_dim: int) -> dict:
    """Evenly spaced at 2 bits, where that costs 1 % of the error; a cubic above."""
    if bits == 2:
        return dict(codebook=codebooks.uniform_normal(bits), scale="rms")
    return dict(codebook=codebooks.cubic_normal(bits, head_dim), scale="absmax")
