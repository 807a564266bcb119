"""HQQ: min–max groups whose zero point is moved to where few elements are far off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import codebooks, packing
from nqkv_jax.checks import is_whole
from nqkv_jax.codebooks import Codebook
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import (
    BlockPayload,
    BlockQuantizer,
    check_group,
    divide,
    divide_or_zero,
    pairwise_sum,
    rounded,
    scale_dtype,
    store,
)

# Both are those of the published code.
NORM = 0.7  # p of the error |x - x^|^p, below 1: large errors of few elements count little
BETA = 10.0  # how closely the split-off outliers must follow the error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQQuantizer(Quantizer):
    """Half-quadratic quantization: the scale of min–max, a zero point found by iteration.

    With S = 1 / scale, z = -min S and p < 1, `iterations` times

        q = clip(round(x S + z), 0, 2^bits - 1)          the codes
        e = shrink(x - (q - z) / S)                      what is given up as outliers
        z = mean over the block of q - (x - e) S

    where shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0). A payload is that of `BlockQuantizer`
    with scale="minmax", which decodes it: x ≈ q * scale + zero. So `zero` is z in units of x,
    -z * scale, with the same relative rounding; with 0 iterations it is the block's minimum, and
    the payload that of min–max to the bit.

    The published solver stops when the mean error of a whole tensor no longer falls, so that a
    block depends on what else is in the call. Here the number of iterations is fixed. Its limits
    for narrow ranges (S <= 2e4, and S = 1 below a range of 1e-4) are not needed here: a constant
    block decodes to its value.

    Attributes:
      bits: 2, 3, 4 or 8. One bit is refused: its squared error on normal data is 2.2 times that of
        storing zeros.
      block_size, axis, scale_dtype: as for `BlockQuantizer`.
      iterations: of the solver.

    Source: Badri and Shaji (2023), Half-Quadratic Quantization of Large Machine Learning Models.
    """

    bits: int = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(default="hidden", metadata={"static": True})
    iterations: int = dataclasses.field(default=20, metadata={"static": True})
    scale_dtype: np.dtype = dataclasses.field(default=jnp.float16, metadata={"static": True})

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", scale_dtype(self.scale_dtype))
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(
                "HQQQuantizer: bits must be 2, 3, 4 or 8 (with one bit, zeros would have less than "
                f"half the error); got {self.bits}"
            )
        if not is_whole(self.iterations) or self.iterations < 0:
            raise ValueError(
                f"HQQQuantizer: expected iterations >= 0, a whole number; got {self.iterations!r}"
            )
        self._blocks  # noqa: B018  (checks block_size and axis)

    @property
    def _blocks(self) -> BlockQuantizer:
        """The blocks, and how they are decoded."""
        return BlockQuantizer(
            codebooks.uniform(self.bits),
            block_size=self.block_size,
            axis=self.axis,
            scale="minmax",
            scale_dtype=self.scale_dtype,
        )

    @property
    def codebook(self) -> Codebook:
        return self._blocks.codebook

    @property
    def group(self) -> int:
        return self._blocks.group

    def check(self, heads: int, head_dim: int) -> None:
        self._blocks.check(heads, head_dim)

    def quantize(self, x: jax.Array, context: Context) -> BlockPayload:
        """Encodes `x` [group, heads, head_dim], any float dtype, in float32."""
        check_group("HQQQuantizer", x, self.group)
        self.check(*x.shape[1:])
        codes, scale, zero = self.encode(x)
        return BlockPayload(codes=packing.pack(codes, self.bits), scale=scale, zero=zero)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `BlockQuantizer.encode`."""
        grid = self._blocks
        blocks, axis = grid._to_blocks(x.astype(jnp.float32))
        low = jnp.min(blocks, axis=axis, keepdims=True)
        high = jnp.max(blocks, axis=axis, keepdims=True)
        finite = jnp.all(jnp.isfinite(blocks), axis=axis, keepdims=True)
        scale = store(divide(high - low, np.float32(2**self.bits - 1)), finite, self.scale_dtype)
        step = scale.astype(jnp.float32)
        shift = self._shift(divide_or_zero(blocks - low, step), step, axis)
        zero = store(low - rounded(shift * step), finite, self.scale_dtype)
        codes = grid.codebook.encode(divide_or_zero(blocks - zero.astype(jnp.float32), step))
        return codes.reshape(x.shape), jnp.squeeze(scale, axis), jnp.squeeze(zero, axis)

    def _shift(self, y: jax.Array, step: jax.Array, axis: int) -> jax.Array:
        """z - z_0, for elements `y` in steps above the minimum of their block."""
        top, size = np.float32(2**self.bits - 1), np.float32(y.shape[axis])
        # All in steps, in which a threshold |d|^(p-1) / beta is this times |d / step|^(p-1).
        strength = jnp.power(step, np.float32(NORM - 2)) * np.float32(1 / BETA)

        def iterate(_, shift):
            moved = y + shift
            codes = jnp.clip(jnp.round(moved), np.float32(0), top)
            error = moved - codes
            # 0^(p-1) is infinite, and infinity times a strength of 0 would be NaN.
            distance = jnp.maximum(jnp.abs(error), np.float32(1e-12))
            threshold = rounded(strength * jnp.power(distance, np.float32(NORM - 1)))
            outlier = jnp.sign(error) * jnp.maximum(distance - threshold, np.float32(0))
            return divide(pairwise_sum(codes - y + outlier, axis), size)

        return jax.lax.fori_loop(0, self.iterations, iterate, jnp.zeros_like(step))

    def dequantize(self, payload: BlockPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [group, heads, head_dim]."""
        return self._blocks.dequantize(payload, context, dtype)

    def decode(
        self, codes: jax.Array, scale: jax.Array, zero: jax.Array, dtype=jnp.float32
    ) -> jax.Array:
        """The inverse of `encode`."""
        return self._blocks.decode(codes, scale, zero, dtype)
