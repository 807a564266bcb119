"""Keys per channel, with bits where queries will see the error.

Only <q, k> matters, so an error of channel i costs E[q_i^2] E[error_i^2], and at b bits the error
is about var(k_i) 4^-b. So channels are ranked by E[q_i^2] var(k_i), and each rank has its own
width: the classical bit allocation of transform coding, without a transform.

RoPE mixes the channels i and i + D/2, and the queries at one position meet keys of all others: both
channels of such a pair count the mean energy of the pair's queries, and share a rank.

Mean, variances and the queries' energies are taken from the first chunk of the sequence, after
which the ranking stays. Scales follow the tokens: one per channel and group.

Sources: Huang and Schultheiss (1963), Block quantization of correlated Gaussian random variables,
for the allocation; the ranking by queries and the widths per rank are ours.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import codebooks, packing
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import (
    check_group,
    divide,
    divide_or_zero,
    pairwise_sum,
    rounded,
    store,
)

_STATIC = {"static": True}


def widths_by_rank(bits: int, head_dim: int) -> tuple[int, ...]:
    """Bits of each rank of the head_dim / 2 channel pairs, the most important first; mean `bits`.

    An eighth of the pairs has two bits more, an eighth one more, a quarter one less, and a
    sixteenth two less: a fixed shape, so that all heads share one layout. Heads of less than 16
    channels have one width.
    """
    pairs = head_dim // 2
    more = pairs // 8
    if not more:
        return (bits,) * pairs
    less = pairs // 4 + (3 * more - pairs // 4) % 2  # what is saved must be what is spent
    least = (3 * more - less) // 2
    same = pairs - 2 * more - less - least
    counts = {bits + 2: more, bits + 1: more, bits: same, bits - 1: less, bits - 2: least}
    return tuple(width for width, count in counts.items() for _ in range(count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedState:
    """What is known of a sequence; `fitted` bool[] tells whether mean and ranks are final.

    energy f32[heads, head_dim] is the sum of squared queries; mean f32[heads, head_dim];
    layout is where channels are stored, as `Ranking.lay_out` says it.
    """

    energy: jax.Array
    mean: jax.Array
    layout: Any
    fitted: jax.Array


class Ranking(Quantizer):
    """What quantizers have in common that rank channel pairs: the state, and how it is found.

    Attributes:
      ranking: what pairs are ranked by: "queries" (times the variance of keys) or "variance".
        Quantizers may know more.
    """

    ranking: str

    def lay_out(self, importance: jax.Array) -> Any:
        """What `RankedState.layout` is to be, a pytree, for pairs of the importance
        f32[heads, head_dim / 2]. Done once per sequence, so that decoding has nothing to sort."""
        raise NotImplementedError

    def centre(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The means f32[heads, head_dim] of the first tokens f32[tokens, heads, head_dim], and what
        is to be coded of them without."""
        mean = token_mean(x)
        return mean[0], x - mean

    def check_ranking(self, *more: str) -> None:
        known = ("queries", "variance", *more)
        if self.ranking not in known:
            raise ValueError(
                f"{type(self).__name__}: ranking must be {' or '.join(known)}; got {self.ranking!r}"
            )

    @property
    def wants_queries(self) -> bool:
        return self.ranking == "queries"

    def init_state(self, heads: int, head_dim: int) -> RankedState:
        zeros = jnp.zeros((heads, head_dim), jnp.float32)
        return RankedState(
            energy=zeros,
            mean=zeros,
            layout=self.lay_out(jnp.zeros((heads, head_dim // 2), jnp.float32)),
            fitted=jnp.zeros((), jnp.bool_),
        )

    def observe_query(self, q: jax.Array, context: Context) -> RankedState:
        state = context.state
        return dataclasses.replace(
            state,
            energy=state.energy + pairwise_sum(rounded(jnp.square(q.astype(jnp.float32))), 1)[:, 0],
        )

    def observe(self, x: jax.Array, context: Context) -> RankedState:
        state, x = context.state, x.astype(jnp.float32)
        count = np.float32(x.shape[0])
        mean, coded = self.centre(x, context)
        importance = _pair_sums(divide(pairwise_sum(rounded(jnp.square(coded)), 0), count)[0])
        if self.wants_queries:
            importance = importance * _pair_sums(state.energy)
        found = mean, self.lay_out(importance)
        keep = lambda old, new: jnp.where(state.fitted, old, new)
        mean, layout = jax.tree.map(keep, (state.mean, state.layout), found)
        return dataclasses.replace(state, mean=mean, layout=layout, fitted=jnp.ones((), jnp.bool_))

    def state(self, context: Context) -> RankedState:
        """That of a sequence, without which nothing can be coded."""
        if isinstance(context.state, RankedState):
            return context.state
        raise ValueError(
            f"{type(self).__name__}: context.state must be what init_state and observe return, "
            f"because the ranks depend on the sequence; got {type(context.state).__name__}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedPayload:
    """One group: per width, codes u8[heads, channels, group * width / 8], packed along the tokens.

    scale f16[heads, channels]: of all channels that have a width, in the order of their slots.
    """

    codes: tuple[jax.Array, ...]
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankedQuantizer(Ranking):
    """Blocks of one channel over a group of tokens, signed-absmax scaled, cubic normal codes.

    A head whose group holds NaN or an infinity decodes to NaN in all coded channels of that group.

    Attributes:
      widths: bits per rank of a channel pair, decreasing, 0..6; head_dim / 2 of them. A channel of
        width 0 decodes to its mean.
      group_size: tokens per scale, a multiple of 8.
      ranking: what channels are ranked by: "queries" (times the variance of keys) or "variance".
    """

    widths: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    group_size: int = dataclasses.field(default=64, metadata=_STATIC)
    ranking: str = dataclasses.field(default="queries", metadata=_STATIC)

    def __post_init__(self):
        if list(self.widths) != sorted(self.widths, reverse=True) or not (
            self.widths and 0 <= self.widths[-1] <= self.widths[0] <= 6 and self.widths[0]
        ):
            raise ValueError(
                "RankedQuantizer: widths must decrease, be in 0..6, and not all be 0; got "
                f"{self.widths}"
            )
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(
                "RankedQuantizer: group_size must be a positive multiple of 8; got "
                f"{self.group_size}"
            )
        self.check_ranking()

    @property
    def group(self) -> int:
        return self.group_size

    def check(self, heads: int, head_dim: int) -> None:
        if head_dim != 2 * len(self.widths):
            raise ValueError(
                f"RankedQuantizer: expected head_dim / 2 = {head_dim / 2:g} widths; got "
                f"{len(self.widths)}. widths_by_rank(bits, {head_dim}) makes them"
            )

    def quantize(self, x: jax.Array, context: Context) -> RankedPayload:
        check_group("RankedQuantizer", x, self.group)
        self.check(*x.shape[1:])
        state = self.state(context)
        x = jnp.moveaxis(x.astype(jnp.float32) - state.mean[None], 0, -1)  # [heads, D, group]
        finite = jnp.all(jnp.isfinite(x), axis=(1, 2), keepdims=True)
        by_slot = jnp.take_along_axis(x, jnp.argsort(state.layout, axis=-1)[..., None], axis=1)
        codes, scales, at = [], [], 0
        for bits, pairs in self._segments():
            size = 2 * (pairs.stop - pairs.start)
            blocks = by_slot[:, at : at + size]
            at += size
            if not bits:
                continue
            low = jnp.min(blocks, axis=-1, keepdims=True)
            high = jnp.max(blocks, axis=-1, keepdims=True)
            scale = store(jnp.where(high >= -low, high, low), finite, np.dtype(np.float16))
            code = self._codebook(bits).encode(divide_or_zero(blocks, scale.astype(jnp.float32)))
            codes.append(packing.pack(code, bits))
            scales.append(scale[..., 0])
        return RankedPayload(codes=tuple(codes), scale=jnp.concatenate(scales, axis=-1))

    def dequantize(self, payload: RankedPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        heads = payload.scale.shape[0]
        parts, at, coded = [], 0, iter(payload.codes)
        for bits, pairs in self._segments():
            size = 2 * (pairs.stop - pairs.start)
            if not bits:
                parts.append(jnp.zeros((heads, size, self.group), jnp.float32))
                continue
            levels = self._codebook(bits).decode(packing.unpack(next(coded), bits, self.group))
            scale = payload.scale[:, at : at + size, None].astype(jnp.float32)
            parts.append(levels * scale)
            at += size
        by_slot = jnp.concatenate(parts, axis=1)  # [heads, D, group]
        state = self.state(context)
        x = jnp.take_along_axis(by_slot, state.layout[..., None], axis=1, mode="promise_in_bounds")
        x = x + state.mean[..., None]
        return jnp.moveaxis(x, -1, 0).astype(dtype)

    def lay_out(self, importance: jax.Array) -> jax.Array:
        """i32[heads, head_dim], the slot of each channel: per width the first, then the second
        channels of its pairs."""
        order, half = by_rank(importance), np.int32(importance.shape[-1])
        parts = [order[:, s] + offset for _, s in self._segments() for offset in (0, half)]
        return jnp.argsort(jnp.concatenate(parts, axis=-1), axis=-1).astype(jnp.int32)

    def _codebook(self, bits: int) -> codebooks.Codebook:
        if bits == 1:
            return codebooks.block_normal(1, self.group_size, signed=True)
        return codebooks.cubic_normal(bits, self.group_size, signed=True)

    def _segments(self) -> list[tuple[int, slice]]:
        """(width, the ranks that have it), widest first."""
        distinct = sorted(set(self.widths), reverse=True)
        first = [self.widths.index(bits) for bits in distinct] + [len(self.widths)]
        return [(b, slice(i, j)) for b, i, j in zip(distinct, first, first[1:], strict=False)]


def token_mean(x: jax.Array) -> jax.Array:
    """f32[1, heads, head_dim] of f32[tokens, heads, head_dim]."""
    return divide(pairwise_sum(x, 0), np.float32(x.shape[0]))


def by_rank(importance: jax.Array) -> jax.Array:
    """i32[heads, head_dim / 2]: the pair of each rank, the most important first."""
    return jnp.argsort(-importance, axis=-1).astype(jnp.int32)


def _pair_sums(x: jax.Array) -> jax.Array:
    """[heads, D] -> [heads, D / 2]: of the two channels that RoPE mixes."""
    half = x.shape[-1] // 2
    return x[:, :half] + x[:, half:]
