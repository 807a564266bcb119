"""No quantization, behind the same contract: the reference for all that is quantized."""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import Context, Quantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullPrecision(Quantizer):
    """Stores what it is given, in the dtype given; the payload is the array itself.

    Of bfloat16, it is int16 with the same bits: to write one token or read some, XLA:CPU (before
    jaxlib 0.11) would bring all of a bfloat16 array into float32 and back.
    """

    def quantize(self, x: jax.Array, context: Context) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.bfloat16 else x

    def dequantize(self, payload: jax.Array, context: Context, dtype=jnp.float32) -> jax.Array:
        if payload.dtype == jnp.int16:
            payload = jax.lax.bitcast_convert_type(payload, jnp.bfloat16)
        return payload.astype(dtype)
