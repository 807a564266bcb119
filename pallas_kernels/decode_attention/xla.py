"""Decode attention over tiles in plain XLA: the reference, and the fallback on every platform."""

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes


def decode_attention(
    q: jax.Array,
    key: TiledCodes,
    value: TiledCodes,
    lengths: jax.Array,
    first: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`; one tile at a time, in float32."""
    (batch, heads, group, _), head_dim = q.shape, value.head_dim
    product = lambda formula, *operands: jnp.einsum(
        formula, *operands, precision="highest", preferred_element_type=jnp.float32
    )
    q, waves = jnp.split(q.astype(jnp.float32), [head_dim], axis=-1)

    def step(tile, carry):
        numerator, denominator, maximum = carry
        scores = product("bhgd,bthd->bhgt", q, key.decode(tile))
        if key.waves is not None:
            scores = scores + key.waves.tile(tile).shift(waves)[:, 0]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        token = tile * tiles.TOKENS + jnp.arange(tiles.TOKENS)[None]
        seen = (token < lengths[:, None]) & (token >= first[:, None])
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        top = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        base = jnp.where(top == -jnp.inf, 0, top)  # -inf - -inf would be NaN
        weights, old = jnp.exp(scores - base[..., None]), jnp.exp(maximum - base)
        v = jnp.where(seen[:, :, None, None], value.decode(tile), 0)  # 0 * NaN would be NaN
        numerator = numerator * old[..., None] + product("bhgt,bthd->bhgd", weights, v)
        return numerator, denominator * old + jnp.sum(weights, axis=-1), top

    nothing = jnp.zeros((batch, heads, group), jnp.float32)
    start = (jnp.zeros((batch, heads, group, head_dim), jnp.float32), nothing, nothing - jnp.inf)
    last = (jnp.max(lengths) + tiles.TOKENS - 1) // tiles.TOKENS
    return jax.lax.fori_loop(jnp.min(first) // tiles.TOKENS, last, step, start)
