"""Keys stored before RoPE, rotated when they are read."""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import (
    Context,
    Payload,
    Quantizer,
    State,
    Wrapper,
    decoded_once,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrotated(Wrapper):
    """Encodes unrotated keys with `inner`; what it decodes is rotated to the tokens' positions.

    A map that `inner` could fold into the query does not commute with RoPE, so nothing is folded.
    """

    inner: Quantizer

    rotates = True

    def check(self, heads: int, head_dim: int) -> None:
        if self.inner.rotates:
            raise ValueError(
                "Unrotated: expected a quantizer that does not rotate keys itself, or they would "
                f"be rotated twice; got {self.inner}"
            )
        super().check(heads, head_dim)

    def init_state(self, heads: int, head_dim: int) -> State:
        return self.inner.init_state(heads, head_dim)

    def observe(self, x: jax.Array, context: Context) -> State:
        return self.inner.observe(x, context)

    def observe_query(self, q: jax.Array, context: Context) -> State:
        return self.inner.observe_query(q, context)

    def quantize(self, x: jax.Array, context: Context) -> Payload:
        return self.inner.quantize(x, context)

    def dequantize(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        if context.rotary is None:
            return self.inner.dequantize(payload, context, dtype)
        x = self.inner.dequantize(payload, context, jnp.float32)
        x = decoded_once(x)  # a channel is read for itself, and for the other of its pair
        return context.rotary(x, context.positions).astype(dtype)
