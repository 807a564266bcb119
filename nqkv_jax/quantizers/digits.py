"""Ranked keys that a fused kernel reads like any others: widths of whole digits.

A uniform code of n b bits is n digits of b bits, and the number that it stands for is their sum
with the weights 1, 2^b, 4^b ... So a channel of n digits is n channels of one digit, with scales in
these proportions, all of which meet the channel's query. What is stored of a token is therefore an
ordinary tile of b-bit codes, evenly spaced, with a scale per channel and tile: its head_dim *slots*
hold the digits of the channels, two of those that queries see most, none of those that they see
least. Only the query, whose channels are picked for the slots, knows about it.

Scales are those of the least squared error among a few fractions of the largest magnitude.

Ranking and means are those of `ranked`; digits are ours.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import tiles
from nqkv_jax.codebooks import Codebook, centred_integers
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes, as_float32
from nqkv_jax.quantizers.base import Context, Payload
from nqkv_jax.quantizers.block import (
    check_group,
    divide_or_zero,
    pairwise_sum,
    rounded,
    store,
)
from nqkv_jax.quantizers.ranked import Ranking
from nqkv_jax.quantizers.tiled import TiledPayload

_STATIC = {"static": True}
# Of the largest magnitude, for the outermost level. Of 128 normal numbers the largest is about 2.7
# deviations, and the best outermost levels are at 1.5 for 2 bits, and at 2.5 for 4.
CLIPS = (0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 1.0)


def digits_by_rank(bits: int, head_dim: int) -> tuple[int, ...]:
    """Digits of each rank of the head_dim / 2 channel pairs, the most important first.

    A part 2^-bits of the pairs has two, as many have none, and the others one: the more bits a
    digit has, the less is to be gained.
    """
    pairs = head_dim // 2
    part = pairs >> bits
    return (2,) * part + (1,) * (pairs - 2 * part) + (0,) * part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DigitQuantizer(Ranking):
    """Keys in tiles of 128 tokens, each channel coded by no, one or several digits of `bits`.

    A head whose tile holds NaN or an infinity decodes to NaN in all coded channels of that tile.

    Attributes:
      bits: of a digit, 2, 3, 4 or 8.
      digits: per rank of a channel pair, decreasing, head_dim / 2 of them, 1 on average. A channel
        without any decodes to its mean.
      ranking: see `Ranking`.
    """

    bits: int = dataclasses.field(metadata=_STATIC)
    digits: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    ranking: str = dataclasses.field(default="queries", metadata=_STATIC)

    def __post_init__(self):
        if list(self.digits) != sorted(self.digits, reverse=True) or (
            not self.digits or self.digits[-1] < 0 or sum(self.digits) != len(self.digits)
        ):
            raise ValueError(
                "DigitQuantizer: digits must decrease, not be negative, and be 1 on average; got "
                f"{self.digits}"
            )
        if self.bits * self.digits[0] > 8:
            raise ValueError(
                "DigitQuantizer: a code must have at most 8 bits; got "
                f"{self.digits[0]} digits of {self.bits}"
            )
        self.check_ranking()

    @property
    def group(self) -> int:
        return tiles.TOKENS

    def check(self, heads: int, head_dim: int) -> None:
        if head_dim != 2 * len(self.digits):
            raise ValueError(
                f"DigitQuantizer: expected head_dim / 2 = {head_dim / 2:g} numbers of digits; got "
                f"{len(self.digits)}. digits_by_rank({self.bits}, {head_dim}) makes them"
            )
        tiles.check(head_dim, self.bits)

    def quantize(self, x: jax.Array, context: Context) -> TiledPayload:
        check_group("DigitQuantizer", x, self.group)
        self.check(*x.shape[1:])
        state = self.state(context)
        x = jnp.moveaxis(x.astype(jnp.float32) - state.mean[None], 0, -1)  # [heads, D, 128]
        finite = jnp.all(jnp.isfinite(x), axis=(1, 2), keepdims=True)
        # A channel is coded once for each of its slots, alike; each keeps a digit.
        x = jnp.take_along_axis(x, state.layout[..., None], axis=1)
        column = lambda a, dtype: jnp.asarray(a, dtype)[None, :, None]
        top, shift = column(self._slots.top, jnp.float32), self.bits * self._slots.place
        step = _best_step(x, top, finite)
        code = _code(x, step, top).astype(jnp.int32)
        digit = code >> jnp.broadcast_to(column(shift, jnp.int32), code.shape)
        digit = (digit & jnp.int32(2**self.bits - 1)).astype(jnp.uint8)
        scale = (step * column(2.0**shift, jnp.float32))[..., 0].astype(jnp.float16)
        return TiledPayload(
            words=tiles.pack(jnp.moveaxis(digit, -1, 0), self.bits),
            scale=jax.lax.bitcast_convert_type(scale, jnp.int16),
        )

    def dequantize(self, payload: TiledPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        state = self.state(context)
        slots = self.dequantize_folded(payload, context, jnp.float32)
        add = lambda zero, channels, x: zero.at[:, channels].add(x)
        per_head = jax.vmap(add, in_axes=(1, 0, 1), out_axes=1)
        x = per_head(jnp.zeros_like(slots), state.layout, slots)
        return (x + state.mean[None]).astype(dtype)

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        state = self.state(context)
        align = lambda a: jnp.broadcast_to(a, q.shape)
        shift = jnp.sum(q.astype(jnp.float32) * align(state.mean), axis=-1)
        return jnp.take_along_axis(q, align(state.layout), axis=-1), shift

    def dequantize_folded(
        self, payload: TiledPayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """[128, heads, head_dim]: digits, by their scales, in their slots."""
        codes = tiles.unpack(payload.words, self.bits, 2 * len(self.digits))
        return (self._codebook.decode(codes) * as_float32(payload.scale)[None]).astype(dtype)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes:
        return TiledCodes(
            words=body.words, scale=body.scale, codebook=self._codebook, per_channel=True
        )

    def lay_out(self, order: jax.Array) -> jax.Array:
        """The channel of each slot."""
        second = jnp.asarray(self._slots.second * np.int32(len(self.digits)))
        return order[:, self._slots.rank] + second[None]

    @property
    def _codebook(self) -> Codebook:
        return centred_integers(self.bits)

    @property
    def _slots(self) -> "_Slots":
        return _slots(self.bits, self.digits)


_FLOAT16 = np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Of each slot: rank of its pair, whether it is the pair's second channel, which of the
    channel's digits it holds, and the outermost level of the channel, in steps."""

    rank: np.ndarray
    second: np.ndarray
    place: np.ndarray
    top: np.ndarray


@functools.lru_cache
def _slots(bits: int, digits: tuple[int, ...]) -> _Slots:
    slots = [
        (rank, second, place, (2 ** (bits * count) - 1) / 2)
        for rank, count in enumerate(digits)
        for second in range(2)
        for place in range(count)
    ]
    rank, second, place, top = (np.array(column) for column in zip(*slots, strict=True))
    return _Slots(rank.astype(np.int32), second.astype(np.int32), place, top)


def _best_step(x: jax.Array, top: jax.Array, finite: jax.Array) -> jax.Array:
    """f32[heads, slots, 1], numbers of float16: that of least error, of those in `CLIPS`.

    Levels are at -top, -top + 1, ... top, times the step.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.minimum(largest, np.float32(jnp.finfo(jnp.float16).max))
    best, least = jnp.zeros_like(largest), jnp.full_like(largest, jnp.nan)
    for clip in CLIPS:
        step = store(divide_or_zero(largest * np.float32(clip), top), finite, _FLOAT16)
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
