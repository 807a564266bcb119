"""The pieces that all decoders share: linear maps, norms, embeddings, and the shell around them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nqkv_jax.models.config import ModelConfig

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Up to so many hidden states the head is computed weights first, see `Embedding.logits`.
_FEW_ROWS = 64

_INIT = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), in the dtype of the kernel.

    The kernel is [in, out], the transpose of torch's: on XLA:CPU in float32 both orders reach the
    memory bandwidth with one row, but from a few rows on [in, out] is the faster by a third.
    """

    def __init__(self, features: int, out_features: int, *, bias: bool, rngs: nnx.Rngs, dtype: Any):
        self.kernel = nnx.Param(_INIT(rngs.params(), (features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, in] -> [B, S, out]."""
        y = product(x, self.kernel[...], "bsi,io->bso")
        if self.bias is not None:
            y = y + _broadcast_f32(self.bias[...], y)
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, computed in float32."""

    def __init__(self, features: int, *, affine: bool, eps: float = 1e-5, dtype: Any):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros((features,), dtype)) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features], keeps the dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * _broadcast_f32(self.scale[...], y) + _broadcast_f32(self.bias[...], y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * (offset + scale) over the last axis, computed in float32.

    Source: Zhang and Sennrich (2019), Root Mean Square Layer Normalization, equation 4.
    """

    def __init__(self, features: int, *, eps: float, offset: float = 0.0, dtype: Any):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full((features,), 1 - offset, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features], keeps the dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + _broadcast_f32(self.scale[...], y))).astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array, equation: str) -> jax.Array:
    """The einsum of `x` [B, S, in] with `kernel`, as f32: accumulated and returned in float32."""

    def plain(x, kernel):
        # On XLA:CPU this is also the fast way in bfloat16: asking for a bfloat16 result takes eight
        # times as long.
        return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)

    def doubled(x, kernel):
        return plain(jnp.concatenate([x, x], axis=1), kernel)

    if x.shape[:2] != (1, 1) or kernel.dtype != jnp.bfloat16:
        return plain(x, kernel)
    # XLA:CPU has a fast product of bfloat16 matrices, but none for a vector: computing the row
    # twice takes an eighth of the time.
    out = equation.split("->")[1].index("s")
    first = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=1, axis=out)
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda x, kernel: first(doubled(x, kernel)), default=plain
    )


def _broadcast_f32(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector.astype(jnp.float32), like.shape)


class Embedding(nnx.Module):
    """A table of rows [rows, features]: looked up on the way in, multiplied with on the way out."""

    def __init__(self, rows: int, features: int, *, rngs: nnx.Rngs, dtype: Any):
        self.table = nnx.Param(_INIT(rngs.params(), (rows, features), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[...] -> [..., features]; rows of NaN for ids outside the table.

        JAX would clamp such an id and answer for another token. Callers who hold the ids on the
        host get a proper error from `check_tokens`.
        """
        rows = self.table[...].at[ids]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, S, features] -> f32[B, S, rows], accumulated in float32."""
        # The same product either way. For a few hidden states (decoding) XLA:CPU is faster by up to
        # a third with the table as the left operand; for whole prompts transposing costs more.
        if x.shape[0] * x.shape[1] <= _FEW_ROWS:
            return jnp.moveaxis(product(x, self.table[...], "bsi,vi->vbs"), 0, -1)
        return product(x, self.table[...], "bsi,vi->bsv")


class Decoder(nnx.Module):
    """What every decoder offers; a family adds `config`, `hidden` and `head`."""

    config: ModelConfig

    def __call__(
        self, tokens: jax.Array, cache: Any = None, *, num_new: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Logits after every token, and the cache with these tokens in it.

        Args:
          tokens: i32[B, S]; valid tokens first, then padding (any id of the vocabulary).
          cache: as made by a scheme's `init`; None attends to `tokens` alone.
          num_new: i32[B], how many of the S tokens are valid; None for all.

        Returns: f32[B, S, vocab_size] (undefined at padding), and the new cache.

        Raises: ValueError if the shape or dtype of `tokens` is wrong, or S exceeds the learned
          positions of a model that has them.
        """
        hidden, cache = self.hidden(tokens, cache, num_new=num_new)
        return self.head(hidden), cache

    def hidden(
        self, tokens: jax.Array, cache: Any = None, *, num_new: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Like calling the model, up to what `head` takes: [B, S, hidden_size]."""
        raise NotImplementedError

    def head(self, hidden: jax.Array) -> jax.Array:
        """[B, S, hidden_size] -> logits f32[B, S, vocab_size]; S may be any part of the tokens."""
        raise NotImplementedError


def check_token_array(tokens: jax.Array) -> None:
    """Raises ValueError unless `tokens` is an integer array [B, S]; works under `jit`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "tokens must be an integer array [batch, tokens]; "
            f"got {tokens.dtype} of shape {tokens.shape}"
        )
