"""Decode attention over codes of eight channels in plain XLA, in the compressed domain.

With 1 bit nothing is decoded. A score is the sum of those products of the query with entries of the
table that the token's codes select (asymmetric distance computation, Jegou et al. 2011, Product
quantization for nearest neighbor search). An output is the sum of the table's entries, times the
weights of all tokens that select them. With 2 bits the signs are in the way.
"""

import functools

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import as_float32
from nqkv_jax.pallas_kernels.decode_attention.vectors import (
    CHANNELS,
    ENTRIES,
    VectorCodes,
    unpack,
)
from nqkv_jax.partial import capped, in_steps

TILES_PER_STEP = 8


def decode_attention(
    q: jax.Array,
    key: VectorCodes,
    value: VectorCodes,
    lengths: jax.Array,
    first: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`; in float32, on GPUs in larger steps."""
    batch, heads, group, width = q.shape
    attend = functools.partial(_attend, soft_cap=soft_cap)
    # Of 2 bits what is decoded, of 1 bit products that codes select.
    numbers = 2 * width + group * (width // CHANNELS)
    of_tile = dict(tiles=TILES_PER_STEP, tile_bytes=4 * tiles.TOKENS * batch * heads * numbers)
    return in_steps(attend, q, key, value, lengths, first, **of_tile)


def _attend(q, key, value, lengths, first, *, soft_cap, tiles_of_step):
    q = q.astype(jnp.float32)
    codes, means = q[..., : key.head_dim], q[..., key.head_dim :]
    num_tiles = min(key.num_tiles, value.num_tiles)
    size = min(tiles_of_step, num_tiles)
    products = _products(codes, key.table)

    def step(i, carry):
        numerator, denominator, maximum = carry
        # The last step is moved back to fit; what an earlier one has seen is masked out.
        begin = jnp.minimum(i * size, num_tiles - size)
        keys, values = key.cut(begin, size), value.cut(begin, size)
        scores = _look_up(products, keys) if key.bits == 1 else _dot(codes, keys)
        scores = scores * _per_token(keys.scale)
        if key.mean is not None:
            scores = scores + _in_line(keys.shift(means if key.apart else codes))
        token = begin * tiles.TOKENS + jnp.arange(size * tiles.TOKENS)[None]
        seen = (token < lengths[:, None]) & (token >= first[:, None])
        seen = (seen & (token >= i * size * tiles.TOKENS))[:, None, None]
        scores = jnp.where(seen, capped(scores, soft_cap), -jnp.inf)
        top = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        base = jnp.where(top == -jnp.inf, 0, top)  # -inf - -inf would be NaN
        weights, old = jnp.exp(scores - base[..., None]), jnp.exp(maximum - base)
        scaled = jnp.where(seen, weights * _per_token(values.scale), 0)  # 0 * NaN would be NaN
        out = _bins(scaled, values) if value.bits == 1 else _mix(scaled, values)
        if value.mean is not None:
            out = out + _means(jnp.where(seen, weights * _per_token(values.weight), 0), values)
        return numerator * old[..., None] + out, denominator * old + jnp.sum(weights, -1), top

    nothing = jnp.zeros(q.shape[:3], jnp.float32)
    start = (jnp.zeros((*q.shape[:3], value.head_dim), jnp.float32), nothing, nothing - jnp.inf)
    tokens = size * tiles.TOKENS
    last = (jnp.max(lengths) + tokens - 1) // tokens
    return jax.lax.fori_loop(jnp.min(first) // tokens, last, step, start)


def _product(formula, *operands):
    return jnp.einsum(formula, *operands, precision="highest", preferred_element_type=jnp.float32)


def _products(q: jax.Array, table: jax.Array) -> jax.Array:
    """f32[B, Hkv, head_dim / 8, 256, G]: of the parts of the queries with the table."""
    return _product("bhgri,ci->bhrcg", q.reshape(*q.shape[:3], -1, CHANNELS), table)


def _codes(side: VectorCodes) -> tuple[jax.Array, jax.Array | None]:
    """u8[B, Hkv, head_dim / 8, tokens] codes, and signs or None."""
    return jax.tree.map(_in_line, unpack(side.words, side.bits))


def _in_line(a: jax.Array) -> jax.Array:
    """[B, tiles, Hkv, x, 128] -> [B, Hkv, x, tokens]"""
    a = jnp.moveaxis(a, 1, 3)
    return a.reshape(*a.shape[:3], -1)


def _per_token(a: jax.Array) -> jax.Array:
    """f32[B, Hkv, 1, tokens] of [B, tiles, Hkv, 128]."""
    return _in_line(as_float32(a)[:, :, :, None])


def _look_up(products: jax.Array, keys: VectorCodes) -> jax.Array:
    codes, _ = _codes(keys)
    select = lambda products, codes: products.at[codes].get(mode="promise_in_bounds")
    chosen = jax.vmap(jax.vmap(jax.vmap(select)))(products, codes)  # [B, Hkv, D / 8, T, G]
    return jnp.swapaxes(jnp.sum(chosen, axis=2), 2, 3)


def _bins(weights: jax.Array, values: VectorCodes) -> jax.Array:
    """f32[B, Hkv, G, head_dim]: entries of the table by the sum of the weights that select them."""
    codes, _ = _codes(values)

    def add(codes, weights):  # [T], [T, G]
        bins = jnp.zeros((ENTRIES, weights.shape[1]), jnp.float32)
        return bins.at[codes].add(weights, mode="promise_in_bounds")

    of_head = jax.vmap(add, in_axes=(0, None))
    bins = jax.vmap(jax.vmap(of_head))(codes, jnp.swapaxes(weights, 2, 3))
    out = _product("bhrcg,ci->bhgri", bins, values.table)
    return out.reshape(*out.shape[:3], -1)


def _entries(side: VectorCodes) -> jax.Array:
    """f32[B, Hkv, head_dim / 8, tokens, 8], without scale and mean."""
    codes, signs = _codes(side)
    x = side.table.at[codes].get(mode="promise_in_bounds")
    if signs is None:
        return x
    bit = jnp.expand_dims(jnp.uint8(1) << jnp.arange(CHANNELS, dtype=jnp.uint8), range(signs.ndim))
    return jnp.where((signs[..., None] & bit) != 0, x, -x)


def _dot(q: jax.Array, keys: VectorCodes) -> jax.Array:
    return _product("bhgri,bhrti->bhgt", q.reshape(*q.shape[:3], -1, CHANNELS), _entries(keys))


def _mix(weights: jax.Array, values: VectorCodes) -> jax.Array:
    out = _product("bhgt,bhrti->bhgri", weights, _entries(values))
    return out.reshape(*out.shape[:3], -1)


def _means(weights: jax.Array, values: VectorCodes) -> jax.Array:
    """f32[B, Hkv, G, head_dim]: the mean of each window by the weights of its tokens."""
    batch, count, windows, heads, head_dim = values.mean.shape
    mean = values.mean.astype(jnp.float32).reshape(batch, count * windows, heads, head_dim)
    total = jnp.sum(weights.reshape(*weights.shape[:3], count * windows, -1), axis=-1)
    # Of a window in which nothing is seen, it may be NaN.
    unseen = jnp.all(total == 0, axis=(1, 2))[:, :, None, None]
    return _product("bhgw,bwhd->bhgd", total, jnp.where(unseen, 0, mean))
