"""Attention over sinks | body | residual, and `attend`, the one call that a model needs.

Scores, softmax and sums are float32. Every segment contributes a numerator, a maximum and a
denominator (`Partial`), which merge exactly; this is also the contract of a fused kernel for the
body. The body is walked in tiles, so that no decoded copy of the cache ever exists.

Source: Dao et al. (2022), FlashAttention, algorithm 1 (online softmax).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from nqkv_jax.cache import KVCache, LayerCache, Side
from nqkv_jax.quantizers.base import Context, Payload
from nqkv_jax.rotary import Rotary, RotaryAngles

# Tokens that are decoded at a time. At 1,024 cached tokens on two CPU cores, against 128 and 512:
# `nqkv` takes 0.86 and 1.24 of the time, `none` 1.02 and 0.67.
TILE = 256


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
    def empty(cls, q: jax.Array) -> "Partial":
        """Over no token, for queries [B, Hkv, G, S, D]."""
        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        return cls(
            numerator=jnp.zeros(q.shape, jnp.float32), denominator=zeros, maximum=zeros - jnp.inf
        )

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


def attend_tokens(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, shift: jax.Array | None = None
) -> Partial:
    """Attention of q [B, Hkv, G, S, D], scaled, over k, v [B, T, Hkv, D] where mask [B, S, T]."""
    if q.shape[3] == 1:
        # The same product with the keys as left operand, which need not be transposed then: for one
        # query per head XLA:CPU is up to twice as fast.
        scores = jnp.einsum("bthd,bhgsd->bhtgs", k, q, preferred_element_type=jnp.float32)
        scores = jnp.moveaxis(scores, 2, -1)
    else:
        scores = jnp.einsum("bhgsd,bthd->bhgst", q, k, preferred_element_type=jnp.float32)
    if shift is not None:
        scores = scores + shift[..., None]
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(maximum == -jnp.inf, 0, maximum)[..., None])
    return Partial(
        numerator=mix(weights, v, mask), denominator=jnp.sum(weights, axis=-1), maximum=maximum
    )


def mix(weights: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """sum_t weights * v, f32[B, Hkv, G, S, D], for v [B, T, Hkv, D] and mask [B, S, T].

    Tokens outside the mask have weight 0, but could be NaN, and 0 * NaN is not 0: a NaN or infinite
    value reaches those queries that see it, and no others.
    """
    product = lambda v: jnp.einsum(
        "bhgst,bthd->bhgsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
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
        )

    return _walk(-(-size // tile), q, one)


def slice_groups(side: Side, first: jax.Array, count: int) -> Payload:
    """The payload of groups first + [0, count); `first` is i32[] or i32[B]."""

    def cut(body, first):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=0), body)

    return jax.vmap(cut, in_axes=(0, 0 if first.ndim else None))(side.body, first)


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
        positions = side.num_sinks + first * group + jnp.arange(count * group)
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
) -> Partial:
    """Attention over the first `tokens` i32[B] encoded tokens; those are encoded on both sides."""
    key, value = layer.key, layer.value
    group = math.lcm(key.quantizer.group, value.quantizer.group)
    capacity = min(key.capacity, value.capacity) // group * group
    if not capacity:
        return Partial.empty(q)
    tile = min(-(-TILE // group) * group, capacity)

    heads_last = lambda a: jnp.moveaxis(a, 0, -2)  # [Hkv, G, S, D] <-> [G, S, Hkv, D]
    heads_first = lambda a: jnp.moveaxis(a, -2, 0)

    def fold(q, state):
        q, shift = key.quantizer.fold_queries(heads_last(q), Context(rotary=rotary, state=state))
        return heads_first(q), None if shift is None else jnp.moveaxis(shift, -1, 0)

    def unfold(out, state):
        return heads_first(value.quantizer.unfold_output(heads_last(out), Context(state=state)))

    folded, shift = jax.vmap(fold)(q, key.state)

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
            dtype=q.dtype,
            folded=True,
        )
        token = start + jnp.arange(tile)
        valid = (token >= i * tile)[None] & (token[None] < tokens[:, None])
        positions = jnp.broadcast_to(token + key.num_sinks, valid.shape)
        mask = visible(query_positions, positions, valid, window)
        return attend_tokens(folded, decode(key, keys), decode(value, values), mask, shift)

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
    nothing = lambda side: jax.tree.map(jnp.zeros_like, jax.eval_shape(fetch, side, first))
    carry = (Partial.empty(q), nothing(key), nothing(value))
    partial = jax.lax.fori_loop(first - 1, last, step, carry)[0]
    out = jax.vmap(unfold)(partial.output(), value.state)
    return dataclasses.replace(partial, numerator=out * partial.denominator[..., None])


def _read_tail(
    side: Side,
    other: Side,
    first: jax.Array,
    encoded: jax.Array,
    size: int,
    rotary: Rotary | None,
    rotated: bool,
    dtype,
) -> jax.Array:
    """Body tokens first[b] + [0, size), [B, size, Hkv, D]: decoded below encoded[b], else raw."""
    token = first[:, None] + jnp.arange(size)[None]
    x = jnp.zeros((*token.shape, *side.sinks.shape[2:]), dtype)
    if side.window.capacity:
        ring = jax.vmap(lambda ring, t: ring[t % side.window.capacity])(side.residual, token)
        x = (ring if rotated or rotary is None else rotary(ring, token + side.num_sinks)).astype(
            dtype
        )
    # With one window for both sides `first` is where the residual begins; else this side may be
    # ahead.
    if side.window != other.window and side.num_groups:
        group = side.quantizer.group
        count = min(-(-size // group) + 1, side.num_groups)
        start = jnp.minimum(first // group, side.num_groups - count)
        payload = slice_groups(side, start, count)
        decoded = decode_groups(side, payload, start, rotary=rotary, dtype=dtype, folded=False)
        index = jnp.clip(token - (start * group)[:, None], 0, count * group - 1)
        decoded = jax.vmap(lambda rows, i: rows[i])(decoded, index)
        x = jnp.where((token < encoded[:, None])[:, :, None, None], decoded, x)
    return x


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
    scale: float | None = None,
    implementation: str = "auto",
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
      window: attend to the latest `window` tokens only, the current one included.
      scale: of the scores; default D ** -0.5.
      implementation: of attention over the body: "auto" or "xla".

    Returns:
      [B, S, Hq, D] in the dtype of q, and the cache with the new tokens.

    Raises:
      ValueError: shapes, dtypes or `layer` do not fit; says what was expected.
    """
    if num_new is not None:
        num_new = jnp.asarray(num_new)
    _check(q, k, v, cache, layer, num_new, window, implementation)
    batch, size, num_heads, head_dim = q.shape
    num_kv_heads, dtype = k.shape[2], q.dtype
    if num_new is None:
        num_new = jnp.full(batch, size, jnp.int32)
    else:
        num_new = jnp.clip(num_new, 0, size).astype(jnp.int32)
    if isinstance(cache, KVCache):
        positions = cache.layers[layer].lengths[:, None] + jnp.arange(size)[None]
    else:
        positions = jnp.broadcast_to(jnp.arange(size), (batch, size))
    grouped = (batch, size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    unrotated = q.reshape(grouped)
    if rotary is not None:
        q = rotary(q, positions)
    queries = q.reshape(grouped)
    # Scaled before the product: in float16 the unscaled score can overflow.
    q = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)
    q = q.reshape(grouped).transpose(0, 2, 3, 1, 4)
    if isinstance(cache, KVCache):
        layer_cache = cache.layers[layer]
        observed = queries if layer_cache.rotated else unrotated
        out, layer_cache = _attend_cache(
            q, k, v, observed, layer_cache, positions, num_new, rotary, window
        )
        layers = (*cache.layers[:layer], layer_cache, *cache.layers[layer + 1 :])
        cache = dataclasses.replace(cache, layers=layers)
    elif cache is None:
        k = k if rotary is None else rotary(k, positions)
        valid = jnp.arange(size)[None] < num_new[:, None]
        out = attend_new(q, k, v, positions, valid, window)
    else:
        out, cache = cache.attend(q, k, v, unrotated, layer=layer, rotary=rotary, window=window)
    out = out.output().transpose(0, 3, 1, 2, 4).reshape(batch, size, num_heads, head_dim)
    return out.astype(dtype), cache


def _attend_cache(
    q, k, v, observed, layer: LayerCache, query_positions, num_new, rotary, window
) -> tuple[Partial, LayerCache]:
    """The queries are rotated and scaled, [B, Hkv, G, S, D]; k and v are as the model made them.

    `observed` [B, S, Hkv, G, D] are the queries that a quantizer may look at.
    """
    size, before = q.shape[3], layer.lengths
    if rotary is not None and layer.rotated:
        k = rotary(k, query_positions)
    # What the cache will hold is what attention sees, from the first token on.
    k, v = k.astype(layer.dtype), v.astype(layer.dtype)
    updated = layer.append(k, v, num_new, rotary, observed if layer.wants_queries else None)
    decoding = size == 1
    # The residual is read after the append when decoding (it holds the new token, and still holds
    # what was flushed just now), and before it otherwise (many new tokens overwrite the ring).
    source, length = (updated, updated.lengths) if decoding else (layer, before)
    encoded = lambda side: side.encoded(length if side.window.immediate else before)
    key_encoded, value_encoded = encoded(layer.key), encoded(layer.value)
    common = jnp.minimum(key_encoded, value_encoded)

    # All tokens in full precision are one segment: sinks | residual | new.
    keys, values, positions, valid = [], [], [], []

    def add(k, v, at, ok):
        keys.append(k.astype(q.dtype)), values.append(v.astype(q.dtype))
        positions.append(at), valid.append(ok)

    num_sinks = layer.key.num_sinks
    if num_sinks:
        at = jnp.broadcast_to(jnp.arange(num_sinks), (q.shape[0], num_sinks))
        sinks = updated.key.sinks
        if rotary is not None and not layer.rotated:
            sinks = rotary(sinks, at)
        add(sinks, updated.value.sinks, at, at < length[:, None])
    tail = max(layer.key.window.capacity, layer.value.window.capacity)
    if tail:
        at = num_sinks + common[:, None] + jnp.arange(tail)[None]
        add(
            _read_tail(
                source.key, source.value, common, key_encoded, tail, rotary, layer.rotated, q.dtype
            ),
            _read_tail(source.value, source.key, common, value_encoded, tail, None, True, q.dtype),
            at,
            at < length[:, None],
        )
    partial = Partial.empty(q)
    if keys:
        join = lambda parts: jnp.concatenate(parts, axis=1)
        mask = visible(query_positions, join(positions), join(valid), window)
        partial = attend_tokens(q, join(keys), join(values), mask)
    if not decoding:
        fresh = k if rotary is None or layer.rotated else rotary(k, query_positions)
        ok = jnp.arange(size)[None] < num_new[:, None]
        partial = partial.merge(
            attend_new(q, fresh.astype(q.dtype), v.astype(q.dtype), query_positions, ok, window)
        )
    # The body is read from the updated cache: an append never changes what is encoded, and reading
    # the old one would keep two copies alive.
    return partial.merge(attend_body(q, updated, common, query_positions, rotary, window)), updated


def _check(q, k, v, cache, layer, num_new, window, implementation) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attend: expected q [batch, tokens, num_heads, head_dim] and k, v [batch, tokens, "
            f"num_kv_heads, head_dim]; got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    batch, size, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, size) or k.shape[3] != head_dim or num_heads % k.shape[2]:
        raise ValueError(
            "attend: q and k must agree in batch, tokens and head_dim, and num_heads must be a "
            f"multiple of num_kv_heads; got q {q.shape}, k {k.shape}"
        )
    if not q.size or not k.size:
        raise ValueError(f"attend: expected at least one token; got q {q.shape}, k {k.shape}")
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (q, k, v)):
        raise ValueError(
            f"attend: expected floating-point q, k, v; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if num_new is not None and (
        num_new.shape != (batch,) or not jnp.issubdtype(num_new.dtype, jnp.integer)
    ):
        raise ValueError(
            f"attend: expected num_new of shape ({batch},), one whole number per sequence; "
            f"got {num_new.dtype} of shape {num_new.shape}"
        )
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or window < 1
    ):
        raise ValueError(f"attend: expected window >= 1, a whole number, or None; got {window!r}")
    if implementation not in ("auto", "xla"):
        raise ValueError(f"attend: expected implementation 'auto' or 'xla'; got {implementation!r}")
    if not isinstance(layer, int):
        raise ValueError(
            f"attend: layer must be a Python int, as layers may be cached differently; got "
            f"{layer}. Unroll the loop over layers"
        )
    if isinstance(cache, KVCache):
        if not 0 <= layer < len(cache.layers):
            raise ValueError(
                f"attend: the cache has layers 0..{len(cache.layers) - 1}; got layer={layer}"
            )
        this = cache.layers[layer]
        expected = (cache.batch, this.num_kv_heads, this.head_dim)
        if (batch, k.shape[2], head_dim) != expected:
            raise ValueError(
                "attend: the cache was made for (batch, num_kv_heads, head_dim) = "
                f"{expected}; got k {k.shape}"
            )
    elif cache is not None and not hasattr(cache, "attend"):
        raise ValueError(
            "attend: expected cache to be a KVCache (scheme.init makes one), a DecodedView or "
            f"None; got {type(cache).__name__}"
        )
