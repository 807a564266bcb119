"""Attention over the body of a cache, which stays encoded: no decoded copy of it ever exists."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.cache import LayerCache
from nqkv_jax.pallas_kernels import decode_attention as kernels
from nqkv_jax.partial import (
    GPUS,
    ONCE_BYTES,
    STEP_BYTES,
    TILE,
    Partial,
    attend_tokens,
    visible,
)
from nqkv_jax.quantizers.base import Context, Payload
from nqkv_jax.rotary import Rotary, RotaryAngles
from nqkv_jax.side import Side

LOOK_UP_TILES = 8  # of vectors, that are prepared and looked up at a time


def slice_groups(side: Side, first: jax.Array, count: int) -> Payload:
    """The payload of groups first + [0, count); `first` is i32[] or i32[B]."""

    def cut(body, first, axis=0):
        part = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=axis)
        return jax.tree.map(part, body)

    def in_turn(body, first):
        def one(i):
            at = lambda a: [i, first[i], *[jnp.zeros_like(i)] * (a.ndim - 2)]
            part = lambda a: jax.lax.dynamic_slice(a, at(a), (1, count, *a.shape[2:]))[0]
            return jax.tree.map(part, body)

        return jax.lax.map(one, jnp.arange(first.shape[0], dtype=first.dtype))

    if not first.ndim:
        return cut(side.body, first, axis=1)
    # All at once they are a gather, for which a TPU would bring whole bodies into another layout.
    return jax.lax.platform_dependent(side.body, first, tpu=in_turn, default=jax.vmap(cut))


def decode_groups(
    side: Side,
    payload: Payload,
    first: jax.Array,
    *,
    rotary: Rotary | None,
    angles: RotaryAngles | None = None,
    dtype,
    folded: bool,
) -> jax.Array:
    """Decodes what `slice_groups` returned: [B, count * group, Hkv, D].

    `angles` are those of the tokens, if the caller has them and `first` is i32[].
    """
    quantizer, group = side.quantizer, side.quantizer.group
    decode = quantizer.dequantize_folded if folded else quantizer.dequantize
    count = jax.tree.leaves(payload)[0].shape[1]

    def sequence(payload, state, first):
        positions = side.num_sinks + side.counted(first * group + jnp.arange(count * group))
        rotation = angles
        if rotary is not None and angles is None:
            rotation = rotary.at(positions)

        def one(payload, positions, rotation):
            context = Context(positions=positions, rotary=rotation, state=state)
            return decode(payload, context, dtype)

        split = lambda a: a.reshape(count, group, *a.shape[1:])
        x = jax.vmap(one)(payload, split(positions), jax.tree.map(split, rotation))
        return x.reshape(count * group, *x.shape[2:])

    in_axes = (0, 0, 0 if first.ndim else None)
    return jax.vmap(sequence, in_axes=in_axes)(payload, side.state, first)


def attend_body(
    q: jax.Array,
    layer: LayerCache,
    tokens: jax.Array,
    query_positions: jax.Array,
    rotary: Rotary | None,
    window: int | None,
    soft_cap: float | None = None,
    implementation: str = "auto",
) -> Partial:
    """Attention over the first `tokens` i32[B] encoded tokens; those are encoded on both sides.

    By a fused kernel where the platform has one, a query is one token and both sides are in tiles;
    else step by step, decoding some of the tokens at a time, on GPUs many.

    Raises: NotImplementedError if `implementation` names a kernel that cannot serve the case.
    """
    key, value = layer.key, layer.value
    group = math.lcm(key.quantizer.group, value.quantizer.group)
    capacity = min(key.capacity, value.capacity) // group * group
    if not capacity:
        return Partial.empty(q)

    heads_last = lambda a: jnp.moveaxis(a, 0, -2)  # [Hkv, G, S, D] <-> [G, S, Hkv, D]
    heads_first = lambda a: jnp.moveaxis(a, -2, 0)

    def fold(q, state):
        q, shift = key.quantizer.fold_queries(heads_last(q), Context(rotary=rotary, state=state))
        return heads_first(q), None if shift is None else jnp.moveaxis(shift, -1, 0)

    def unfold(out, state):
        return heads_first(value.quantizer.unfold_output(heads_last(out), Context(state=state)))

    folded, shift = jax.vmap(fold)(q, key.state)
    walk = lambda large: functools.partial(
        _walk_body, rotary=rotary, window=window, soft_cap=soft_cap, capacity=capacity,
        **_steps(folded, group, capacity, large),
    )  # fmt: skip
    arguments = (folded, shift, layer, tokens, query_positions)
    codes = jax.eval_shape(lambda: _tiled_codes(layer, rotary))
    # Kernels leave a shift of all scores to the maximum, which a cap does not.
    apart = soft_cap is None or shift is None
    unsupported = functools.partial(
        _unsupported, layer=layer, codes=codes, queries=q.shape[2:4], apart=apart
    )
    fused = functools.partial(_fused, rotary=rotary, window=window, soft_cap=soft_cap)
    default, by_platform = walk(large=False), dict.fromkeys(GPUS, walk(large=True))
    if q.shape[3] == 1 and apart and all(isinstance(s, kernels.VectorCodes) for s in codes):
        width = codes[1].head_dim
        default = functools.partial(
            _look_up, rotary=rotary, window=window, soft_cap=soft_cap, width=width
        )
        by_platform = {}
    if implementation in kernels.KERNELS:
        if reason := unsupported(implementation):
            raise NotImplementedError(f"attend: {implementation} needs {reason}")
        partial = fused(implementation, *arguments)
    else:
        if implementation == "auto":
            by_platform |= {
                platform: functools.partial(fused, name)
                for name, platform in kernels.PLATFORMS.items()
                if unsupported(name) is None
            }
        partial = jax.lax.platform_dependent(*arguments, **by_platform, default=default)
    out = jax.vmap(unfold)(partial.output(), value.state)
    return dataclasses.replace(partial, numerator=out * partial.denominator[..., None])


def _tiled_codes(
    layer: LayerCache, rotary: Rotary | None, part: tuple[jax.Array, int] | None = None
) -> list:
    """Keys and values as kernels read them; None for what is not in tiles.

    Args:  part: the first i32[] of the tiles that are wanted, and how many; None for all.
    """

    def of(side, rotary):
        body, first, count = side.body, 0, side.num_groups
        if part is not None:
            first, count = part
            body = slice_groups(side, first, count)
        group = side.quantizer.group
        positions = side.num_sinks + first * group + jnp.arange(count * group)
        return side.quantizer.tiled_codes(body, Context(positions=positions, rotary=rotary))

    return [of(layer.key, rotary), of(layer.value, None)]


def _unsupported(
    kernel: str, layer: LayerCache, codes: list, queries: tuple[int, int], apart: bool
) -> str | None:
    """What a kernel would need to serve this body, or None if it can.

    `codes` are the body's, `queries` the query heads per KV head and the queries per sequence;
    `apart` says that no shift of scores comes before a cap.
    """
    (key, value), (group, tokens) = codes, queries
    if key is None or value is None:
        return (
            "keys and values in tiles of 128 tokens (for example nqkv, with max_len a multiple of "
            f"128, or 2,048 and more); got {type(layer.key.quantizer).__name__} and "
            f"{type(layer.value.quantizer).__name__}"
        )
    if tokens > 1:
        return f"one query per sequence; got {tokens}"
    if not apart:
        return "no soft_cap where means of keys that RoPE does not turn shift the scores"
    return kernels.unsupported(kernel, key, value, group)


def _fused(
    kernel: str,
    folded: jax.Array,
    shift: jax.Array | None,
    layer: LayerCache,
    tokens: jax.Array,
    query_positions: jax.Array,
    *,
    rotary: Rotary | None,
    window: int | None,
    soft_cap: float | None,
    part: tuple[jax.Array, int] | None = None,
    fresh: jax.Array | None = None,
) -> Partial:
    """Like `_walk_body`, by a kernel.

    Over all tiles; or over a part of them (see `_tiled_codes`), tokens from `fresh` i32[] on.
    """
    first = None
    if window is not None:
        first = query_positions[:, 0] - window + 1 - layer.key.num_sinks
    if part is not None:
        begin = part[0] * tiles.TOKENS
        first = jnp.maximum(fresh if first is None else jnp.maximum(first, fresh), begin)
        first = jnp.broadcast_to(first - begin, tokens.shape)
        tokens = jnp.clip(tokens - begin, 0, part[1] * tiles.TOKENS)
    key, value = _tiled_codes(layer, rotary, part)
    numerator, denominator, maximum = kernels.decode_attention(
        folded[..., 0, :], key, value, tokens, first=first, soft_cap=soft_cap, implementation=kernel
    )
    if shift is not None:
        maximum = maximum + shift[..., 0]
    parts = dict(numerator=numerator, denominator=denominator, maximum=maximum)
    return Partial(**{name: jnp.expand_dims(a, 3) for name, a in parts.items()})


def _look_up(
    folded: jax.Array,
    shift: jax.Array | None,
    layer: LayerCache,
    tokens: jax.Array,
    query_positions: jax.Array,
    *,
    rotary: Rotary | None,
    window: int | None,
    soft_cap: float | None,
    width: int,
) -> Partial:
    """Like `_walk_body`, for vectors, of which nothing is decoded, or less; `width` is of values.

    In steps, so that norms and means are prepared of what is there, and not of all there is room
    for.
    """
    num_tiles = min(layer.key.num_groups, layer.value.num_groups)
    size = min(LOOK_UP_TILES, num_tiles)
    step_tokens = size * tiles.TOKENS

    def step(i, partial):
        # The last step is moved back to fit; what an earlier one has seen is not seen again.
        begin = jnp.minimum(i * size, num_tiles - size)
        found = _fused(
            "xla", folded, shift, layer, tokens, query_positions, rotary=rotary, window=window,
            soft_cap=soft_cap, part=(begin, size), fresh=i * step_tokens,
        )  # fmt: skip
        return partial.merge(found)

    oldest = 0 if window is None else jnp.min(query_positions) - window + 1 - layer.key.num_sinks
    first = jnp.maximum(oldest, 0) // step_tokens
    last = (jnp.max(tokens) + step_tokens - 1) // step_tokens
    return jax.lax.fori_loop(first, last, step, Partial.empty(folded, width))


def _steps(folded: jax.Array, group: int, capacity: int, large: bool) -> dict:
    """Static arguments of `_walk_body`."""
    tokens, once = TILE, False
    if large:
        batch, heads, count, queries, width = folded.shape
        token_bytes = batch * heads * (2 * width * folded.dtype.itemsize + 4 * count * queries)
        tokens, once = max(TILE, STEP_BYTES // token_bytes), capacity * token_bytes <= ONCE_BYTES
    tile = capacity if once else min(-(-tokens // group) * group, capacity)
    return dict(tile=tile, large=large, once=once)


@functools.partial(
    jax.jit, static_argnames=("window", "soft_cap", "capacity", "tile", "large", "once")
)
def _walk_body(
    folded: jax.Array,
    shift: jax.Array | None,
    layer: LayerCache,
    tokens: jax.Array,
    query_positions: jax.Array,
    *,
    rotary: Rotary | None,
    window: int | None,
    soft_cap: float | None,
    capacity: int,
    tile: int,
    large: bool,
    once: bool,
) -> Partial:
    """Attention over the body in steps of `tile` tokens, of folded queries and values.

    Traced once for all layers of a model. `large` steps are what GPUs have (`GPUS`), `once` is one.
    """
    key, value = layer.key, layer.value

    def begin(i):
        # The last tile is moved back to fit; what an earlier one has seen is masked out.
        return jnp.minimum(i * tile, capacity - tile)

    # Sines of where tiles begin and of the places in a tile, and a few products per token for the
    # rest. All sines are outside the loop: inside, XLA:CPU computes those of a tile's beginning for
    # each of its elements.
    if rotary is not None:
        starts = rotary.at(key.num_sinks + begin(jnp.arange(-(-capacity // tile))))
        offsets = rotary.at(jnp.arange(tile))

    def angles(i):
        if rotary is None:
            return None
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1, axis=0)
        return offsets.moved(jax.tree.map(cut, starts))

    def fetch(side, i):
        return slice_groups(side, begin(i) // side.quantizer.group, tile // side.quantizer.group)

    def one(i, keys, values):
        start = begin(i)
        decode = lambda side, payload: decode_groups(
            side,
            payload,
            start // side.quantizer.group,
            rotary=rotary,
            angles=angles(i),
            dtype=folded.dtype,
            folded=True,
        )
        token = start + jnp.arange(tile)
        valid = (token >= i * tile)[None] & (token[None] < tokens[:, None])
        positions = jnp.broadcast_to(token + key.num_sinks, valid.shape)
        mask = visible(query_positions, positions, valid, window)
        waves = key.quantizer.waves(Context(rotary=angles(i)), folded.dtype)
        return attend_tokens(
            folded, decode(key, keys), decode(value, values), mask, shift, waves, soft_cap=soft_cap
        )

    if once:
        return one(0, fetch(key, 0), fetch(value, 0))
    # Folded values may have another width than the model's.
    width = jax.eval_shape(lambda: one(0, fetch(key, 0), fetch(value, 0))).numerator.shape[-1]

    # The codes of the next tile are fetched while this one is decoded. That keeps XLA from fusing
    # the slice into the decoding, which takes five times as long on a CPU. The first fetch is in
    # the loop too, in a round without decoding: outside it would be fused with the append, and copy
    # the cache.
    def step(i, carry):
        partial, keys, values = carry
        partial = jax.lax.cond(
            i >= first, lambda: partial.merge(one(i, keys, values)), lambda: partial
        )
        return partial, fetch(key, i + 1), fetch(value, i + 1)

    # Only tiles that some query of some sequence can see are read.
    oldest = 0 if window is None else jnp.min(query_positions) - window + 1 - key.num_sinks
    first = jnp.maximum(oldest, 0) // tile
    last = (jnp.max(tokens) + tile - 1) // tile
    if large:
        step = lambda i, partial: partial.merge(one(i, fetch(key, i), fetch(value, i)))
        return jax.lax.fori_loop(first, last, step, Partial.empty(folded, width))
    nothing = lambda side: jax.tree.map(jnp.zeros_like, jax.eval_shape(fetch, side, first))
    carry = (Partial.empty(folded, width), nothing(key), nothing(value))
    return jax.lax.fori_loop(first - 1, last, step, carry)[0]
