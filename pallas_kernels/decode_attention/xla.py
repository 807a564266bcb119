"""Decode attention over tiles in plain XLA: the reference, and the fallback on every platform."""

import functools

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.partial import capped, in_steps


def decode_attention(
    q: jax.Array,
    key: TiledCodes,
    value: TiledCodes,
    lengths: jax.Array,
    first: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`; in float32, one tile at a time, on GPUs many."""
    batch, heads, group, width = q.shape
    attend = functools.partial(_attend, soft_cap=soft_cap)
    tile_bytes = 4 * tiles.TOKENS * batch * heads * (2 * width + group)
    return in_steps(attend, q, key, value, lengths, first, tiles=1, tile_bytes=tile_bytes)


def _attend(q, key, value, lengths, first, *, soft_cap, tiles_of_step):
    (batch, heads, group, _), head_dim = q.shape, value.head_dim
    product = lambda formula, *operands: jnp.einsum(
        formula, *operands, precision="highest", preferred_element_type=jnp.float32
    )
    q, waves = jnp.split(q.astype(jnp.float32), [head_dim], axis=-1)
    num_tiles = min(key.num_tiles, value.num_tiles)
    count = min(tiles_of_step, num_tiles)
    step_tokens = count * tiles.TOKENS

    def step(i, carry):
        numerator, denominator, maximum = carry
        # The last step is moved back to fit; what an earlier one has seen is masked out.
        tile = jnp.minimum(i * count, num_tiles - count)
        scores = product("bhgd,bthd->bhgt", q, key.decode(tile, count))
        if key.waves is not None:
            shift = jnp.moveaxis(key.waves.of_tiles(tile, count).shift(waves), 1, 3)
            scores = scores + shift.reshape(scores.shape)
        token = tile * tiles.TOKENS + jnp.arange(step_tokens)[None]
        seen = (token < lengths[:, None]) & (token >= first[:, None]) & (token >= i * step_tokens)
        scores = jnp.where(seen[:, None, None], capped(scores, soft_cap), -jnp.inf)
        top = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        base = jnp.where(top == -jnp.inf, 0, top)  # -inf - -inf would be NaN
        weights, old = jnp.exp(scores - base[..., None]), jnp.exp(maximum - base)
        v = value.decode(tile, count)
        v = jnp.where(seen[:, :, None, None], v, 0)  # 0 * NaN would be NaN
        numerator = numerator * old[..., None] + product("bhgt,bthd->bhgd", weights, v)
        return numerator, denominator * old + jnp.sum(weights, axis=-1), top

    nothing = jnp.zeros((batch, heads, group), jnp.float32)
    start = (jnp.zeros((batch, heads, group, head_dim), jnp.float32), nothing, nothing - jnp.inf)
    last = (jnp.max(lengths) + step_tokens - 1) // step_tokens
    return jax.lax.fori_loop(jnp.min(first) // step_tokens, last, step, start)
