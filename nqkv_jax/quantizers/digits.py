"""Ranked keys that a fused kernel reads like any others: widths of whole digits.

A uniform code of n b bits is n digits of b bits, and the number that it stands for is their sum
with the weights 1, 2^b, 4^b ... So a channel of n digits is n channels of one digit, with scales in
these proportions, all of which meet the channel's query. What is stored of a token is therefore an
ordinary tile of b-bit codes, evenly spaced, with a scale per channel and tile: its head_dim *slots*
hold the digits of the channels, two of those that queries see most, none of those that they see
least: a channel gets the digit of another if what one digit leaves of it is more than all there is
of the other. Only the query, whose channels are picked for the slots, knows about it.

Means of channels are large, and RoPE turns them, so that over a tile they would be most of what
there is to code. So keys lose the means that they have before RoPE, turned to where they are. What
a mean adds to the score of token t is, of each channel pair with the frequency f, a cos(f t) +
b sin(f t), where a and b depend on the query alone: channels of a folded query that meet cosines
and sines.

Scales are those of the least squared error among a few fractions of the largest magnitude.

Ranking and means are those of `ranked`; digits are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import tiles
from nqkv_jax.codebooks import Codebook, centred_integers
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes, Waves, as_float32
from nqkv_jax.quantizers.base import Context, Payload
from nqkv_jax.quantizers.block import (
    check_group,
    divide_or_zero,
    pairwise_sum,
    rounded,
    store,
)
from nqkv_jax.quantizers.ranked import Ranking, by_rank, token_mean
from nqkv_jax.quantizers.tiled import TiledPayload
from nqkv_jax.rotary import RotaryAngles, amplitudes

_STATIC = {"static": True}
# Of the largest magnitude, for the outermost level. Of 128 normal numbers the largest is about 2.7
# deviations, and the best outermost levels are at 1.5 for 2 bits, and at 2.5 for 4.
CLIPS = (0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 1.0)


# What a digit leaves of a normal channel's variance. Source: Max (1960), table II.
LEFT_BY_DIGIT = {2: 0.1188, 3: 0.03744, 4: 0.01154}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DigitLayout:
    """Of a sequence: channel i32[heads, head_dim] of each slot, and doubled i32[heads], how many
    channel pairs have two digits.

    The pair of rank r has the slots r and r + head_dim / 2, for its two channels. Those of the last
    `doubled` ranks, which have no digit, hold the upper digits of the first, in reverse.
    """

    channel: jax.Array
    doubled: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DigitQuantizer(Ranking):
    """Keys in tiles of 128 tokens, each channel coded by no, one or two digits of `bits`.

    A channel without any decodes to its mean. A head whose tile holds NaN or an infinity decodes to
    NaN in all coded channels of that tile.

    Attributes:
      bits: of a digit, 2, 3 or 4.
      ranking: see `Ranking`; or "none", for one digit everywhere.
      turning: whether means are those before RoPE; if not, keys lose those that they have after it.
    """

    bits: int = dataclasses.field(metadata=_STATIC)
    ranking: str = dataclasses.field(default="queries", metadata=_STATIC)
    turning: bool = dataclasses.field(default=True, metadata=_STATIC)

    def __post_init__(self):
        if self.bits not in LEFT_BY_DIGIT:
            raise ValueError(f"DigitQuantizer: expected bits to be 2, 3 or 4; got {self.bits}")
        self.check_ranking("none")

    @property
    def group(self) -> int:
        return tiles.TOKENS

    def check(self, heads: int, head_dim: int) -> None:
        tiles.check(head_dim, self.bits)

    def centre(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        angles = self._angles(context)
        if angles is None:
            return super().centre(x, context)
        back = dataclasses.replace(angles, sin=-angles.sin, factor=1 / angles.factor)
        mean = token_mean(_rotated(x, back))[0]
        return mean, x - self._turned(mean, len(x), context)

    def quantize(self, x: jax.Array, context: Context) -> TiledPayload:
        check_group("DigitQuantizer", x, self.group)
        self.check(*x.shape[1:])
        state = self.state(context)
        x = x.astype(jnp.float32) - self._turned(state.mean, self.group, context)
        x = jnp.moveaxis(x, 0, -1)  # [heads, D, 128]
        finite = jnp.all(jnp.isfinite(x), axis=(1, 2), keepdims=True)
        # A channel is coded once for each of its slots, alike; each keeps a digit.
        x = jnp.take_along_axis(x, state.layout.channel[..., None], axis=1)
        doubled, upper = self._digits(state.layout)
        levels = jnp.where(doubled, jnp.int32(4**self.bits), jnp.int32(2**self.bits))
        top = (levels - 1).astype(jnp.float32) / 2
        step = _best_step(x, top, finite)
        code = _code(x, step, top).astype(jnp.int32)
        digit = jnp.where(upper, code >> self.bits, code & jnp.int32(2**self.bits - 1))
        weight = jnp.where(upper, np.float32(2**self.bits), np.float32(1))
        scale = (step * weight)[..., 0].astype(jnp.float16)
        return TiledPayload(
            words=tiles.pack(jnp.moveaxis(digit.astype(jnp.uint8), -1, 0), self.bits),
            scale=jax.lax.bitcast_convert_type(scale, jnp.int16),
        )

    def dequantize(self, payload: TiledPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        state = self.state(context)
        slots = self._decoded(payload)
        add = lambda zero, channels, x: zero.at[:, channels].add(x)
        per_head = jax.vmap(add, in_axes=(1, 0, 1), out_axes=1)
        x = per_head(jnp.zeros_like(slots), state.layout.channel, slots)
        return (x + self._turned(state.mean, self.group, context)).astype(dtype)

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        state = self.state(context)
        align = lambda a: jnp.broadcast_to(a, q.shape)
        slots = jnp.take_along_axis(q, align(state.layout.channel), axis=-1)
        rotary = context.rotary if self.turning else None
        half = 0 if rotary is None else len(rotary.inverse_frequencies)
        cosine, sine, rest = amplitudes(q.astype(jnp.float32), align(state.mean), half)
        if rotary is None:
            return slots, rest[..., 0]
        waves = jnp.concatenate([cosine, sine], axis=-1)
        waves = (waves * rotary.attention_factor).astype(q.dtype)
        shift = rest[..., 0] if 2 * half < q.shape[-1] else None
        return jnp.concatenate([slots, waves], axis=-1), shift

    def dequantize_folded(
        self, payload: TiledPayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """[128, heads, head_dim]: digits times scales, in their slots."""
        return self._decoded(payload).astype(dtype)

    def waves(self, context: Context, dtype=jnp.float32) -> jax.Array | None:
        """[tokens, R]: cosines and sines."""
        angles = self._angles(context)
        if angles is None:
            return None
        return jnp.concatenate([angles.cos, angles.sin], axis=-1)[:, 0].astype(dtype)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes:
        waves = None
        if context.rotary is not None and self.turning:
            starts = context.rotary.at(context.positions[:: tiles.TOKENS])
            waves = Waves(starts=starts, places=context.rotary.at(jnp.arange(tiles.TOKENS)))
        return TiledCodes(
            words=body.words,
            scale=body.scale,
            waves=waves,
            codebook=self._codebook,
            per_channel=True,
        )

    def lay_out(self, importance: jax.Array) -> DigitLayout:
        order, pairs = by_rank(importance), importance.shape[-1]
        ranked = jnp.take_along_axis(importance, order, axis=-1)
        first, last = ranked[:, : pairs // 2], ranked[:, : -(pairs // 2) - 1 : -1]
        doubled = jnp.sum(first * np.float32(LEFT_BY_DIGIT[self.bits]) > last, -1, jnp.int32)
        if self.ranking == "none":
            doubled = jnp.zeros_like(doubled)
        rank, _ = _owners(doubled, pairs)
        pair = jnp.take_along_axis(order, rank, axis=-1)
        return DigitLayout(jnp.concatenate([pair, pair + pairs], axis=-1), doubled)

    def _decoded(self, payload: TiledPayload) -> jax.Array:
        """f32[128, heads, head_dim]: of slots."""
        codes = tiles.unpack(payload.words, self.bits, payload.scale.shape[-1])
        return self._codebook.decode(codes) * as_float32(payload.scale)[None]

    def _turned(self, mean: jax.Array, tokens: int, context: Context) -> jax.Array:
        """f32[tokens, heads, head_dim]: the means f32[heads, head_dim] where the tokens are."""
        means, angles = jnp.broadcast_to(mean[None], (tokens, *mean.shape)), self._angles(context)
        return means if angles is None else _rotated(means, angles)

    def _angles(self, context: Context) -> RotaryAngles | None:
        """By how much means are turned."""
        if not self.turning or context.rotary is None:
            return None
        if isinstance(context.rotary, RotaryAngles):
            return context.rotary
        return context.rotary.at(context.positions)

    def _digits(self, layout: DigitLayout) -> tuple[jax.Array, jax.Array]:
        """bool[heads, head_dim, 1] each: whether the channel of a slot has two digits, and whether
        the slot holds the upper one."""
        rank, upper = _owners(layout.doubled, layout.channel.shape[-1] // 2)
        both = lambda a: jnp.concatenate([a, a], axis=-1)[..., None]
        return both(rank < layout.doubled[:, None]), both(upper)

    @property
    def _codebook(self) -> Codebook:
        return centred_integers(self.bits)


def _owners(doubled: jax.Array, pairs: int) -> tuple[jax.Array, jax.Array]:
    """[heads, pairs] each: i32, the rank of the pair whose digit a slot holds; bool, whether that
    is an upper one. See `DigitLayout`."""
    rank = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32), (len(doubled), pairs))
    upper = rank >= pairs - doubled[:, None]
    return jnp.where(upper, pairs - 1 - rank, rank), upper


def _rotated(x: jax.Array, angles: RotaryAngles) -> jax.Array:
    """As `angles(x)`, with the same bits in every program."""
    cos, sin, half = angles.cos * angles.factor, angles.sin * angles.factor, angles.cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = (
        rounded(first * cos) - rounded(second * sin),
        rounded(second * cos) + rounded(first * sin),
    )
    return jnp.concatenate([first, second, rest], axis=-1)


def _best_step(x: jax.Array, top: jax.Array, finite: jax.Array) -> jax.Array:
    """f32[heads, slots, 1], numbers of float16: that of least error, of those in `CLIPS`.

    Levels are at -top, -top + 1, ... top, times the step.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.minimum(largest, np.float32(jnp.finfo(jnp.float16).max))
    best, least = jnp.zeros_like(largest), jnp.full_like(largest, jnp.nan)
    for clip in CLIPS:
        step = store(divide_or_zero(largest * np.float32(clip), top), finite, np.dtype(np.float16))
        step = step.astype(jnp.float32)
        wrong = x - rounded(step * (_code(x, step, top) - top))
        error = pairwise_sum(rounded(jnp.square(wrong)), -1)
        better = ~(error >= least)  # than NaN, everything is
        best, least = jnp.where(better, step, best), jnp.where(better, error, least)
    return best


def _code(x: jax.Array, step: jax.Array, top: jax.Array) -> jax.Array:
    """f32, whole numbers 0 .. 2 top; an arbitrary one where the step is NaN."""
    code = jnp.round(divide_or_zero(x, step) + top)
    return jnp.where(jnp.isnan(code), np.float32(0), jnp.clip(code, 0, 2 * top))
