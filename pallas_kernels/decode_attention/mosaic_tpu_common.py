"""What the TPU kernels for scalar codes and for vectors have in common."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nqkv_jax import tiles

# Unseen scores, and the first maximum: exp(UNSEEN - FLOOR) is 0, and nothing is infinite.
UNSEEN, FLOOR = -1e30, -1e29


def in_steps(a, step: int, batched: bool = True) -> pl.BlockSpec:
    """Of a [B, tiles, ...], `step` tiles at a time, on a grid of (B, steps); [tiles, ...] if not
    `batched`.

    `lengths` and `first` are prefetched. A step none of whose tokens is seen asks for the nearest
    one that has some, which is there already.
    """
    tokens = step * tiles.TOKENS

    def nearest(b, i, lengths, first):
        last = jnp.maximum(jax.lax.div(lengths[b] - 1, jnp.int32(tokens)), 0)
        return jnp.clip(i, jnp.minimum(jax.lax.div(first[b], jnp.int32(tokens)), last), last)

    if not batched:
        index = lambda b, i, *prefetched: (nearest(b, i, *prefetched),) + (0,) * (a.ndim - 1)
        return pl.BlockSpec((step, *a.shape[1:]), index)
    index = lambda b, i, *prefetched: (b, nearest(b, i, *prefetched)) + (0,) * (a.ndim - 2)
    return pl.BlockSpec((1, step, *a.shape[2:]), index)


def load_float32(x: jax.Array) -> jax.Array:
    """Numbers as they are stored: i16 are the bits of float16, which Mosaic cannot load."""
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32)
    magnitude = bits & jnp.int32(0x7FFF)
    rebiased = (magnitude << jnp.int32(13)) + jnp.int32(112 << 23)
    normal = jax.lax.bitcast_convert_type(rebiased, jnp.float32)
    # A product with 2^112 would do, but for subnormals, which are 0 here.
    small = magnitude.astype(jnp.float32) * jnp.float32(2**-24)
    value = jnp.where(magnitude < 0x400, small, normal)
    value = jnp.where(magnitude >= 0x7C00, jnp.float32(jnp.nan), value)
    return jnp.where(bits < 0, -value, value)


def product(left: jax.Array, right: jax.Array, contract: int) -> jax.Array:
    """f32: `left` [rows, n] times `right`, over its axis `contract`; in their dtype."""
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (contract,)), ((), ())),
        precision="highest" if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def mix(weights: jax.Array, values: jax.Array, contract: int) -> jax.Array:
    """f32[rows, lanes]: weights f32[rows, tokens] times values, over their axis `contract`.

    What a bfloat16 would cut off a weight goes into a row of its own: where few tokens have all the
    weight, nothing averages such errors out. A register of bfloat16 has room for these rows beside
    those of eight queries.
    """
    if values.dtype == jnp.float32:
        return product(weights, values, contract)
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    parts = jnp.concatenate([high, weights - high], axis=0).astype(values.dtype)
    out, rows = product(parts, values, contract), weights.shape[0]
    return out[:rows] + out[rows:]
