"""`attend`: append, then attention over sinks | body | residual; the one call that a model needs.

Scores, softmax and sums are float32. Every segment contributes a `Partial`; they merge exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax import arguments
from nqkv_jax.body import attend_body, decode_groups, slice_groups
from nqkv_jax.cache import KVCache
from nqkv_jax.pallas_kernels import exact_attention, triton_backend
from nqkv_jax.pallas_kernels.exact_attention import Slots
from nqkv_jax.partial import Partial, attend_new, attend_tokens
from nqkv_jax.prefill import attend_prompt
from nqkv_jax.rotary import Rotary
from nqkv_jax.side import Side


def _read_exact(
    side: Side,
    other: Side,
    token: jax.Array,
    first: jax.Array,
    encoded: jax.Array,
    rotary: Rotary | None,
    dtype,
) -> jax.Array:
    """Sinks, then body tokens token[b]: [B, num_sinks + size, Hkv, D], decoded below encoded[b],
    else as they are, and rotated by `rotary`.

    The tokens are first[b] + [0, size), each at its number modulo size.
    """
    size, slots, num_sinks = token.shape[1], side.slots, side.num_sinks
    join = lambda sinks, tail: jnp.concatenate([sinks, tail], axis=1)
    x = side.exact
    if slots < size:
        tail = jnp.zeros((*token.shape, *x.shape[2:]), x.dtype)
        if slots:
            tail = jax.vmap(lambda ring, t: ring[t % slots])(side.residual, token)
        x = join(side.sinks, tail)
    if rotary is not None:
        x = rotary(x, _positions(token, num_sinks))
    x = x.astype(dtype)
    # With one window for both sides `first` is where the residual begins; else this side may be
    # ahead.
    ahead = side.window != other.window and side.window.leads(other.window)
    if ahead and side.num_groups:
        decoded, start = _decode_ahead(side, first, size, rotary, dtype)
        index = jnp.clip(token - start[:, None], 0, decoded.shape[1] - 1)
        decoded = jax.vmap(lambda rows, i: rows[i])(decoded, index)
        tail = jnp.where((token < encoded[:, None])[:, :, None, None], decoded, x[:, num_sinks:])
        x = join(x[:, :num_sinks], tail)
    return x


def _decode_ahead(
    side: Side, first: jax.Array, size: int, rotary: Rotary | None, dtype
) -> tuple[jax.Array, jax.Array]:
    """Body tokens from start i32[B] on, [B, n, Hkv, D], with first[b] + [0, size) among them as far
    as they are there; and `start`."""
    group = side.quantizer.group
    count = min(-(-(size - 1) // group) + 1, side.num_groups)  # that have some of `size` tokens
    decode = functools.partial(decode_groups, side, rotary=rotary, dtype=dtype, folded=False)
    if not side.ring:
        start = jnp.minimum(first // group, side.num_groups - count)
        return decode(slice_groups(side, start, count), start), start * group
    # Where the ring ends it goes on at its beginning.
    start = first // group
    each = [slice_groups(side, (start + i) % side.num_groups, 1) for i in range(count)]
    payload = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *each)
    decoded, start = decode(payload, start), start * group
    if rotary is not None:
        token = start[:, None] + jnp.arange(decoded.shape[1])[None]
        decoded = rotary.rest()(decoded, token - side.counted(token))
    return decoded, start


def _positions(token: jax.Array, num_sinks: int) -> jax.Array:
    """i32[B, num_sinks + size], of sinks and of body tokens i32[B, size]."""
    sinks = jnp.broadcast_to(jnp.arange(num_sinks), (token.shape[0], num_sinks))
    return jnp.concatenate([sinks, token + num_sinks], axis=1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache=None,
    *,
    layer: int = 0,
    rotary: Rotary | None = None,
    num_new: jax.Array | None = None,
    window: int | None = None,
    scale: float | jax.Array | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Appends the new tokens to the cache and attends to everything that they may see.

    With one new token per sequence (decoding) every token is seen as the scheme stores it: schemes
    without a residual encode the new token first, the others keep it in full precision. With more
    (a prompt, or a chunk of one) the new tokens see each other in full precision, as in the papers,
    and earlier chunks through the cache.

    Args:
      q, k, v: [B, S, Hq, D] and twice [B, S, Hkv, D], float, keys and queries *before* RoPE.
      cache: a `KVCache`, None for plain causal attention, or an object with a method `attend` that
        takes its place, such as `DecodedView`.
      layer: index of the layer in the cache.
      rotary: how to rotate q and k; None for models without RoPE.
      num_new: i32[B], how many of the S tokens are valid (right-padded); None for all. Clipped to
        0 .. S.
      window: attend to the latest `window` tokens only, the current one included. Layers of a cache
        that was made with `windows` (`Scheme.init`) need theirs, or a smaller one.
      scale: of the scores, a number > 0; may be a traced array of shape (). Default D ** -0.5.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2); None for no cap.
      implementation: of decoding, when there is one token; for this call, in place of that of the
        cache (`KVCache.with_implementation`, which describes them).

    Returns:
      [B, S, Hq, D] in the dtype of q, and the cache with the new tokens.

    Raises:
      ValueError: an argument has the wrong type or value, or does not fit the others; says what
        was expected.
      NotImplementedError: the kernel that was asked for cannot serve the case; says why.
    """
    if num_new is not None:
        num_new = jnp.asarray(num_new)
    layer, window, scale, soft_cap = arguments.check(
        q, k, v, cache, layer=layer, rotary=rotary, num_new=num_new, window=window, scale=scale,
        soft_cap=soft_cap, implementation=implementation,
    )  # fmt: skip
    q, k, v = map(jnp.asarray, (q, k, v))
    usual = None
    if implementation is not None and isinstance(cache, KVCache):
        usual = cache.layers[layer].implementation
        cache = _with_implementation(cache, layer, implementation)
    batch, size, num_heads, head_dim = q.shape
    num_kv_heads, dtype = k.shape[2], q.dtype
    if dtype == jnp.float64:
        q = q.astype(jnp.float32)
    if num_new is None:
        num_new = jnp.full(batch, size, jnp.int32)
    else:
        num_new = jnp.clip(num_new, 0, size).astype(jnp.int32)
    if isinstance(cache, KVCache):
        positions = cache.layers[layer].lengths[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    else:
        positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
    grouped = (batch, size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    unrotated = q.reshape(grouped)

    def turned(positions):
        """The queries, as if they were there: to be observed, and to be multiplied with keys."""
        queries = q if rotary is None else rotary(q, positions)
        # Scaled before the product: in float16 the unscaled score can overflow. By a float32, as
        # what bfloat16 makes of 1/12 would be an error of all scores alike.
        factor = jnp.asarray(head_dim**-0.5 if scale is None else scale, jnp.float32)
        scaled = (queries.astype(jnp.float32) * factor).astype(q.dtype)
        return queries.reshape(grouped), scaled.reshape(grouped).transpose(0, 2, 3, 1, 4)

    if isinstance(cache, KVCache):
        out, cache = _attend_cache(
            turned, unrotated, k, v, cache, layer, positions, num_new, rotary, window, soft_cap
        )
        if usual is not None:
            cache = _with_implementation(cache, layer, usual)
    elif cache is None:
        k = k if rotary is None else rotary(k, positions)
        valid = jnp.arange(size)[None] < num_new[:, None]
        out = attend_new(turned(positions)[1], k, v, positions, valid, window, soft_cap)
    else:
        out, cache = cache.attend(
            turned(positions)[1], k, v, unrotated,
            layer=layer, rotary=rotary, window=window, soft_cap=soft_cap,
        )  # fmt: skip
    out = out.output().transpose(0, 3, 1, 2, 4).reshape(batch, size, num_heads, head_dim)
    return out.astype(dtype), cache


def _with_implementation(cache: KVCache, layer: int, implementation: str) -> KVCache:
    """`cache` with another implementation in one layer."""
    layers = list(cache.layers)
    layers[layer] = layers[layer].with_implementation(implementation)
    return dataclasses.replace(cache, layers=tuple(layers))


def _attend_cache(
    turned, unrotated, k, v, cache: KVCache, index: int, query_positions, num_new, rotary, window,
    soft_cap,
) -> tuple[Partial, KVCache]:  # fmt: skip
    """`turned` gives the queries at positions i32[B, S]: rotated [B, S, Hkv, G, D], and scaled
    [B, Hkv, G, S, D]. k, v and `unrotated` are as the model made them.
    """
    layer = cache.layers[index]
    observed, q = turned(query_positions)
    if layer.key.rotates:
        num_sinks = layer.key.num_sinks
        observed, _ = turned(layer.key.counted(query_positions - num_sinks) + num_sinks)
    elif not layer.rotated:
        observed = unrotated
    size, before, implementation = q.shape[3], layer.lengths, layer.implementation
    if size > 1 and implementation != "xla":
        implementation = "auto"  # the kernels that have a name are for single queries
    if rotary is not None and layer.rotated:
        k = rotary(k, query_positions)
    # What the cache will hold is what attention sees, from the first token on.
    k, v = k.astype(layer.dtype), v.astype(layer.dtype)
    queries = observed if layer.wants_queries else None
    cache = cache.append(index, k, v, num_new, rotary, queries)
    updated = cache.layers[index]
    decoding = size == 1
    # The residual is read after the append when decoding (it holds the new token, and still holds
    # what was flushed just now), and before it otherwise (many new tokens overwrite the ring).
    source, length = (updated, updated.lengths) if decoding else (layer, before)
    encoded = lambda side: side.encoded(length if side.window.immediate else before)
    key_encoded, value_encoded = encoded(layer.key), encoded(layer.value)
    common = jnp.minimum(key_encoded, value_encoded)

    # Sinks and residual are one segment. The residual is in the order of its slots, so that it is
    # read as it lies.
    partial, key, value = Partial.empty(q), source.key, source.value
    tail = max(key.slots, value.slots)
    if key.num_sinks + tail:
        begin = common[:, None]
        token = begin + (jnp.arange(tail)[None] - begin) % max(tail, 1)
        unrotated = None if layer.rotated else rotary
        keys = _read_exact(key, value, token, common, key_encoded, unrotated, q.dtype)
        values = _read_exact(value, key, token, common, value_encoded, None, q.dtype)
        slots = Slots(num_sinks=key.num_sinks, ring=tail, window=window)
        partial = _attend_exact(
            q, keys, values, common, length, query_positions, slots, soft_cap, implementation
        )
    if not decoding:
        fresh = k if rotary is None or layer.rotated else rotary(k, query_positions)
        ok = jnp.arange(size)[None] < num_new[:, None]
        new = attend_prompt(
            q, fresh.astype(q.dtype), v.astype(q.dtype), query_positions, ok, window, soft_cap,
            implementation,
        )  # fmt: skip
        partial = partial.merge(new)
    body = functools.partial(
        attend_body, rotary=rotary, window=window, soft_cap=soft_cap, implementation=implementation
    )
    if layer.window is None:
        # The body is read from the updated cache: an append never changes what is encoded, and
        # reading the old one would keep two copies alive.
        return partial.merge(body(q, updated, common, query_positions)), cache
    # A ring has what is left of one round, and what has come of the next. Seen from where either
    # began, it is an ordinary body, whose other tokens no query can see.
    capacity = layer.key.capacity
    latest = jnp.maximum(common - 1, 0) // capacity * capacity
    for began, tokens in (
        (latest - capacity, jnp.minimum(latest, capacity)),
        (latest, common - latest),
    ):
        positions = query_positions - began[:, None]
        _, there = turned(positions)
        partial = partial.merge(body(there, source, tokens, positions))
    return partial, cache


def _attend_exact(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    length: jax.Array,
    query_positions: jax.Array,
    slots: Slots,
    soft_cap: float | None,
    implementation: str,
) -> Partial:
    """Attention over sinks and residual; see `exact_attention`, of which this is the general form:
    for queries [B, Hkv, G, S, D] at query_positions i32[B, S]."""

    def by_xla(q, keys, values, first, length, query_positions):
        slot = jnp.arange(keys.shape[1])[None, None]
        of_sequence = (a[:, None, None] for a in (first, length))
        mask = slots.seen(slot, *of_sequence, query_positions[:, :, None])
        return attend_tokens(q, keys, values, mask, soft_cap=soft_cap)

    def by_kernel(q, keys, values, first, length, query_positions):
        numbers = first, length, query_positions[:, 0]
        found = exact_attention.exact_attention(
            q[..., 0, :], keys, values, *numbers, slots, soft_cap=soft_cap
        )
        names = "numerator", "denominator", "maximum"
        return Partial(**{n: jnp.expand_dims(a, 3) for n, a in zip(names, found, strict=True)})

    served = q.shape[3] == 1 and exact_attention.unsupported(q, keys) is None
    served = served and implementation in triton_backend.ASKING
    by_platform = dict.fromkeys(exact_attention.PLATFORMS if served else (), by_kernel)
    arguments = q, keys, values, first, length, query_positions
    if not by_platform:
        return by_xla(*arguments)
    return jax.lax.platform_dependent(*arguments, **by_platform, default=by_xla)
