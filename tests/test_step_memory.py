"""What a compiled step of decoding takes beside the cache."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import BATCH, HEAD_DIM, NUM_KV_HEADS, ROTARY, make_qkv

import nqkv_jax as nq

MAX_LEN = 2**22


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.more)])
@pytest.mark.parametrize(
    "spec",
    [
        "none", "nqkv", "nqkv:residual=16,centre=True,hadamard=True,sinks=4", "kivi",
        "nsnquant:bits=1",
    ],
)  # fmt: skip
def test_no_decoded_copy_of_the_cache_exists(spec, dtype):
    """The cache is updated in place, and nothing has a byte for each token in it."""
    cache = nq.schemes.get(spec).abstract(
        num_layers=1, batch=BATCH, max_len=MAX_LEN, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
        dtype=dtype,
    )  # fmt: skip
    step = jax.jit(functools.partial(nq.attend, rotary=ROTARY), donate_argnums=3)
    used = step.lower(*make_qkv(1), cache).compile().memory_analysis()
    assert used.alias_size_in_bytes == cache.nbytes
    assert used.temp_size_in_bytes < BATCH * MAX_LEN / 2
