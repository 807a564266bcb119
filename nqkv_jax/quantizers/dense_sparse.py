"""Dense and sparse: low-bit codes of the bulk of a token, and its few outliers beside them.

With a zero z, a scale s and levels C in about [-1, 1]:

    x ≈ C[code] * s + z + residual,    code = argmin_j |(x - z) / s - C_j|

The residual is 0 except in the 2m channels of a token that are its outliers, m on each side. A
token has 2m slots for them, a channel number and a residual each (the ELLPACK layout), so that all
shapes are static. What an outlier's residual is taken from is the end level that its code is
clipped to, which leaves less to round than any other level.

The levels are an array, as every layer has its own.

Source: Hooper et al. (2024), KVQuant, arXiv 2401.18079, sections 3.3 and 3.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import packing
from nqkv_jax.quantizers.base import Context, Quantizer, decoded_once
from nqkv_jax.quantizers.block import (
    check_group,
    divide,
    divide_or_zero,
    rounded,
    store,
)

_MOST_CHANNELS = 2**15  # that an int16 numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSparsePayload:
    """One token: x ≈ levels[unpacked codes] * scale + zero, plus residuals[i] in channels[i].

    A slot that is not used has channel 0 and residual 0.
    """

    codes: jax.Array  # u8[1, heads, head_dim * bits / 8]
    channels: jax.Array | None  # i16[2m], of heads * head_dim; None without outliers
    residuals: jax.Array | None  # f16[2m]
    zero: jax.Array | None = None  # f16[]; where the range is the token's own
    scale: jax.Array | None = None  # f16[], likewise
    broken: jax.Array | None = None  # bool[]; where no other part can hold a NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSparseChannels(Quantizer):
    """A calibrated range per channel: x_n = (x - zero) / scale is in [-1, 1], or an outlier.

    At most `outliers` channels with the largest x_n > 1, and as many with the smallest x_n < -1,
    keep their residuals; others are clipped to the end levels. A token with NaN or an infinity
    decodes to NaN in at least one channel, and throughout if there are no slots.

    Attributes:
      zero, scale: f32[heads, head_dim], of the channels; scale > 0.
      levels: f32[2^bits], increasing, that codes are chosen by.
      decoded_levels: f32[2^bits] that codes stand for; None for `levels`.
      outliers: m, slots per token on each side.
    """

    zero: jax.Array
    scale: jax.Array
    levels: jax.Array
    decoded_levels: jax.Array | None = None
    outliers: int = dataclasses.field(default=0, metadata={"static": True})

    def check(self, heads: int, head_dim: int) -> None:
        if self.zero.shape != (heads, head_dim) or self.scale.shape != (heads, head_dim):
            raise ValueError(
                f"DenseSparseChannels: zero and scale must be [heads, head_dim] = "
                f"[{heads}, {head_dim}]; got {self.zero.shape} and {self.scale.shape}"
            )
        _check("DenseSparseChannels", self, heads, head_dim)

    def quantize(self, x: jax.Array, context: Context) -> DenseSparsePayload:
        """Encodes `x` [1, heads, head_dim], any float dtype, in float32."""
        check_group("DenseSparseChannels", x, 1)
        flat, finite = x.astype(jnp.float32).ravel(), jnp.isfinite(x).ravel()
        zero, scale = self.zero.ravel(), self.scale.ravel()
        relative = divide(flat - zero, scale)
        codes = _encode(relative, self.levels)
        slots = dict(channels=None, residuals=None, broken=~jnp.all(finite))
        if self.outliers:
            # What is not finite ranks first, so that its slot shows it.
            infinite = np.float32(np.inf)
            above, high = _largest(jnp.where(finite, relative, infinite), self.outliers)
            below, low = _largest(jnp.where(finite, -relative, -infinite), self.outliers)
            used = jnp.concatenate([above, below]) > 1
            index = jnp.concatenate([high, low])
            dense = _dense(codes, _decoder(self), scale, zero)
            slots = _slots(flat, dense, jnp.where(used, index, 0), used)
        return DenseSparsePayload(codes=_pack(codes, x.shape, self.levels), **slots)

    def dequantize(
        self, payload: DenseSparsePayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [1, heads, head_dim]."""
        x = _decode(payload, self, self.scale.ravel(), self.zero.ravel())
        if payload.broken is not None:
            x = jnp.where(payload.broken, np.float32(np.nan), x)
        return x.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSparseTokens(Quantizer):
    """A range per token, across heads: the one that is left without the m largest and m smallest.

    These 2m are the outliers, also where values tie. Zero and scale are stored as float16, and
    encoded with as stored. A token with NaN or an infinity decodes to NaN throughout.

    Attributes:
      levels: f32[2^bits], increasing, that codes are chosen by.
      decoded_levels: f32[2^bits] that codes stand for; None for `levels`.
      outliers: m, slots per token on each side.
    """

    levels: jax.Array
    decoded_levels: jax.Array | None = None
    outliers: int = dataclasses.field(default=0, metadata={"static": True})

    def check(self, heads: int, head_dim: int) -> None:
        _check("DenseSparseTokens", self, heads, head_dim)

    def quantize(self, x: jax.Array, context: Context) -> DenseSparsePayload:
        """Encodes `x` [1, heads, head_dim], any float dtype, in float32."""
        check_group("DenseSparseTokens", x, 1)
        flat = x.astype(jnp.float32).ravel()
        zero, scale, index = token_range(flat, self.outliers)
        wide = lambda a: jnp.broadcast_to(a.astype(jnp.float32), flat.shape)
        codes = _encode(divide_or_zero(flat - wide(zero), wide(scale)), self.levels)
        slots = dict(channels=None, residuals=None)
        if self.outliers:
            dense = _dense(codes, _decoder(self), wide(scale), wide(zero))
            slots = _slots(flat, dense, index, jnp.ones(index.shape, jnp.bool_))
        codes = _pack(codes, x.shape, self.levels)
        return DenseSparsePayload(codes=codes, zero=zero, scale=scale, **slots)

    def dequantize(
        self, payload: DenseSparsePayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [1, heads, head_dim]."""
        zero, scale = payload.zero.astype(jnp.float32), payload.scale.astype(jnp.float32)
        return _decode(payload, self, scale, zero).astype(dtype)


def slots_per_side(fraction: float, hidden: int) -> int:
    """m: outliers of a token on each side, where `fraction` of all elements are outliers."""
    return int(fraction / 2 * hidden) + 1 if fraction else 0


def token_range(x: jax.Array, outliers: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(zero f16[], scale f16[], the channels i32[2 * outliers] that are outliers) of x f32[hidden].

    [zero - scale, zero + scale] is from the smallest to the largest of the other channels.
    """
    hidden, count = x.shape[0], outliers + 1
    largest, high = _largest(x, count)
    # From the back, so that ties are broken the other way round: no channel is on both sides.
    smallest, low = _largest(-x[::-1], count)
    half, finite = np.float32(0.5), jnp.all(jnp.isfinite(x))
    upper, lower = half * largest[-1], half * -smallest[-1]
    zero = store(upper + lower, finite, np.dtype(np.float16))
    scale = store(upper - lower, finite, np.dtype(np.float16))
    return zero, scale, jnp.concatenate([high[:-1], hidden - 1 - low[:-1]])


def _largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of x f32[n] and where they are; of equal ones the first."""
    # Apart from whatever slices the result: XLA:CPU would then sort the row instead. For 7 of 1,024
    # that takes 160 times as long.
    return jax.lax.optimization_barrier(jax.lax.top_k(x, count))


def _bits(levels: jax.Array) -> int:
    return levels.shape[0].bit_length() - 1


def _decoder(quantizer) -> jax.Array:
    decoded = quantizer.decoded_levels
    return quantizer.levels if decoded is None else decoded


def _check(what: str, quantizer, heads: int, head_dim: int) -> None:
    hidden, m = heads * head_dim, quantizer.outliers
    shape = quantizer.levels.shape
    if len(shape) != 1 or shape[0] not in (4, 8, 16):
        raise ValueError(f"{what}: levels must be [2^bits], bits 2, 3 or 4; got shape {shape}")
    packing.packed_size(head_dim, _bits(quantizer.levels))
    if m < 0 or 2 * m + 2 > hidden or (m and hidden > _MOST_CHANNELS):
        raise ValueError(
            f"{what}: outliers per side must leave two of heads * head_dim = {heads} * {head_dim} "
            f"channels, of which there may be {_MOST_CHANNELS}; got outliers={m}"
        )


def _encode(x: jax.Array, levels: jax.Array) -> jax.Array:
    """The codes u8[...] of the nearest of `levels` to x f32[...]; ties take the lower."""
    thresholds = np.float32(0.5) * (levels[1:] + levels[:-1])
    codes = jnp.zeros(x.shape, jnp.uint8)
    for i in range(thresholds.shape[0]):
        codes = codes + (x > thresholds[i]).astype(jnp.uint8)
    return codes


def _look_up(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """levels[codes], by selects on the bits of the code: see `Codebook.decode`."""
    codes = codes.astype(jnp.int32)
    values = [levels[i] for i in range(levels.shape[0])]
    for bit in range(_bits(levels)):
        is_set = (codes & np.int32(1 << bit)) != 0
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def _dense(codes: jax.Array, levels: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """What codes alone stand for."""
    # Lest the residuals that are stored depend on the program.
    product = rounded(_look_up(codes, levels) * scale)
    return product + zero


def _slots(x: jax.Array, dense: jax.Array, index: jax.Array, used: jax.Array) -> dict:
    residual = x[index] - dense[index]
    residual = store(residual, jnp.isfinite(residual), np.dtype(np.float16))
    return dict(
        channels=index.astype(jnp.int16), residuals=jnp.where(used, residual, np.float16(0))
    )


def _pack(codes: jax.Array, shape: tuple[int, ...], levels: jax.Array) -> jax.Array:
    return packing.pack(codes.reshape(shape), _bits(levels))


def _decode(payload: DenseSparsePayload, quantizer, scale, zero) -> jax.Array:
    """f32[1, heads, head_dim], for `scale` and `zero` of all or of each of the channels."""
    bits, words = _bits(quantizer.levels), payload.codes.shape[-1]
    codes = packing.unpack(payload.codes, bits, words * 8 // bits)
    x = _dense(codes.ravel(), _decoder(quantizer), scale, zero)
    if payload.channels is None:
        x = decoded_once(x)  # a scatter is one anyway
    else:
        channels, residuals = payload.channels.astype(jnp.int32), payload.residuals
        x = x.at[channels].add(residuals.astype(jnp.float32), mode="promise_in_bounds")
    return x.reshape(codes.shape)
