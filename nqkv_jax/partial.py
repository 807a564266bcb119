"""Softmax attention over some of the tokens, in a form that merges with attention over others.

Source: Dao et al. (2022), FlashAttention, algorithm 1 (online softmax).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Tokens that are seen at a time. At 1,024 cached tokens on two CPU cores, against 128 and 512:
# `nqkv` takes 0.86 and 1.24 of the time, `none` 1.02 and 0.67.
TILE = 256
# Here the host begins every round of a loop whose end it does not know, after waiting for the one
# before. So steps are as large as decoded tokens and scores of so many bytes; and what is less
# than the second, smaller number is one step over all there is room for, without a loop. Not
# measured.
GPUS = ("cuda",)
STEP_BYTES, ONCE_BYTES = 2**26, 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial:
    """Softmax attention over some of the tokens: the output is numerator / denominator.

    numerator f32[B, Hkv, G, S, D] and denominator f32[B, Hkv, G, S] are relative to exp(maximum);
    maximum f32[B, Hkv, G, S] is -inf where no token was seen.
    """

    numerator: jax.Array
    denominator: jax.Array
    maximum: jax.Array

    @classmethod
    def empty(cls, q: jax.Array, width: int | None = None) -> "Partial":
        """Over no token, for queries [B, Hkv, G, S, D] and values of `width` (default: D)."""
        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        numerator = jnp.zeros((*q.shape[:-1], width or q.shape[-1]), jnp.float32)
        return cls(numerator=numerator, denominator=zeros, maximum=zeros - jnp.inf)

    def merge(self, other: "Partial") -> "Partial":
        maximum = jnp.maximum(self.maximum, other.maximum)
        # -inf - -inf would be NaN; where nothing was seen the weights are 0 whatever is subtracted.
        base = jnp.where(maximum == -jnp.inf, 0, maximum)
        a, b = jnp.exp(self.maximum - base), jnp.exp(other.maximum - base)
        return Partial(
            numerator=a[..., None] * self.numerator + b[..., None] * other.numerator,
            denominator=a * self.denominator + b * other.denominator,
            maximum=maximum,
        )

    def output(self) -> jax.Array:
        """f32[B, Hkv, G, S, D]; 0 for a query that sees no token. NaN stays NaN."""
        nothing = self.denominator == 0
        return self.numerator / jnp.where(nothing, 1, self.denominator)[..., None]


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap); None for no cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def in_steps(attend: Callable, *arguments, tiles: int, tile_bytes: int):
    """attend(*arguments, tiles_of_step=...): of `tiles`, and on GPUs of as many more as steps take,
    where one is decoded to so many bytes."""
    by = lambda count: functools.partial(attend, tiles_of_step=count)
    large = dict.fromkeys(GPUS, by(max(tiles, STEP_BYTES // tile_bytes)))
    return jax.lax.platform_dependent(*arguments, **large, default=by(tiles))


def attend_tokens(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    shift: jax.Array | None = None,
    waves: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
) -> Partial:
    """Attention of q [B, Hkv, G, S, D], scaled, over k, v [B, T, Hkv, D] where mask [B, S, T].

    `shift` f32[B, Hkv, G, S] is added to scores, before `soft_cap` (see `capped`). `waves` [T, C]
    are more channels of keys, alike for all sequences and heads; q has C more, too.
    """
    if waves is not None:
        q, more = jnp.split(q, [q.shape[-1] - waves.shape[-1]], axis=-1)
    if q.shape[3] == 1:
        # The same product with the keys as left operand, which need not be transposed then: for one
        # query per head XLA:CPU is up to twice as fast.
        scores = jnp.einsum("bthd,bhgsd->bhtgs", k, q, preferred_element_type=jnp.float32)
        scores = jnp.moveaxis(scores, 2, -1)
    else:
        scores = jnp.einsum("bhgsd,bthd->bhgst", q, k, preferred_element_type=jnp.float32)
    if waves is not None:
        scores = scores + jnp.einsum(
            "bhgsc,tc->bhgst", more, waves, preferred_element_type=jnp.float32
        )
    if shift is not None:
        scores = scores + shift[..., None]
    scores = jnp.where(mask[:, None, None], capped(scores, soft_cap), -jnp.inf)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(maximum == -jnp.inf, 0, maximum)[..., None])
    return Partial(
        numerator=mix(weights, v, mask), denominator=jnp.sum(weights, axis=-1), maximum=maximum
    )


def mix(weights: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """sum_t weights * v, f32[B, Hkv, G, S, D], for v [B, T, Hkv, D] and mask [B, S, T].

    With v [B, T, 1, D] all heads share what a token has.

    Tokens outside the mask have weight 0, but could be NaN, and 0 * NaN is not 0: a NaN or infinite
    value reaches those queries that see it, and no others.
    """
    shared = v.shape[2] < weights.shape[1]
    values = "btod" if shared else "bthd"  # o: the one head that there is
    product = lambda v: jnp.einsum(
        f"bhgst,{values}->bhgsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    if mask.shape[1] == 1:
        return product(jnp.where(mask[:, 0, :, None, None], v, 0))
    finite = jnp.all(jnp.isfinite(v), axis=-1, keepdims=True)  # [B, T, Hkv, 1]
    broken = jnp.einsum("bst,bth->bhs", mask.astype(v.dtype), (~finite[..., 0]).astype(v.dtype))
    return jnp.where((broken > 0)[:, :, None, :, None], jnp.nan, product(jnp.where(finite, v, 0)))


def visible(
    query_positions: jax.Array, positions: jax.Array, valid: jax.Array, window: int | None
) -> jax.Array:
    """bool[B, S, T]: causal, inside the sliding window, and valid.

    query_positions i32[B, S], positions i32[B, T], valid bool[B, T].
    """
    distance = query_positions[:, :, None] - positions[:, None, :]
    mask = (distance >= 0) & valid[:, None, :]
    return mask if window is None else mask & (distance < window)


def _walk(steps, q: jax.Array, tile) -> Partial:
    """Merges tile(0) ... tile(steps - 1)."""
    if isinstance(steps, int) and steps == 1:
        return tile(0)
    return jax.lax.fori_loop(0, steps, lambda i, p: p.merge(tile(i)), Partial.empty(q))


def attend_new(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    valid: jax.Array,
    window: int | None,
    soft_cap: float | None = None,
) -> Partial:
    """Causal attention among new tokens as they are; k, v [B, S, Hkv, D], valid bool[B, S]."""
    size = k.shape[1]
    tile = min(2 * TILE, size)

    def one(i):
        # The last tile is moved back to fit; what an earlier one has seen is masked out.
        start = jnp.minimum(i * tile, size - tile)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, tile, axis=1)
        fresh = start + jnp.arange(tile) >= i * tile
        return attend_tokens(
            q,
            cut(k),
            cut(v),
            visible(query_positions, cut(query_positions), cut(valid) & fresh[None], window),
            soft_cap=soft_cap,
        )

    return _walk(-(-size // tile), q, one)
