"""Per-channel codes of keys whose errors avoid the directions that queries have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from nqkv_jax.pallas_kernels.decode_attention import TiledCodes, VectorCodes
from nqkv_jax.quantizers.base import Context, Payload, Quantizer, Wrapper
from nqkv_jax.quantizers.block import divide, pairwise_sum, rounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryAware(Wrapper):
    """Encodes with `inner`, channels in blocks: what a block gets wrong, later ones make up for.

    The error d = x~ - x of a token's key is weighed as d^T A d with A = I + strength * Q^T Q, Q
    being the queries that the head has met. Blocks of `block` channels are encoded from left to
    right, each after all channels not yet encoded have moved to where they minimise d^T A d given
    the errors made so far: x_F <- x_F - A_FF^-1 A_FB d_B. What is stored, and how it is decoded,
    does not change.

    The state is the sum of q q^T, f32[heads, head_dim, head_dim], over all query heads that share
    the key and all tokens so far: those up to the token that makes a chunk due decide how it is
    encoded. Queries that are not finite count for nothing. A key with NaN or an infinity leaves
    NaN in that channel and in the blocks after it, of its head and group.

    Attributes:
      inner: encodes channels independently of each other, with scales of at most 16 bits (so that
        the errors are the same bits in every program).
      block: channels that are encoded at a time; the last block may be shorter.
      strength: see above; 0 leaves everything to `inner`.
      subspace: how many of the leading eigenvectors of Q^T Q count; None for all.
      normalize: whether Q^T Q is divided by its mean eigenvalue, so that `strength` means the same
        however many and however large the queries are.

    Source: Wang et al. (2025), arXiv 2503.24358. It is the update of GPTQ, Frantar et al. (2022),
      arXiv 2210.17323, with A for the Hessian.
    """

    inner: Quantizer
    block: int = dataclasses.field(metadata={"static": True})
    strength: float = dataclasses.field(metadata={"static": True})
    subspace: int | None = dataclasses.field(default=None, metadata={"static": True})
    normalize: bool = dataclasses.field(default=True, metadata={"static": True})

    wants_queries = True

    def __post_init__(self):
        if self.block < 1 or not 0 <= self.strength < np.inf:
            raise ValueError(
                "QueryAware: expected block >= 1 and 0 <= strength < inf; got "
                f"block={self.block}, strength={self.strength}"
            )
        if self.subspace is not None and self.subspace < 1:
            raise ValueError(
                f"QueryAware: expected subspace >= 1, or None for all; got {self.subspace}"
            )

    def init_state(self, heads: int, head_dim: int) -> jax.Array:
        return jnp.zeros((heads, head_dim, head_dim), jnp.float32)

    def observe_query(self, q: jax.Array, context: Context) -> jax.Array:
        q = q.astype(jnp.float32)
        q = jnp.where(jnp.all(jnp.isfinite(q), axis=-1, keepdims=True), q, np.float32(0))
        return context.state + pairwise_sum(_times(q[..., :, None], q[..., None, :]), 1)[:, 0]

    @property
    def step(self) -> int:
        return self.inner.step

    def quantize(self, x: jax.Array, context: Context) -> Payload:
        """Encodes `x` [group, heads, head_dim], any float dtype, in float32."""
        return self.inner.quantize(self._moved(x, context), context)

    def splice(
        self, body: Payload, x: jax.Array, first: jax.Array, last: jax.Array, context: Context
    ) -> Payload:
        return self.inner.splice(body, self._moved(x, context), first, last, context)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes | VectorCodes | None:
        return self.inner.tiled_codes(body, context)

    def _moved(self, x: jax.Array, context: Context) -> jax.Array:
        """What the inner quantizer is given of `x` [tokens, heads, head_dim]."""
        x, head_dim = x.astype(jnp.float32), x.shape[-1]
        coefficients = _elimination(self._weight(context.state))
        channels = np.arange(head_dim)[None, None]

        def encode_block(i, carry):
            moved, error = carry
            start, stop = i * self.block, jnp.minimum((i + 1) * self.block, head_dim)

            def aim(channel, error):
                terms = _times(error, coefficients[None, :, channel])
                return error.at[..., channel].set(-pairwise_sum(terms, -1)[..., 0])

            error = jax.lax.fori_loop(start, stop, aim, error)
            current = (channels >= start) & (channels < stop)
            moved = jnp.where(current, x + error, moved)
            decoded = self.inner.round_trip(moved, context)
            return moved, jnp.where(current, decoded - x, error)

        # Errors of encoded channels, and those aimed at for channels of the current block.
        carry = x, jnp.zeros_like(x)
        moved, _ = jax.lax.fori_loop(0, -(-head_dim // self.block), encode_block, carry)
        return moved

    def dequantize(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        return self.inner.dequantize(payload, context, dtype)

    def _weight(self, gram: jax.Array) -> jax.Array:
        """A, f32[heads, head_dim, head_dim]."""
        head_dim = gram.shape[-1]
        eye = np.eye(head_dim, dtype=np.float32)[None]
        strength = jnp.full((gram.shape[0], 1, 1), self.strength, jnp.float32)
        if self.normalize:
            trace = pairwise_sum(jnp.diagonal(gram, axis1=1, axis2=2)[..., None], 1)
            mean = divide(trace, np.float32(head_dim))
            strength = divide(strength, jnp.where(mean > 0, mean, np.float32(1)))
        if self.subspace is not None and self.subspace < head_dim:
            # On CPUs matrix by matrix: jaxlib's LAPACK shares a batch among the threads of the pool
            # that runs it, and waits for them. Calls for several layers at a time would wait for
            # each other.
            eigh = lambda a: tuple(jnp.linalg.eigh(a))
            one_by_one = jax.vmap(sequential_vmap(eigh))
            values, vectors = jax.lax.platform_dependent(gram, cpu=one_by_one, default=eigh)
            values, vectors = values[:, -self.subspace :], vectors[..., -self.subspace :]
            scaled = _times(vectors, jnp.maximum(values, np.float32(0))[:, None])
            gram = pairwise_sum(_times(scaled[:, :, None], vectors[:, None]), -1)[..., 0]
        return eye + _times(gram, strength)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b, rounded in every program."""
    return rounded(a * b)


def _elimination(a: jax.Array) -> jax.Array:
    """The coefficients c, strictly lower triangular, of the best error of each channel.

    Given the errors of channels 0 .. i - 1, the minimum of d^T A d over all others has d_i = -sum_j
    c_ij d_j. c_i is row i of the Schur complement of A that is left when channels i + 1, i + 2, ...
    have been eliminated, divided by its diagonal. The order of sums is fixed, unlike in a library.

    Args: a: f32[heads, n, n], A, symmetric, A - I positive semidefinite.
    """
    n = a.shape[-1]
    before = np.tril(np.ones((n, n), np.float32), -1)

    def eliminate(step, carry):
        a, coefficients = carry
        i = n - 1 - step
        row = a[:, i]
        # At least 1 but for rounding, as A is at least I.
        pivot = jnp.maximum(jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1), np.float32(1))
        share = divide(row, pivot)
        a = a - _times(row[:, :, None], share[:, None])
        return a, coefficients.at[:, i].set(share * jnp.asarray(before)[i][None])

    return jax.lax.fori_loop(0, n, eliminate, (a, jnp.zeros_like(a)))[1]
