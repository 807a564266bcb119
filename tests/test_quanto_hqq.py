"""Quanto and HQQ against independent references: codes, errors, containers, windows."""

import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nqkv_jax as nq
from nqkv_jax import codebooks, packing
from nqkv_jax.quantizers import BlockQuantizer, HQQQuantizer
from nqkv_jax.schemes import LayerShape
from nqkv_jax.side import Window

SHAPE = LayerShape(num_kv_heads=2, head_dim=128)
CONTEXT = nq.Context()


def quantizer_of(spec, shape=SHAPE):
    return nq.schemes.get(spec).layer(shape).key


@functools.partial(jax.jit, static_argnums=0)
def encode(quantizer, x):
    """`x` [tokens, heads, head_dim]: payloads of all groups, and what they decode to."""
    groups = x.reshape(-1, quantizer.group, *x.shape[1:])
    payload = jax.vmap(lambda g: quantizer.quantize(g, CONTEXT))(groups)
    decoded = jax.vmap(lambda p: quantizer.dequantize(p, CONTEXT))(payload)
    return payload, decoded.reshape(x.shape)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Quanto ------------------------------------------------------------------------------------------


@pytest.fixture
def quanto(monkeypatch):
    """The package, but for its unpacking in C++.

    That is built when it is first called, a minute's work; and where an earlier build was killed,
    torch waits for its lock without end.
    """
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("optimum.quanto")

    def unpack(packed, bits):
        rows = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.cat(rows)

    monkeypatch.setattr(torch.ops.quanto, "unpack", unpack)
    return package


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [0, -1])
def test_quanto_equals_optimum_quanto(bits, axis, quanto):
    import torch

    qtype = quanto.qint4 if bits == 4 else quanto.qint2
    x = normal(64, 2, 128) + 3 * normal(1, 2, 128, seed=1)
    axis_name = "hidden" if axis == 0 else "tokens"
    ours = quantizer_of(f"quanto:bits={bits},axis={axis_name},scale_dtype=float32")
    payload, decoded = encode(ours, x)
    codes = packing.unpack(payload.codes, bits, 128).reshape(x.shape)

    states = torch.tensor(x.transpose(1, 0, 2)[None])  # [B, H, T, D]
    scale, shift = quanto.MaxOptimizer()(states, qtype, axis, 64)
    theirs = quanto.quantize_weight(states, qtype, axis, scale, shift, 64)
    back = lambda t: t.numpy()[0].transpose(1, 0, 2)
    np.testing.assert_allclose(decoded, back(theirs.dequantize()), atol=1e-6)
    if axis == 0:  # rows of 64 channels
        their_scale = back(scale.reshape(1, 2, 64, 2))
        their_codes = back(theirs._data.unpack().reshape(states.shape))
    else:  # rows of 64 tokens, a column for every channel and head
        their_scale = scale.numpy().reshape(1, 128, 2).swapaxes(1, 2)
        their_codes = theirs._data.unpack().numpy().reshape(64, 128, 2).swapaxes(1, 2)
    np.testing.assert_allclose(payload.scale.ravel(), their_scale.ravel(), rtol=2e-7)
    np.testing.assert_array_equal(codes, their_codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extremes_of_a_group_are_exact_and_grids_survive(bits):
    x = 5 * normal(64, 2, 64)
    for axis, along in (("hidden", -1), ("tokens", 0)):
        quantizer = quantizer_of(f"quanto:bits={bits},axis={axis},scale_dtype=float32")
        decoded = np.asarray(encode(quantizer, x)[1])
        np.testing.assert_allclose(decoded.min(along), x.min(along), atol=2e-6)
        np.testing.assert_allclose(decoded.max(along), x.max(along), atol=2e-6)
    grid = np.random.default_rng(0).integers(0, 2**bits, (4, 2, 64))
    grid[..., 0], grid[..., 1] = 0, 2**bits - 1  # so that the step is 1
    grid = (grid - 3).astype(np.float32)
    np.testing.assert_array_equal(encode(quantizer_of(f"quanto:bits={bits}"), grid)[1], grid)


@pytest.mark.parametrize("scheme", ["quanto", "hqq"])
def test_constant_groups_decode_to_their_value(scheme):
    x = np.broadcast_to(np.array([0, 1.5, -3, 2.0**-20], np.float32)[:, None, None], (4, 2, 64))
    for bits in (2, 8):
        np.testing.assert_array_equal(encode(quantizer_of(f"{scheme}:bits={bits}"), x)[1], x)


@pytest.mark.parametrize("scheme", ["quanto", "hqq"])
@pytest.mark.parametrize("bits, token_head_bytes", [(2, 40), (3, 56), (4, 72), (8, 136)])
def test_containers(scheme, bits, token_head_bytes):
    """quanto_hqq.md, section 3: 4.5 and 2.5 bits; 3 bits take 3.0 and not 3.5."""
    sizes = dict(num_layers=1, batch=1, max_len=512, num_kv_heads=32, head_dim=128)
    for axis in ("hidden", "tokens"):
        cache = nq.schemes.get(f"{scheme}:bits={bits},axis={axis}").abstract(**sizes)
        assert cache.stored_bits == bits + 0.5
        assert cache.token_bytes == 2 * 32 * token_head_bytes


@pytest.mark.parametrize("scheme", ["quanto", "hqq"])
def test_blocks_are_counted_from_the_start_of_each_sequence(scheme):
    layer = nq.schemes.get(scheme).layer(SHAPE)
    assert layer.key_window == layer.value_window == Window(chunk=128)
    encoded = [layer.key_window.encoded(n) for n in (1, 127, 128, 129, 200, 256)]
    assert encoded == [0, 0, 128, 128, 128, 256]
    assert nq.schemes.get(f"{scheme}:residual=0").layer(SHAPE).key_window.immediate


# HQQ ---------------------------------------------------------------------------------------------


def hqq_oracle(x, bits, iterations):
    """(scale, zero in units of x) of blocks `x` [blocks, size], from the published formulas."""
    x = x.astype(np.float64)
    top = 2**bits - 1
    s = top / (x.max(1, keepdims=True) - x.min(1, keepdims=True))
    z = -x.min(1, keepdims=True) * s
    for _ in range(iterations):
        q = np.clip(np.round(x * s + z), 0, top)
        d = x - (q - z) / s
        size = np.maximum(np.abs(d), 1e-12)
        e = np.sign(d) * np.maximum(size - size ** (0.7 - 1) / 10, 0)
        z = np.mean(q - (x - e) * s, axis=1, keepdims=True)
    return 1 / s, -z / s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_follows_the_published_iteration(bits):
    x = np.concatenate([normal(300, 1, 64), 50 * normal(100, 1, 64, seed=1) + 100])
    for iterations in (1, 20):
        hqq = HQQQuantizer(bits=bits, block_size=64, iterations=iterations, scale_dtype=jnp.float32)
        payload, _ = encode(hqq, x)
        scale, zero = hqq_oracle(x[:, 0], bits, iterations)
        np.testing.assert_allclose(payload.scale[:, 0], scale, rtol=1e-5)
        # Rounding may take a tie the other way, and its block then goes another way too.
        error = np.abs(np.asarray(payload.zero[:, 0]) - zero) / scale
        assert np.mean(error < 1e-4) > 0.99 and error.max() < 0.05


@pytest.fixture(scope="module")
def hqq_package():
    """(hqq's quantizer, the module of its solver)."""
    torch = pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        # Its linear layers would load torch's compiler: seconds, and deprecated parts of torch.
        patch.setattr(torch, "compile", lambda *args, **options: lambda function: function)
        quantize = pytest.importorskip("hqq.core.quantize", reason="the package hqq (extra: test)")
    return quantize.Quantizer, sys.modules["hqq.core.optimize"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_equals_the_package(bits, axis, hqq_package, monkeypatch):
    """Scales, zero points, codes and decoded values, to rounding.

    The package stops early, and a different tensor stops elsewhere: its rounds are counted, and
    ours are as many. Both compute in float32, but the package x S + z and here (x - min) / s: a few
    units in the last place of numbers up to 2^bits, hence the tolerance of zero points. An element
    that close to the middle between two codes may take either, and if that happens in an early
    round, the zero point of its block moves by 1/64 step. On these numbers no block does, and one
    element of 16,384 at the end; which elements are close is a matter of the platform's last bits,
    so two blocks of 256 may.
    """
    import torch

    quantizer, solver = hqq_package
    x = normal(64, 2, 128) + 3 * normal(1, 2, 128, seed=1)
    rounds, step = [], solver.optimize_weights_proximal_legacy_step
    count = lambda *args: rounds.append(1) or step(*args)
    monkeypatch.setattr(solver, "optimize_weights_proximal_legacy_step", count)
    theirs, meta = quantizer.quantize(
        torch.tensor(x.reshape(64, 256)), nbits=bits, group_size=64, axis=axis, device="cpu",
        bitpack=False, compute_dtype=torch.float32,
    )  # fmt: skip
    meta["compute_dtype"] = torch.float32
    assert 2 <= len(rounds) <= 20
    ours = HQQQuantizer(
        bits=bits, block_size=64, axis=["tokens", "hidden"][axis], iterations=len(rounds),
        scale_dtype=jnp.float32,
    )  # fmt: skip
    payload, decoded = encode(ours, x)
    scale, zero = (np.asarray(a).ravel() for a in (payload.scale, payload.zero))
    their_scale, their_zero = (meta[n].numpy().ravel() for n in ("scale", "zero"))
    np.testing.assert_allclose(scale, their_scale, rtol=2e-7)
    error = np.abs(-zero / scale - their_zero)  # in steps
    agree = error < 1e-6 * 2**bits
    assert np.sum(~agree) <= 2 and error.max() < 0.05

    blocks = lambda a: (a.reshape(64, 256).T if axis == 0 else a.reshape(-1, 64))[agree]
    codes = blocks(np.asarray(packing.unpack(payload.codes, bits, 128)))
    same = codes == blocks(theirs.numpy())
    assert np.mean(same) > 0.9995
    back = blocks(quantizer.dequantize(theirs, meta).numpy())
    np.testing.assert_allclose(blocks(np.asarray(decoded))[same], back[same], atol=1e-5)


def test_hqq_with_no_iteration_is_min_max_to_the_bit():
    x = normal(64, 2, 64) + 5
    for options in ("bits=2,axis=hidden", "bits=3,axis=tokens", "bits=8,axis=hidden"):
        hqq, quanto = (quantizer_of(s + options) for s in ("hqq:iterations=0,", "quanto:"))
        chex.assert_trees_all_equal(encode(hqq, x)[0], encode(quanto, x)[0])


# quanto_hqq.md, table 6.1: mean squared error on N(0, 1), groups of 64.
MIN_MAX = {2: 0.2027, 3: 0.0371, 4: 0.00805, 8: 2.8e-5}
HQQ = {2: 0.187, 3: 0.0332, 4: 0.0074, 8: 2.6e-5}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errors_on_normal_data(bits):
    x = normal(16000, 1, 64)
    error = lambda spec: np.mean((np.asarray(encode(quantizer_of(spec), x)[1]) - x) ** 2, (1, 2))
    quanto, hqq = error(f"quanto:bits={bits}"), error(f"hqq:bits={bits}")
    np.testing.assert_allclose(quanto.mean(), MIN_MAX[bits], rtol=0.01)
    np.testing.assert_allclose(hqq.mean(), HQQ[bits], rtol=0.011)
    assert hqq.mean() < 0.95 * quanto.mean()
    if bits <= 4:  # of nearly every group, not only on average
        assert np.mean(hqq < quanto) > 0.7


def test_errors_on_heavy_tails():
    x = np.random.default_rng(0).standard_t(3, (16000, 1, 64)).astype(np.float32)
    error = lambda spec: np.mean((np.asarray(encode(quantizer_of(spec), x)[1]) - x) ** 2)
    np.testing.assert_allclose(error("quanto:bits=2"), 1.30, rtol=0.03)
    np.testing.assert_allclose(error("hqq:bits=2"), 1.06, rtol=0.03)


ENCODE_3 = HQQQuantizer(bits=3, block_size=16)


@given(
    hnp.arrays(
        np.float32, (3, 1, 16), elements=st.floats(-3e4, 3e4, width=32, allow_subnormal=False)
    )
)
@settings(max_examples=100, deadline=None)
def test_hqq_on_any_numbers(x):
    """What is decoded is finite, and off by at most a step and the rounding of the zero point."""
    payload, decoded = encode(ENCODE_3, x)
    assert np.all(np.isfinite(decoded))
    step = np.asarray(payload.scale, np.float64).reshape(3, 1)
    bound = step + np.abs(x).max(-1) * 2.0**-10 + 1e-6
    assert np.all(np.abs(np.asarray(decoded, np.float64) - x).max(-1) <= bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_hqq_keeps_what_is_not_finite_visible(bad):
    x = normal(2, 1, 64)
    x[0, 0, 5] = bad
    decoded = np.asarray(encode(quantizer_of("hqq"), x)[1])
    assert np.isnan(decoded[0]).all() and np.isfinite(decoded[1]).all()


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["quanto", "hqq"])
@pytest.mark.parametrize("options, message", [
    ("bits=1", "bits: expected one of 2, 3, 4, 8; got 1"),
    ("axis=channels", "axis: expected one of hidden, tokens; got 'channels'"),
    ("axis=tokens,residual=100", "positive multiple of group_size; got residual=100"),
    ("axis=tokens,residual=0", "positive multiple of group_size; got residual=0"),
    ("group_size=1", "expected group_size >= 2; got 1"),
    ("residual=1", "at least 2; got 1"),
    ("scale_dtype=int8", "expected one of float16, bfloat16, float32"),
])  # fmt: skip
def test_wrong_settings(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get(f"{scheme}:{options}")


@pytest.mark.parametrize("scheme", ["quanto", "hqq"])
def test_groups_stay_inside_a_head(scheme):
    with pytest.raises(ValueError, match=f"{scheme}: expected group_size to divide head_dim=80"):
        nq.schemes.get(scheme).layer(LayerShape(num_kv_heads=4, head_dim=80))
    # Over tokens they do anyway.
    nq.schemes.get(f"{scheme}:axis=tokens").layer(LayerShape(num_kv_heads=4, head_dim=80))


@pytest.mark.parametrize("settings, message", [
    (dict(bits=1, block_size=64), "bits must be 2, 3, 4 or 8 .*; got 1"),
    (dict(bits=4, block_size=64, iterations=-1), "iterations >= 0, .*; got -1"),
    (dict(bits=4, block_size=64, iterations=2.5), "iterations >= 0, a whole number; got 2.5"),
    (dict(bits=4, block_size=0), "block_size must be positive"),
    (dict(bits=4, block_size=2.5), "block_size must be positive, a whole number; got 2.5"),
])  # fmt: skip
def test_wrong_hqq_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HQQQuantizer(**settings)


def test_min_max_blocks_are_those_of_the_library():
    """The schemes add no grid of their own."""
    assert quantizer_of("quanto:bits=3") == BlockQuantizer(
        codebooks.uniform(3), block_size=64, scale="minmax"
    )
