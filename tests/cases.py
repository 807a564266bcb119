"""Schemes and inputs that the cache, attention and model tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import schemes
from nqkv_jax.rotary import Rotary

# Every registered scheme, and every shape that the contracts allow: with and without sinks,
# residual, state, RoPE before or after, groups of tokens, sides with different windows.
SCHEMES = [
    "none",
    "int8",
    "int4:sinks=2",
    "int2:group_size=16,residual=8",
    "fp8",
    "nqkv",
    "nqkv:bits=3,block_size=32,sinks=3",
    "nqkv:bits=2,codebook=lloyd_max,keys=unrotated,scale_dtype=float32",
    "nqkv:codebook=signed_cubic,residual=16,centre=True,hadamard=True,sinks=4",
    "nqkv:residual=16,centre=True,keys=unrotated",
    "kivi:residual=32",
    "kivi:bits=4,group_size=16,residual=48,sinks=1,keys=unrotated",
]

BATCH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 6, 2, 32
ROTARY = Rotary(inverse_frequencies=np.float32(10.0) ** -np.arange(0, 2, 0.25, dtype=np.float32))


def make_qkv(
    tokens: int,
    *,
    seed: int = 0,
    batch: int = BATCH,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> tuple[jax.Array, ...]:
    """Queries [batch, tokens, num_heads, head_dim], keys and values with offset channels."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.normal(size=(batch, tokens, heads, head_dim))
    offset = 2 * rng.normal(size=(1, 1, num_kv_heads, head_dim))
    return tuple(
        jnp.asarray(x, jnp.float32)
        for x in (draw(num_heads), draw(num_kv_heads) + offset, draw(num_kv_heads))
    )


def make_cache(
    spec: str,
    *,
    max_len: int,
    batch: int = BATCH,
    num_layers: int = 1,
    num_kv_heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype=jnp.float32,
):
    return schemes.get(spec).init(
        num_layers=num_layers,
        batch=batch,
        max_len=max_len,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
