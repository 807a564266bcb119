"""Tiles that are filled token by token, or a few at a time: short residuals, or none."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nqkv_jax as nq
from nqkv_jax import codebooks, tiles
from nqkv_jax.quantizers import BlockQuantizer, FullPrecision, HQQQuantizer
from nqkv_jax.quantizers.base import Context
from nqkv_jax.quantizers.nsn import NSNQuantizer
from nqkv_jax.quantizers.tiled import TiledQuantizer, in_tiles
from nqkv_jax.schemes import LayerScheme, LayerShape
from nqkv_jax.schemes import base as schemes_base
from nqkv_jax.side import Window

HEADS, CONTEXT = 2, Context()
QUANTIZERS = {
    "nf4, head_dim 64": (BlockQuantizer(codebooks.normal_float(4), block_size=128), 64),
    "3 bits, head_dim 80": (
        BlockQuantizer(codebooks.cubic_normal(3, 80), block_size=80, scale_dtype=jnp.bfloat16), 80,
    ),
    "3 bits, head_dim 256": (BlockQuantizer(codebooks.cubic_normal(3, 64), block_size=64), 256),
    "2 bits with zeros": (
        BlockQuantizer(codebooks.uniform(2), block_size=32, scale="minmax"), 128,
    ),
    "8 bits": (BlockQuantizer(codebooks.integer(8), block_size=256), 128),
    "channels of 32 tokens": (
        BlockQuantizer(codebooks.uniform(3), block_size=32, scale="minmax", axis="tokens"), 96,
    ),
    "channels of 16 tokens, HQQ": (
        HQQQuantizer(bits=2, block_size=16, axis="tokens", scale_dtype=jnp.float32), 64,
    ),
    "HQQ": (HQQQuantizer(bits=4, block_size=32), 64),
    "vectors, 2 bits": (NSNQuantizer(bits=2), 64),
    "vectors, 1 bit": (NSNQuantizer(bits=1, window=32, normalise=False), 128),
}  # fmt: skip

RARE = "3 bits, head_dim 256", "8 bits", "HQQ", "vectors, 1 bit"


def tokens(size, head_dim, seed=0):
    x = np.random.default_rng(seed).normal(size=(size, HEADS, head_dim))
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.more) if n in RARE else n for n in QUANTIZERS],
)
def quantizer(request):
    inner, head_dim = QUANTIZERS[request.param]
    tiled = in_tiles(inner, inner.group, HEADS, head_dim)
    return head_dim, tiled, jax.jit(tiled.splice)


def body_of(tiled, head_dim, num_tiles, fill=0):
    payload = jax.eval_shape(lambda x: tiled.quantize(x, CONTEXT), tokens(tiles.TOKENS, head_dim))
    return jax.tree.map(lambda a: jnp.full((num_tiles, *a.shape), fill, a.dtype), payload)


@pytest.mark.optimized
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_tokens_come_as_they_like_and_the_bits_are_those_of_whole_tiles(quantizer, data):
    head_dim, tiled, splice = quantizer
    x = tokens(2 * tiles.TOKENS, head_dim)
    whole = jax.vmap(lambda x: tiled.quantize(x, CONTEXT))(x.reshape(2, tiles.TOKENS, HEADS, -1))
    # What is there before does not matter.
    body, at = body_of(tiled, head_dim, 2, fill=-1), 0
    while at < x.shape[0]:
        size = tiled.step * data.draw(st.sampled_from([1, max(60 // tiled.step, 3)]))
        size = size if size <= x.shape[0] - at else tiled.step
        body = splice(body, x[at : at + size], jnp.int32(at), jnp.int32(at + size), CONTEXT)
        at += size
    chex.assert_trees_all_equal(body, whole)


@pytest.mark.optimized
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("first", [0, 126, 255])
def test_other_tokens_stay_what_they_are(quantizer, size, first):
    head_dim, tiled, splice = quantizer
    first, size, step = first // tiled.step * tiled.step, size * tiled.step, tiled.step
    x = tokens(2 * tiles.TOKENS, head_dim)
    body = jax.vmap(lambda x: tiled.quantize(x, CONTEXT))(x.reshape(2, tiles.TOKENS, HEADS, -1))
    decode = jax.vmap(lambda p: tiled.dequantize(p, CONTEXT))
    before = decode(body).reshape(x.shape)
    last = min(first + size, 256 - step)  # the last one is not to be written
    new = tokens(size, head_dim, seed=1)
    after = splice(body, new, jnp.int32(first), jnp.int32(last), CONTEXT)
    after = decode(after).reshape(x.shape)
    written = (np.arange(256) >= first) & (np.arange(256) < last)
    np.testing.assert_array_equal(after[~written], before[~written])
    if written.any():
        assert (np.asarray(after != before).any((1, 2)) == written).all()


@pytest.mark.optimized
@pytest.mark.parametrize("size, first", [(200, 56), (200, 100), (300, 0), (300, 250)])
def test_what_does_not_fit_is_left_out(size, first):
    inner, head_dim = QUANTIZERS["nf4, head_dim 64"]
    tiled, x = TiledQuantizer(inner), tokens(size, head_dim)
    body = body_of(tiled, head_dim, 2)
    body = jax.jit(tiled.splice)(body, x, jnp.int32(first), jnp.int32(256), CONTEXT)
    decoded = jax.vmap(lambda p: tiled.dequantize(p, CONTEXT))(body).reshape(256, HEADS, head_dim)
    expected = np.zeros_like(decoded)
    written = x[: 256 - first][:size]
    each = jax.vmap(lambda x: inner.dequantize(inner.quantize(x[None], CONTEXT), CONTEXT)[0])
    expected[first : first + len(written)] = each(written)
    np.testing.assert_array_equal(decoded, expected)


def filled(scheme, splits, max_len, fewer=0):
    """A cache to which tokens were appended, `fewer` to the second sequence, and what attention
    gave at last."""
    cache = nq.schemes.get(scheme).init(
        num_layers=1, batch=2, max_len=max_len, num_kv_heads=HEADS, head_dim=64, dtype=jnp.float32
    )
    run, at = jax.jit(functools.partial(nq.attend, layer=0)), 0
    x = np.random.default_rng(0).normal(size=(3, 2, 300, HEADS, 64)).astype(np.float32)
    for size in splits:
        num_new = jnp.asarray([size, size if size == 1 else size - fewer], jnp.int32)
        out, cache = run(*jnp.asarray(x[:, :, at : at + size]), cache, num_new=num_new)
        at += size
    return cache, out


MORE = functools.partial(pytest.param, marks=pytest.mark.more)


@pytest.mark.parametrize(
    "scheme",
    [
        "nqkv:bits=3,block_size=32,sinks=3", MORE("squat"), MORE("nsnquant"),
        MORE("nqkv:block_size=64,residual=32"), MORE("hqq:residual=64,axis=tokens"),
        MORE("int8"), MORE("nqkv:block_size=64,hadamard=True"), MORE("nqkv:block_size=128"),
    ],
)  # fmt: skip
def test_attention_sees_what_it_sees_without_tiles(scheme, monkeypatch):
    splits = [100, *[1] * 90]
    cache, out = filled(scheme, splits, 2048, fewer=7)
    assert "Tiled" in repr(cache.layers[0].key.quantizer)
    with monkeypatch.context() as patch:
        patch.setattr(schemes_base, "in_tiles", lambda quantizer, *_: quantizer)
        plain, expected = filled(scheme, splits, 2048, fewer=7)
    assert "Tiled" not in repr(plain.layers[0].key.quantizer)
    np.testing.assert_array_equal(cache.lengths, plain.lengths)
    assert cache.stored_bits == plain.stored_bits
    if jax.tree.leaves(plain.layers[0].key.body)[0].shape[1] == 2048:  # whole tiles
        assert cache.nbytes == plain.nbytes
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def test_tokens_past_the_end_change_nothing():
    full, _ = filled("nqkv:block_size=128", [100, *[1] * 28], 128)
    over, _ = filled("nqkv:block_size=128", [100, *[1] * 40], 128)
    chex.assert_trees_all_equal(over.layers[0].key, full.layers[0].key)
    assert over.layers[0].overflow.tolist() == [12, 12]


@pytest.mark.parametrize(
    "max_len, tiled, sinks",
    [(128, True, 0), (200, False, 0), (640, True, 0), (1900, True, 0), (2049, True, 0),
     (1801, False, 0), (260, True, 4), (300, False, 4)],
)  # fmt: skip
def test_rooms_of_whole_tiles_are_a_sixteenth_larger_at_most(max_len, tiled, sinks):
    make = lambda scheme, n: nq.schemes.get(scheme, sinks=sinks).abstract(
        num_layers=1, batch=1, max_len=n, num_kv_heads=2, head_dim=128
    )
    cache, body = make("nqkv", max_len), max_len - sinks
    side = cache.layers[0].key
    assert isinstance(side.quantizer, TiledQuantizer) == tiled
    assert side.capacity == (-(-body // 128) * 128 if tiled else body)
    assert side.capacity <= body * (1 + 1 / 16)


def test_one_side_alone_is_not_filled_little_by_little():
    """A kernel reads both."""
    values = BlockQuantizer(codebooks.uniform(2), block_size=32, scale="minmax")
    scheme = LayerScheme(
        key=FullPrecision(), value=values, key_window=Window(), value_window=Window(keep=32)
    )
    layer = scheme.init(
        LayerShape(num_kv_heads=2, head_dim=64), batch=1, max_len=2048, dtype=jnp.float32
    )
    assert layer.value.quantizer == values
    assert in_tiles(values, 1, 2, 64) == TiledQuantizer(values)
