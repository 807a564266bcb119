"""Normalise, shift, normalise: tokens of a window become normal numbers, which one codebook codes.

Of the tokens x_t [head_dim] of a head in a window, with RTN4 for what is rounded to 4 bits:

    normalise   s1_t = rms(x_t),  s1 <- RTN4(s1) over the window,     u_t = x_t / s1_t
    shift       o = mean_t u_t,   o  <- RTN4(o) in groups of 32,      w_t = u_t - o
    turn        y_t = H RoPE_t(w_t) for keys; w_t for values, turned by H before all this
    normalise   s2_t = rms(y_t),                                      z_t = y_t / s2_t
    code        z_t ~ z^_t, 8 channels at a time, from a codebook for independent N(0, 1)
    adjust      s2_t <- s2_t <z_t, z_t> / <z_t, z^_t>: the error is orthogonal to z_t

with rms(x) = |x| / sqrt(head_dim). H and RoPE keep norms, so that it makes no difference that the
paper normalises before them; here RoPE may also scale (YaRN).

Source: Son et al. (2025), NSNQuant, arXiv 2505.18231.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import packing, vector_codebooks
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import (
    check_group,
    divide,
    divide_or_zero,
    pairwise_sum,
    rms,
    rounded,
    store,
)
from nqkv_jax.quantizers.transforms import Hadamard
from nqkv_jax.rotary import RotaryAngles
from nqkv_jax.vector_codebooks import LENGTH

MEAN_GROUP = 32  # channels of the mean that share a step, where head_dim is a multiple of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FourBits:
    """x ≈ codes * step + low, with a step and a low per row."""

    codes: jax.Array  # u8[..., n / 2], packed
    step: jax.Array  # f16[...]
    low: jax.Array  # f16[...]

    def decode(self) -> jax.Array:
        """f32[..., n]. The products are exact, so that it is the same in every program."""
        codes = packing.unpack(self.codes, 4, 2 * self.codes.shape[-1]).astype(jnp.float32)
        step, low = (a.astype(jnp.float32)[..., None] for a in (self.step, self.low))
        return codes * step + low


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NSNPayload:
    """One window; the tokens are along the fast axis, where kernels have their lanes.

    x_t ≈ norms_t (scale_t * ±words[codes_t] + mean), turned back.
    """

    codes: jax.Array  # u8[heads, head_dim / 8, window]
    signs: jax.Array | None  # like codes, bit i of byte r: channel 8 r + i is >= 0; 2 bits only
    scale: jax.Array  # f16[heads, window], s2 as adjusted
    norms: FourBits | None  # s1, [heads] rows of `window`; None if tokens are not normalised first
    mean: FourBits  # o, [heads, head_dim / 32] rows of 32, or of what divides head_dim and 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NSNQuantizer(Quantizer):
    """As above, without a turn: for values, inside `Transformed(..., (Hadamard(),))`.

    A window and head that holds NaN or an infinity decodes to NaN throughout. A token whose stored
    s1 is 0 decodes to 0.

    Attributes:
      bits: 1, or 2: magnitudes are coded, and their signs.
      window: tokens that share a mean; even.
      normalise: whether there is a first normalisation; if not, s1 = 1.
      adjust: whether s2 is adjusted.
    """

    bits: int = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(default=64, metadata={"static": True})
    normalise: bool = dataclasses.field(default=True, metadata={"static": True})
    adjust: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self):
        if self.bits not in vector_codebooks.BITS:
            raise ValueError(f"NSNQuantizer: bits must be 1 or 2; got {self.bits}")
        if self.window < 2 or self.window % 2:
            raise ValueError(
                f"NSNQuantizer: window must be an even number of tokens; got {self.window}"
            )

    @property
    def group(self) -> int:
        return self.window

    def check(self, heads: int, head_dim: int) -> None:
        unit = 2 * LENGTH // self.bits  # channels of a word
        if head_dim < unit or head_dim % unit:
            raise ValueError(
                f"NSNQuant: head_dim must be a positive multiple of {unit} for bits={self.bits}, "
                f"for the codebook; got {head_dim}"
            )

    def quantize(self, x: jax.Array, context: Context) -> NSNPayload:
        """Encodes `x` [window, heads, head_dim], any float dtype, in float32."""
        check_group("NSNQuantizer", x, self.window)
        self.check(*x.shape[1:])
        x = x.astype(jnp.float32)
        finite = jnp.all(jnp.isfinite(x), axis=(0, 2))  # [heads]
        x = jnp.where(finite[None, :, None], x, np.float32(0))
        norms = None
        if self.normalise:
            norms = _round_to_four_bits(_rms(x)[..., 0].T, finite)
            x = divide_or_zero(x, _tokens_first(norms))
        mean = divide(pairwise_sum(x, 0), np.float32(self.window))[0]
        mean = mean.reshape(len(mean), -1, math.gcd(x.shape[-1], MEAN_GROUP))
        mean = _round_to_four_bits(mean, finite[:, None])
        # A mean that is NaN says that the window is not finite; nothing else must.
        shift = jnp.where(finite[None, :, None], _channels_last(mean), np.float32(0))
        y = self._turn(x - shift, context)
        scale = _rms(y)
        z = divide_or_zero(y, scale)
        codes, signs = self._encode(z)
        if self.adjust:
            inner = lambda a, b: pairwise_sum(rounded(a * b), -1)
            along = jnp.maximum(inner(z, self._decode(codes, signs)), np.float32(1e-12))
            scale = divide(scale * inner(z, z), along)
        tokens_last = lambda a: jnp.moveaxis(a, 0, -1)
        return NSNPayload(
            codes=tokens_last(codes),
            signs=None if signs is None else tokens_last(signs),
            scale=tokens_last(store(scale, finite[None, :, None], jnp.dtype(jnp.float16))[..., 0]),
            norms=norms,
            mean=mean,
        )

    def dequantize(self, payload: NSNPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        coded, mean = self._parts(payload)
        return (coded + mean).astype(dtype)

    def _turn(self, w: jax.Array, context: Context) -> jax.Array:
        """What is coded of `w` [window, heads, head_dim]."""
        return w

    def _encode(self, z: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Codes u8[window, heads, head_dim / 8] of tokens of norm sqrt(head_dim), and signs."""
        vectors = z.reshape(*z.shape[:-1], -1, LENGTH)
        signs = None
        if self.bits == 2:
            signs = packing.pack((vectors >= 0).astype(jnp.uint8), 1)[..., 0]
            vectors = jnp.abs(vectors)
        # A little above sqrt(head_dim), as z was rounded.
        words, norm = vector_codebooks.normal(self.bits), (z.shape[-1] + 1) ** 0.5
        return vector_codebooks.nearest(vectors, words, norm=norm), signs

    def _decode(self, codes: jax.Array, signs: jax.Array | None) -> jax.Array:
        """z^ f32[window, heads, head_dim]."""
        words = jnp.asarray(vector_codebooks.normal(self.bits))
        vectors = words.at[codes].get(mode="promise_in_bounds")
        if signs is not None:
            positive = packing.unpack(signs[..., None], 1, LENGTH) > 0
            vectors = jnp.where(positive, vectors, -vectors)
        return vectors.reshape(*codes.shape[:-1], -1)

    def _parts(self, payload: NSNPayload) -> tuple[jax.Array, jax.Array]:
        """s1 s2 z^ and s1 o, f32[window, heads, head_dim] each."""
        tokens_first = lambda a: None if a is None else jnp.moveaxis(a, -1, 0)
        z = self._decode(tokens_first(payload.codes), tokens_first(payload.signs))
        scale = tokens_first(payload.scale).astype(jnp.float32)[..., None]
        mean = _channels_last(payload.mean)
        if payload.norms is None:
            return scale * z, jnp.broadcast_to(mean, z.shape)
        norms = _tokens_first(payload.norms)
        return (norms * scale) * z, norms * mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NSNKeys(NSNQuantizer):
    """As above: for keys that are stored before RoPE, and coded after it.

        <q, k^_t> = s1_t (s2_t <H q, z^_t> + <q, RoPE_t(o)>)

    A folded key has 2 head_dim channels, which meet H q, turned once, and q.

    Attributes:
      hadamard: whether H is the Hadamard matrix over sqrt(head_dim), without random signs; if not,
        the identity.
    """

    hadamard: bool = dataclasses.field(default=True, metadata={"static": True})

    rotates = True

    def dequantize(self, payload: NSNPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        coded, mean = self._parts(payload)
        if self.hadamard:
            coded = Hadamard().invert((), coded)
        return (coded + _rotate(mean, context)).astype(dtype)

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        turned = q.astype(jnp.float32)
        if self.hadamard:
            turned = Hadamard().apply((), turned)
        return jnp.concatenate([turned.astype(q.dtype), q], axis=-1), None

    def dequantize_folded(self, payload: NSNPayload, context: Context, dtype=jnp.float32):
        coded, mean = self._parts(payload)
        return jnp.concatenate([coded, _rotate(mean, context)], axis=-1).astype(dtype)

    def _turn(self, w: jax.Array, context: Context) -> jax.Array:
        # H after RoPE, with which it does not commute.
        w = _rotate(w, context)
        return Hadamard().apply((), w) if self.hadamard else w


def _rms(x: jax.Array) -> jax.Array:
    """Of the last axis, kept as 1."""
    return rms(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True), -1)


def _round_to_four_bits(x: jax.Array, finite: jax.Array) -> FourBits:
    """RTN4 of rows f32[..., n], by the step and low as stored; NaN unless `finite` [...]."""
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
    half = jnp.dtype(jnp.float16)
    # A constant row has a step too.
    step = store(jnp.maximum(divide(high - low, np.float32(15)), np.float32(1e-5)), finite, half)
    low = store(low, finite, half)
    kept = lambda a: a.astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(divide_or_zero(x - kept(low), kept(step))), 0, 15)
    # What a cast makes of NaN is open.
    codes = jnp.where(finite[..., None], codes, np.float32(0)).astype(jnp.uint8)
    return FourBits(codes=packing.pack(codes, 4), step=step, low=low)


def _tokens_first(norms: FourBits) -> jax.Array:
    """s1, f32[window, heads, 1]."""
    return norms.decode().T[..., None]


def _channels_last(mean: FourBits) -> jax.Array:
    """o, f32[1, heads, head_dim]."""
    rows = mean.decode()
    return rows.reshape(1, len(rows), -1)


def _rotate(x: jax.Array, context: Context) -> jax.Array:
    """RoPE of f32[window, heads, head_dim], rounded to the same bits in every program."""
    if context.rotary is None:
        return x
    angles: Any = context.rotary
    if not isinstance(angles, RotaryAngles):
        angles = angles.at(context.positions)
    half = angles.cos.shape[-1]
    cos, sin = rounded(angles.cos * angles.factor), rounded(angles.sin * angles.factor)
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    times = lambda a, b: rounded(a * b)
    rotated = [times(first, cos) - times(second, sin), times(second, cos) + times(first, sin)]
    return jnp.concatenate([*rotated, rest], axis=-1)
