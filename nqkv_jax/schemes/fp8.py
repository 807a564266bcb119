"""8-bit floats with one dynamic scale per token and head.

Source: Micikevicius et al. (2022), FP8 formats for deep learning. Engines that default to a scale
of 1.0 lose small activations to underflow; the scale here always comes from the data.
"""

from typing import Literal

from nqkv_jax.float8 import FORMATS, Float8
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.schemes.base import DTYPES, LayerScheme, ScaleDtype, block_window
from nqkv_jax.schemes.registry import register


@register("fp8")
def fp8(
    *,
    format: Literal[*FORMATS] = "e4m3",
    sinks: int = 0,
    residual: int = 0,
    scale_dtype: ScaleDtype = "float16",
):
    """8-bit floats (e4m3 or e5m2), one scale per token and head."""
    codebook, dtype = Float8(format), DTYPES[scale_dtype]
    window = block_window("fp8", residual)

    def layer(shape):
        quantizer = BlockQuantizer(codebook, block_size=shape.head_dim, scale_dtype=dtype)
        return LayerScheme(
            key=quantizer, value=quantizer, sinks=sinks, key_window=window, value_window=window
        )

    return layer
