"""The kernel that encodes a token and writes it: the bits that XLA writes, and no others."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_token_cases import CASES, KEEP, TOKEN, body, expected, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import nqkv_jax as nq
from nqkv_jax import codebooks
from nqkv_jax.pallas_kernels.append_token import append_token
from nqkv_jax.quantizers import BlockQuantizer
from nqkv_jax.quantizers.tiled import TiledQuantizer

pytestmark = pytest.mark.optimized


@functools.partial(jax.jit, static_argnames="case")
def appended(before, x, case):
    def one(before, x, token, keep):
        arrays = (before.words, before.scale, before.zero)
        return append_token(*arrays, x, token, keep, **case.options, interpret=True)

    words, scale, zero = jax.vmap(one)(before, x, jnp.asarray(TOKEN), jnp.asarray(KEEP))
    return type(before)(words=words, scale=scale, zero=zero)


def assert_same_bits(a, b):
    as_bytes = lambda a: np.ascontiguousarray(a).view(np.uint8)
    chex.assert_trees_all_equal(jax.tree.map(as_bytes, a), jax.tree.map(as_bytes, b))


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_bits_are_those_of_xla(case):
    before, x = body(case), tokens(case)
    after = appended(before, x, case)
    assert_same_bits(after, expected(case, before, x))
    # The last sequence is not to be written, the others are.
    changed = [bool((a != b).any()) for a, b in zip(after.words, before.words, strict=True)]
    assert changed == list(KEEP)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["cubic4-signed", "uniform2-minmax-parts", "nf3-d80"]),
    exponent=st.integers(-40, 38),
    offset=st.sampled_from([0, 1, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_of_any_blocks(name, exponent, offset, seed):
    case = CASES[name]
    shape = (len(TOKEN), case.heads, case.head_dim)
    x = (np.random.default_rng(seed).normal(size=shape) + offset) * 10.0**exponent
    x = jnp.asarray(np.clip(x, -3e38, 3e38), jnp.float32).astype(case.dtype)
    before = body(case, seed)
    assert_same_bits(appended(before, x, case), expected(case, before, x))


@pytest.mark.parametrize(
    "quantizer, served",
    [
        (BlockQuantizer(codebooks.integer(8), block_size=8192), True),
        (BlockQuantizer(codebooks.normal_float(4), block_size=16384), False),
        (BlockQuantizer(codebooks.lloyd_max_normal(4), block_size=64, scale="rms"), False),
        (BlockQuantizer(codebooks.uniform(2), block_size=32, axis="tokens", scale="minmax"), False),
        (BlockQuantizer(codebooks.fit(np.linspace(-1, 1, 999) ** 3, 8), block_size=64), False),
    ],
)
def test_which_quantizers_it_serves(quantizer, served):
    assert TiledQuantizer(quantizer).kernel_appends == served


@pytest.mark.parametrize(
    "scheme, kernels", [("nqkv", 2), ("int8", 2), ("kivi", 1), ("nqkv:codebook=lloyd_max", 0)]
)
def test_caches_take_it_on_gpus_if_it_is_asked_for(scheme, kernels):
    cache = nq.schemes.get(scheme).init(
        num_layers=1, batch=2, max_len=256, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16
    )
    x = jnp.zeros((2, 1, 2, 128), jnp.bfloat16)
    append = jax.jit(lambda cache, x: cache.append(0, x, x, jnp.ones(2, jnp.int32), None))
    assert "name=append_token" not in str(append.trace(cache, x).jaxpr)
    traced = append.trace(cache.with_implementation("mosaic_gpu"), x)
    lowered = traced.lower(lowering_platforms=("cpu",))
    assert str(traced.jaxpr).count("name=append_token") == kernels
    assert "append_token" not in lowered.as_text()  # of this platform


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel for GPUs needs jax 0.11")
@pytest.mark.parametrize("of_cache, of_call", [("auto", "mosaic_gpu"), ("mosaic_gpu", "xla")])
def test_what_a_call_asks_for_is_of_all_it_does(of_cache, of_call):
    cache = nq.schemes.get("nqkv:sinks=4").init(
        num_layers=1, batch=2, max_len=512, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16
    )
    cache = cache.with_implementation(of_cache)
    x = jnp.zeros((2, 1, 2, 128), jnp.bfloat16)
    traced = jax.jit(functools.partial(nq.attend, implementation=of_call)).trace(x, x, x, cache)
    names = ("append_token", "exact_attention", "decode_attention")
    counts = [str(traced.jaxpr).count(f"name={name}") for name in names]
    expected = [2, 1, 1] if of_call == "mosaic_gpu" else [0, 0, 0]
    assert counts[:2] == expected[:2] and bool(counts[2]) == bool(expected[2])
    _, after = traced.out_info
    assert jax.tree.structure(after) == jax.tree.structure(cache)
