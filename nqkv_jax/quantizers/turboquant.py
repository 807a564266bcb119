"""A one-bit sketch of what a quantizer left over, which makes inner products unbiased."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import packing
from nqkv_jax.quantizers.base import Context, Payload, Quantizer, Wrapper
from nqkv_jax.quantizers.block import (
    divide,
    divide_or_zero,
    pairwise_sum,
    rounded,
    store,
)

# The Gaussian matrix is rounded to steps of 1/32, at most 127 of them, and the residual to as many
# steps as keep every partial sum of their product below 2^24: it is exact in float32, whatever the
# order, so that the stored signs do not depend on how many tokens are encoded in one call.
_STEPS, _TOP = 32, 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SketchPayload:
    """What `inner` stored, and the sketch of the residual."""

    inner: Payload
    signs: jax.Array  # u8[group, heads, head_dim / 8], 1 where S r >= 0
    rms: jax.Array  # f16[group, heads], of r


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidualSketch(Wrapper):
    """Encodes with `inner`, and the residual r = x - x1 of each head as the signs of S r.

    With S [D, D] of independent N(0, 1), generated from `seed` and never stored:

        x~ = x1 + sqrt(pi / 2) / D * |r| * S^T sign(S r),    E <q, x~> = <q, x>

    over S. |r| = sqrt(D) * rms, rounded to float16. One bit and 16 / D bits more than `inner`.

    Attributes:
      inner: a quantizer whose scales belong to one head.
      seed: of S, which all heads share.

    Source: Zandieh et al. (2024), QJL, arXiv 2406.03482, definition 3.1; on a residual: Zandieh et
      al. (2025), TurboQuant, arXiv 2504.19874, algorithm 2.
    """

    inner: Quantizer
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def check(self, heads: int, head_dim: int) -> None:
        super().check(heads, head_dim)
        packing.packed_size(head_dim, 1)
        if head_dim > 1024:
            raise ValueError(f"ResidualSketch: head_dim must be at most 1024; got {head_dim}")

    def quantize(self, x: jax.Array, context: Context) -> SketchPayload:
        """Encodes `x` [group, heads, head_dim], any float dtype, in float32."""
        self.check(*x.shape[1:])
        x = x.astype(jnp.float32)
        payload = self.inner.quantize(x, context)
        decoded = self.inner.dequantize(payload, context)
        residual = x - rounded(decoded)
        finite = jnp.all(jnp.isfinite(residual), axis=-1, keepdims=True)
        largest = jnp.max(jnp.abs(residual), axis=-1, keepdims=True)
        units = divide_or_zero(residual, largest)
        squares = rounded(jnp.square(units))
        rms = largest * jnp.sqrt(divide(pairwise_sum(squares, -1), np.float32(x.shape[-1])))
        steps = jnp.round(units * np.float32(2**24 // (_TOP * x.shape[-1])))
        sketch = _product(steps, _gaussian(self.seed, x.shape[-1]).T)
        return SketchPayload(
            inner=payload,
            signs=packing.pack((sketch >= 0).astype(jnp.uint8), 1),
            rms=store(rms, finite, jnp.dtype(jnp.float16))[..., 0],
        )

    def dequantize(self, payload: SketchPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        x = self.inner.dequantize(payload.inner, context)
        bits = packing.unpack(payload.signs, 1, x.shape[-1]).astype(jnp.float32)
        directions = _product(2 * bits - 1, _gaussian(self.seed, x.shape[-1]))
        unit = np.float32(np.sqrt(np.pi / 2 / x.shape[-1]) / _STEPS)
        length = payload.rms.astype(jnp.float32)[..., None] * unit
        return (x + length * directions).astype(dtype)


@functools.lru_cache
def _gaussian(seed: int, n: int) -> np.ndarray:
    """f32[n, n], N(0, 1) in whole steps of 1 / _STEPS."""
    draws = np.random.default_rng(seed).standard_normal((n, n))
    return np.clip(np.round(_STEPS * draws), -_TOP, _TOP).astype(np.float32)


def _product(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """x @ matrix, exact for whole numbers."""
    return jnp.matmul(x, jnp.asarray(matrix), precision=jax.lax.Precision.HIGHEST)
