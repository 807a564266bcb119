"""Per-token asymmetric integers: min–max groups along the hidden axis, keys after RoPE.

The baseline of every 4-bit cache paper, and what inference engines call `int8_per_token_head` when
the group is a head. x ≈ code * scale + zero with scale = (max - min) / (2^bits - 1) and zero = min.
"""

from nqkv_jax import codebooks
from nqkv_jax.cache import Window
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.schemes.base import SCALE_DTYPES, LayerScheme, largest_divisor, one_of, register


def _integer(bits: int, group_size: int | None, sinks: int, residual: int, scale_dtype: str):
    dtype = one_of("scale_dtype", scale_dtype, SCALE_DTYPES)

    def layer(shape):
        size = group_size or largest_divisor(shape.hidden, 64)
        quantizer = BlockQuantizer(
            codebooks.uniform(bits), block_size=size, scale="minmax", scale_dtype=dtype
        )
        window = Window(chunk=residual or 1)
        return LayerScheme(
            key=quantizer, value=quantizer, sinks=sinks, key_window=window, value_window=window
        )

    return layer


def _register(bits: int):
    @register(f"int{bits}")
    def scheme(
        *,
        group_size: int | None = None,
        sinks: int = 0,
        residual: int = 0,
        scale_dtype: str = "float16",
    ):
        return _integer(bits, group_size, sinks, residual, scale_dtype)

    scheme.__doc__ = (
        f"{bits}-bit asymmetric integers per token, groups of 64 along the hidden axis."
    )


for _bits in (8, 4, 2):
    _register(_bits)
