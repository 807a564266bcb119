"""8-bit floating point with a dynamic scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import (
    check_group,
    check_hidden_blocks,
    divide,
    divide_or_zero,
    scale_dtype,
    store,
)

# Micikevicius et al. (2022), arXiv:2209.05433, table 1. e4m3 has no infinity (JAX's float8_e4m3fn).
FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Payload:
    """One token: x ≈ values * scale, scale per block.

    The values are bytes: XLA:CPU cannot update an array of float8 in place, it converts all of it.
    """

    values: jax.Array  # the bits of float8, u8[1, heads, head_dim]
    scale: jax.Array  # scale_dtype [1, heads * head_dim / block_size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Quantizer(Quantizer):
    """Casts x / s~ to float8, with s = max|x| / (largest finite float8) per block of one token.

    The scale follows the data: with a fixed scale of 1, as engines without calibration use, small
    activations underflow (sigma = 1e-3 loses a third of the energy). A block that holds NaN or an
    infinity decodes to NaN throughout; a block of zeros to zeros.

    Attributes:
      format: "e4m3" (largest 448) or "e5m2" (57344, half the precision).
      block_size: elements per scale along heads * head_dim; None for one scale per token and head.
      scale_dtype: float16, bfloat16 or float32.
    """

    format: str = dataclasses.field(default="e4m3", metadata={"static": True})
    _: dataclasses.KW_ONLY
    block_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    scale_dtype: np.dtype = dataclasses.field(default=jnp.float16, metadata={"static": True})

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", scale_dtype(self.scale_dtype))
        if self.format not in FORMATS:
            raise ValueError(
                f"Float8Quantizer: format must be one of {tuple(FORMATS)}; got {self.format!r}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"Float8Quantizer: block_size must be positive; got {self.block_size}")

    def check(self, heads: int, head_dim: int) -> None:
        check_hidden_blocks("Float8Quantizer", heads, head_dim, self.block_size or head_dim)

    def quantize(self, x: jax.Array, context: Context) -> Float8Payload:
        """Encodes `x` [1, heads, head_dim], any float dtype."""
        check_group("Float8Quantizer", x, self.group)
        self.check(*x.shape[1:])
        dtype = FORMATS[self.format]
        top = np.float32(jnp.finfo(dtype).max)
        blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, self.block_size or x.shape[-1])
        finite = jnp.all(jnp.isfinite(blocks), axis=-1, keepdims=True)
        absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        scale = store(divide(absmax, top), finite, self.scale_dtype)
        # The stored scale may have been rounded down, and a cast of what lies beyond the largest
        # float8 gives NaN (e4m3) or infinity (e5m2).
        values = jnp.clip(divide_or_zero(blocks, scale.astype(jnp.float32)), -top, top)
        values = jax.lax.bitcast_convert_type(values.astype(dtype), jnp.uint8)
        return Float8Payload(values=values.reshape(x.shape), scale=scale[..., 0])

    def dequantize(self, payload: Float8Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [1, heads, head_dim]."""
        shape = payload.values.shape
        blocks = _widen(payload.values, self.format).reshape(*payload.scale.shape, -1)
        values = blocks * payload.scale.astype(jnp.float32)[..., None]
        return values.reshape(shape).astype(dtype)


def _widen(values: jax.Array, format: str) -> jax.Array:
    """Finite float8 values, given as bytes, as float32.

    NaN may become a number: its block has a NaN scale.

    Both formats are float16 with fewer bits, up to the exponent's bias of e4m3 (7 instead of 15).
    On XLA:CPU a cast takes about twice as long as moving the bits.
    """
    bits = values.astype(jnp.uint16)
    if format == "e5m2":
        return jax.lax.bitcast_convert_type(bits << np.uint16(8), jnp.float16).astype(jnp.float32)
    sign = (bits & np.uint16(0x80)) << np.uint16(8)
    magnitude = (bits & np.uint16(0x7F)) << np.uint16(7)
    half = jax.lax.bitcast_convert_type(sign | magnitude, jnp.float16)
    return half.astype(jnp.float32) * np.float32(256)
