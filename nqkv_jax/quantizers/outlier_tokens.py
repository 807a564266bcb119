"""Tokens of unusually small keys are kept as they are, and out of the groups of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.quantizers.base import Context, Payload, Quantizer, Wrapper
from nqkv_jax.quantizers.block import divide_or_zero, pairwise_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierState:
    """The tokens that are kept exactly, per head; slots are filled in order.

    The pool is the `outliers` tokens of the smallest scores among them, the rest is what was once
    in it (the overflow buffer).
    """

    rows: jax.Array  # f32[outliers + buffer, heads, head_dim], exact for any dtype of the cache
    positions: jax.Array  # i32[outliers + buffer, heads], -1 where empty
    scores: jax.Array  # f32[outliers + buffer, heads], sum |key|, inf where empty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierTokens(Wrapper):
    """Encodes with `inner` all tokens but outliers: those of the smallest sum |key| of a head.

    A pool of `outliers` tokens per head is updated with every chunk that is encoded: what enters it
    is kept exactly from then on, also after smaller ones have pushed it out, until there is no room
    for more tokens; later chunks then are encoded as they are. The mean of the group's other tokens
    takes the place of an outlier in its group. That slot is not masked: it decodes to the exact
    token, which so occurs once in the softmax, at its own position.

    Ties go to the earlier token. A token whose key is not finite is no outlier.

    Attributes:
      inner: encodes what is left.
      outliers: size of the pool.
      buffer: how many tokens may leave the pool.
      of_values: whether the tokens are values: the keys of the same tokens then decide, so that
        both sides keep the same ones.

    Source: Su et al. (2025), arXiv 2505.10938.
    """

    inner: Quantizer
    outliers: int = dataclasses.field(metadata={"static": True})
    buffer: int = dataclasses.field(metadata={"static": True})
    of_values: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if self.outliers < 1 or self.buffer < 0:
            raise ValueError(
                "OutlierTokens: expected outliers >= 1 and buffer >= 0; got "
                f"outliers={self.outliers}, buffer={self.buffer}"
            )

    @property
    def wants_keys(self) -> bool:
        return self.of_values

    def init_state(self, heads: int, head_dim: int) -> OutlierState:
        size = self.outliers + self.buffer
        return OutlierState(
            rows=jnp.zeros((size, heads, head_dim), jnp.float32),
            positions=jnp.full((size, heads), -1, jnp.int32),
            scores=jnp.full((size, heads), np.inf, jnp.float32),
        )

    def observe(self, x: jax.Array, context: Context) -> OutlierState:
        if self.of_values and context.keys is None:
            raise ValueError(
                "OutlierTokens: outliers among values are those of their keys; context.keys must "
                "be the keys of the same tokens, as a cache brings them; got None"
            )
        state, keys = context.state, context.keys if self.of_values else x
        size, heads = state.positions.shape
        scores = pairwise_sum(jnp.abs(keys.astype(jnp.float32)), -1)[..., 0]  # [tokens, heads]
        scores = jnp.where(jnp.isfinite(scores), scores, np.float32(np.inf))
        # Of equal scores the first is taken: tokens that are kept already, then earlier ones.
        candidates = jnp.concatenate([state.scores, scores]).T
        score, index = jax.lax.top_k(-candidates, self.outliers)  # [heads, outliers]
        token, score = jnp.maximum(index - size, 0), -score
        enters = (index >= size) & jnp.isfinite(score)
        used = jnp.sum(state.positions >= 0, axis=0, dtype=jnp.int32)
        slot = used[:, None] + jnp.cumsum(enters, axis=1, dtype=jnp.int32) - 1
        slot = jnp.where(enters, slot, size)
        head = jnp.arange(heads)[:, None]
        # Slots from `size` on are dropped: there is no room.
        keep = lambda kept, new: kept.at[slot, head].set(new, mode="drop")
        return OutlierState(
            rows=keep(state.rows, x.astype(jnp.float32)[token, head]),
            positions=keep(state.positions, context.positions[token]),
            scores=keep(state.scores, score),
        )

    def quantize(self, x: jax.Array, context: Context) -> Payload:
        """Encodes `x` [group, heads, head_dim]; the state must have observed it."""
        x = x.astype(jnp.float32)
        kept = jnp.any(self._matches(context), axis=1)[..., None]  # [group, heads, 1]
        others = jnp.sum(~kept, axis=0, keepdims=True, dtype=jnp.float32)
        total = pairwise_sum(jnp.where(kept, np.float32(0), x), 0)
        return self.inner.quantize(jnp.where(kept, divide_or_zero(total, others), x), context)

    def dequantize(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        x, matches = self.inner.dequantize(payload, context, dtype), self._matches(context)
        slot = jnp.argmax(matches, axis=1)  # [group, heads]
        exact = context.state.rows[slot, jnp.arange(x.shape[1])[None]].astype(dtype)
        return jnp.where(jnp.any(matches, axis=1)[..., None], exact, x)

    def _matches(self, context: Context) -> jax.Array:
        """bool[group, slots, heads]: which slot holds which token."""
        return context.positions[:, None, None] == context.state.positions[None]
