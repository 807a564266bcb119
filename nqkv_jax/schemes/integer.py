"""Per-token asymmetric integers: min–max groups along the hidden axis, keys after RoPE.

The baseline of every 4-bit cache paper, and what inference engines call `int8_per_token_head` when
the group is a head. x ≈ code * scale + zero with scale = (max - min) / (2^bits - 1) and zero = min.
"""

from nqkv_jax import codebooks
from nqkv_jax.quantizers.block import BlockQuantizer, check_hidden_blocks
from nqkv_jax.schemes.base import DTYPES, LayerScheme, ScaleDtype, block_window, largest_divisor
from nqkv_jax.schemes.registry import register


def _integer(bits: int, group_size: int | None, sinks: int, residual: int, scale_dtype: str):
    name = f"int{bits}"
    window = block_window(name, residual)

    def layer(shape):
        size = largest_divisor(shape.hidden, 64) if group_size is None else group_size
        check_hidden_blocks(name, shape.num_kv_heads, shape.head_dim, size, "group_size")
        quantizer = BlockQuantizer(
            codebooks.uniform(bits),
            block_size=size,
            scale="minmax",
            scale_dtype=DTYPES[scale_dtype],
        )
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
        scale_dtype: ScaleDtype = "float16",
    ):
        return _integer(bits, group_size, sinks, residual, scale_dtype)

    scheme.__doc__ = (
        f"{bits}-bit asymmetric integers per token, groups of 64 along the hidden axis."
    )


for _bits in (8, 4, 2):
    _register(_bits)
