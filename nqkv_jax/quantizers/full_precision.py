"""No quantization, behind the same contract: the reference for all that is quantized."""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import Context, Quantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullPrecision(Quantizer):
    """Stores what it is given, in the dtype given; the payload is the array itself."""

    def quantize(self, x: jax.Array, context: Context) -> jax.Array:
        return x

    def dequantize(self, payload: jax.Array, context: Context, dtype=jnp.float32) -> jax.Array:
        return payload.astype(dtype)
