"""Block and float8 quantizers: identities, guards, bitwise determinism."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_cases import (
    EMPTY,
    NF4,
    QUANTIZERS,
    SCALE_DTYPES,
    block,
    decode,
    encode,
    every,
    jitted_round_trip,
    minmax,
    round_trip,
    sample,
)

from nqkv_jax import codebooks, packing
from nqkv_jax.quantizers import BlockQuantizer, FullPrecision
from nqkv_jax.quantizers.block import store

pytestmark = pytest.mark.optimized

# Laws of all quantizers -------------------------------------------------------------------------


@every
def test_one_group_or_many_store_the_same_bits(quantizer):
    """Eager, jitted, and mapped over different numbers of groups."""
    x = jnp.asarray(sample(quantizer, groups=100))

    def quantize(x):
        return quantizer.quantize(x, EMPTY)

    many = jax.jit(jax.vmap(quantize))(x)
    few = jax.jit(jax.vmap(quantize))(x[:7])
    single = jax.jit(quantize)
    for i in (0, 3, 6):
        expected = jax.tree.map(lambda a, i=i: a[i], many)
        chex.assert_trees_all_equal(expected, jax.tree.map(lambda a, i=i: a[i], few))
        chex.assert_trees_all_equal(expected, single(x[i]))
    if quantizer in (QUANTIZERS["nf4"], QUANTIZERS["kivi-value"], QUANTIZERS["rms"]):
        chex.assert_trees_all_equal(expected, quantize(x[6]))  # op by op: slow


@every
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_and_shapes(quantizer, dtype):
    x = jnp.asarray(sample(quantizer)).astype(dtype)
    payload = encode(quantizer, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        payload, jax.eval_shape(quantizer.quantize, x, EMPTY)
    )
    for out in (jnp.float32, jnp.bfloat16):
        decoded = decode(quantizer, payload, out)
        assert decoded.dtype == out
        chex.assert_shape(decoded, x.shape)
    upcast = encode(quantizer, x.astype(jnp.float32))
    if not isinstance(quantizer, FullPrecision):
        chex.assert_trees_all_equal(payload, upcast)


@every
def test_traces_once(quantizer):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def trip(quantizer, x):
        return quantizer.dequantize(quantizer.quantize(x, EMPTY), EMPTY)

    for seed in range(2):
        trip(quantizer, jnp.asarray(sample(quantizer, seed=seed)))


@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32), dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]))
def test_scales_are_rounded_as_a_cast_does(x, dtype):
    top = np.float32(ml_dtypes.finfo(dtype).max)
    cast = np.clip(np.float32(x), -top, top).astype(dtype)
    expected = np.where(np.isfinite(x), np.where(cast == 0, 0, cast), np.nan).astype(dtype)
    # XLA:CPU takes subnormal floats as 0.
    if np.isfinite(x) and 0 < abs(x) < np.finfo(np.float32).tiny:
        return
    found = store(jnp.float32(x), jnp.isfinite(jnp.float32(x)), jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_nan_stays_one(bits, dtype):
    """The first is what GPUs compute."""
    scale = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    assert jnp.isnan(store(scale, jnp.bool_(True), jnp.dtype(dtype)))


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_stays_visible(quantizer, bad):
    x = sample(quantizer)
    clean = round_trip(quantizer, x)
    x[0, 1, 5] = bad
    decoded = round_trip(quantizer, x)
    assert not np.isfinite(decoded[0, 1, 5])
    # Other blocks are untouched; 0, 1 and 3 are other heads of a block that may span all four.
    spoilt = ~np.isfinite(decoded)
    np.testing.assert_array_equal(decoded[~spoilt], clean[~spoilt])
    if getattr(quantizer, "block_size", None) not in (256, 128):
        assert not spoilt[:, [0, 2, 3]].any()


@every
def test_zeros_decode_to_zeros(quantizer):
    x = np.zeros((quantizer.group, 4, 64), np.float32)
    x[:, 2] = -0.0
    payload = encode(quantizer, jnp.asarray(x))
    np.testing.assert_array_equal(decode(quantizer, payload), x)


def test_zeros_of_either_sign_store_the_same_bits():
    for quantizer in (QUANTIZERS["kivi-value"], QUANTIZERS["q4_0"], QUANTIZERS["nf4"]):
        x = jnp.zeros((1, 4, 64), jnp.float32)
        payloads = [encode(quantizer, z) for z in (x, -x)]
        for a, b in zip(*map(jax.tree.leaves, payloads), strict=True):
            assert a.tobytes() == b.tobytes()


# Identities of block quantizers -----------------------------------------------------------------


def test_nf4_example():
    quantizer = block(NF4, 4)
    payload = encode(quantizer, jnp.array([[[0, 0.5, -1, 2]]], jnp.float32))
    np.testing.assert_array_equal(payload.scale, [[2.0]])
    np.testing.assert_array_equal(packing.unpack(payload.codes, 4, 4), [[[7, 10, 2, 15]]])
    decoded = decode(quantizer, payload)
    np.testing.assert_allclose(decoded, [[[0, 0.4922246, -1.0501461, 2]]], rtol=0, atol=5e-8)


def oracle(x, quantizer):
    """Codes, scale and zero in float64, given that the scale is rounded as stored."""
    book, n = quantizer.codebook, quantizer.block_size
    x = x.astype(np.float64)
    blocks = x.reshape(-1, n) if quantizer.axis == "hidden" else x.reshape(n, -1).T

    def stored(s):
        return s.astype(quantizer.scale_dtype).astype(np.float64)

    zero = np.zeros((len(blocks), 1))
    if quantizer.scale == "minmax":
        zero = stored(blocks.min(1, keepdims=True))
        scale = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / (2**book.bits - 1)
    elif quantizer.scale == "rms":
        scale = np.sqrt((blocks**2).mean(1, keepdims=True))
    else:
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        scale = extreme if quantizer.scale == "signed_absmax" else np.abs(extreme)
    scale = stored(scale)
    y = (blocks - zero) / scale
    decoded = np.array(book.levels)[np.abs(y[..., None] - np.array(book.levels)).argmin(-1)]
    decoded = decoded * scale + zero
    return decoded.reshape(x.shape) if quantizer.axis == "hidden" else decoded.T.reshape(x.shape)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize(
    "name", [n for n, q in QUANTIZERS.items() if isinstance(q, BlockQuantizer)]
)
def test_matches_the_oracle(name, scale_dtype):
    quantizer = QUANTIZERS[name]
    settings = {f: getattr(quantizer, f) for f in ("block_size", "axis", "scale")}
    quantizer = BlockQuantizer(quantizer.codebook, **settings, scale_dtype=scale_dtype)
    x = sample(quantizer, seed=7)
    differs = np.abs(round_trip(quantizer, x) - oracle(x, quantizer)) > 1e-5
    # Equal but for values within rounding of a threshold, and scales within rounding of a tie.
    assert differs.mean() < (0.005 if quantizer.scale == "rms" else 0.002)


@pytest.mark.parametrize("axis", ["hidden", "tokens"])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-3, 3), offset=st.floats(-5, 5))
def test_error_is_at_most_half_a_gap(axis, seed, exponent, offset):
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((32, 2, 16)) + offset) * 10.0**exponent).astype(np.float32)
    quantizers = [
        minmax(4, 32, axis=axis, scale_dtype=jnp.float32),
        block(NF4, 32, axis=axis, scale_dtype=jnp.float32),
    ]
    for quantizer in quantizers:
        groups = jnp.asarray(x.reshape(-1, quantizer.group, 2, 16))
        decoded = jax.vmap(lambda g, q=quantizer: jitted_round_trip(q, g))(groups)
        blocks = x.reshape(-1, 32) if axis == "hidden" else x.reshape(32, 32).T
        error = np.abs(np.asarray(decoded).reshape(x.shape) - x)
        error = error.reshape(-1, 32) if axis == "hidden" else error.reshape(32, 32).T
        if quantizer.scale == "minmax":
            bound = np.ptp(blocks, axis=1) / 15 / 2
        else:
            bound = np.abs(blocks).max(1) * np.diff(NF4.levels).max() / 2
        assert np.all(error <= bound[:, None] * (1 + 1e-4) + 1e-6 * np.abs(blocks).max())


@pytest.mark.parametrize("axis", ["hidden", "tokens"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_keeps_the_grid(axis, bits):
    """Values on the grid are exact; the ends are reproduced; a second time is the same."""
    rng = np.random.default_rng(bits)
    quantizer = minmax(bits, 32, axis=axis)
    x = rng.integers(0, 2**bits, (quantizer.group, 4, 64)).astype(np.float32)
    along = x.reshape(32, -1).T if axis == "tokens" else x.reshape(-1, 32)
    along[:, 0], along[:, 1] = 0, 2**bits - 1
    x = along.T.reshape(x.shape) if axis == "tokens" else along.reshape(x.shape)
    x = x * 0.125 - 3
    np.testing.assert_array_equal(round_trip(quantizer, x), x)

    exact = minmax(bits, 32, axis=axis, scale_dtype=jnp.float32)
    x = sample(exact, seed=1)
    decoded = round_trip(exact, x)

    def blocks(z):
        return z.reshape(32, -1).T if axis == "tokens" else z.reshape(-1, 32)

    np.testing.assert_allclose(blocks(decoded).min(1), blocks(x).min(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(blocks(decoded).max(1), blocks(x).max(1), rtol=0, atol=1e-6)
    again = decoded
    for _ in range(16):
        again = round_trip(exact, again)
    np.testing.assert_allclose(again, decoded, rtol=0, atol=2e-5)


def test_constant_block_decodes_to_its_stored_minimum():
    quantizer = minmax(2, 32)
    payload = encode(quantizer, jnp.full((1, 2, 32), 0.1, jnp.float32))
    assert not payload.codes.any() and not payload.scale.any()
    np.testing.assert_array_equal(
        decode(quantizer, payload), np.float32(np.float16(0.1)) * np.ones((1, 2, 32))
    )


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_extreme_element_decodes_to_the_stored_scale(scale_dtype):
    for name in ("absmax", "signed_absmax"):
        quantizer = block(NF4, 64, scale=name, scale_dtype=scale_dtype)
        x = sample(quantizer, seed=3)
        payload = encode(quantizer, jnp.asarray(x))
        blocks = x.reshape(-1, 64)
        at = np.abs(blocks).argmax(1)[:, None]
        decoded = np.asarray(decode(quantizer, payload)).reshape(-1, 64)
        extreme = np.take_along_axis(blocks, at, 1).astype(scale_dtype).astype(np.float32)
        np.testing.assert_array_equal(np.take_along_axis(decoded, at, 1), extreme)


def test_q4_0_extreme_is_exact():
    quantizer = QUANTIZERS["q4_0"]
    x = sample(quantizer)
    x[0, 0, 9] = -7.5
    payload = encode(quantizer, jnp.asarray(x))
    assert packing.unpack(payload.codes, 4, 64)[0, 0, 9] == 15
    assert decode(quantizer, payload)[0, 0, 9] == -7.5


def test_codes_survive_a_second_time():
    """Encoding decoded codes gives them back, where a block holds an outermost code."""
    quantizer = block(NF4, 64)
    payload = encode(quantizer, jnp.asarray(sample(quantizer)))
    again = encode(quantizer, decode(quantizer, payload))
    chex.assert_trees_all_equal(payload, again)


@pytest.mark.parametrize("name", ["nf4", "signed", "cubic3", "rms", "int8", "kivi-value", "fp8"])
def test_scales_beyond_float16(name):
    """Below, a block decodes to zeros (or to what a subnormal scale holds); above, it saturates."""
    quantizer = QUANTIZERS[name]
    unit = sample(quantizer, seed=5)
    tiny = round_trip(quantizer, unit * np.float32(1e-9))
    np.testing.assert_array_equal(tiny, np.zeros_like(unit))
    subnormal = round_trip(quantizer, unit * np.float32(1e-6))
    assert np.all(np.isfinite(subnormal)) and np.abs(subnormal).max() < 1e-5
    huge = round_trip(quantizer, unit * np.float32(1e6))
    assert np.all(np.isfinite(huge)) and np.abs(huge).max() >= 4e4
    wide = round_trip(minmax(4, 32, scale_dtype=jnp.float32), unit * np.float32(1e30))
    np.testing.assert_allclose(wide * np.float32(1e-30), unit, atol=0.25)


def test_float16_scales_are_rounded_to_nearest_also_below_normal():
    rng = np.random.default_rng(0)
    values = np.concatenate([
        rng.standard_normal(2000) * 10.0 ** rng.uniform(-9, 4, 2000),
        np.arange(0, 64) * 2.0**-26, [65504, 65519, 65520, 7e4, 6.1e-5, 6.097e-5],
    ]).astype(np.float32)  # fmt: skip
    x = np.broadcast_to(np.abs(values)[:, None, None, None], (len(values), 1, 1, 8))
    scale = jax.jit(jax.vmap(lambda x: block(NF4, 8).quantize(x, EMPTY).scale))(jnp.asarray(x))
    expected = np.minimum(np.abs(values), np.float32(65504)).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(scale)[:, 0, 0], expected)


def test_rms_neither_overflows_nor_underflows():
    quantizer = block(codebooks.lloyd_max_normal(4), 64, scale="rms", scale_dtype=jnp.float32)
    x = sample(quantizer)
    reference = round_trip(quantizer, x)
    for power in (2.0**-100, 2.0**100):
        scaled = round_trip(quantizer, x * np.float32(power))
        np.testing.assert_array_equal(scaled, reference * np.float32(power))


def test_payload_layout_and_bits():
    payload = encode(block(NF4, 256), jnp.zeros((1, 4, 128)))
    assert payload.codes.shape == (1, 4, 64) and payload.scale.shape == (1, 2)
    assert 8 * sum(a.nbytes for a in jax.tree.leaves(payload)) / 512 == 4.0625
    payload = encode(minmax(2, 32, axis="tokens"), jnp.zeros((32, 4, 128)))
    assert payload.codes.shape == (32, 4, 32)
    assert payload.scale.shape == payload.zero.shape == (4, 128)
    assert 8 * sum(a.nbytes for a in jax.tree.leaves(payload)) / (32 * 512) == 3.0
    payload = encode(block(codebooks.Float8(), 128), jnp.zeros((1, 4, 128)))
    assert 8 * sum(a.nbytes for a in jax.tree.leaves(payload)) / 512 == 8.125


@pytest.mark.parametrize("heads,head_dim", [(3, 64), (32, 80)])
def test_blocks_may_span_heads(heads, head_dim):
    quantizer = block(NF4, 96 if heads == 3 else 256)
    x = sample(quantizer, heads, head_dim)
    np.testing.assert_allclose(round_trip(quantizer, x), oracle(x, quantizer), atol=1e-6)


# Wrong use --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block(NF4, 256).check(3, 64), r"192: one of \[8, 12, 16, 24.*; got 256"),
        (lambda: block(NF4, 2).check(1, 7), "multiple of 2; got 7"),
        (lambda: block(codebooks.uniform(4), 32), "go together"),
        (lambda: block(NF4, 32, scale="minmax"), "go together"),
        (lambda: block(NF4, 32, scale="l2"), "scale must be one of"),
        (lambda: block(NF4, 32, axis="channels"), "axis must be"),
        (lambda: block(NF4, 0), "block_size must be positive"),
        (lambda: block(NF4, 2.5), "block_size must be positive, a whole number; got 2.5"),
        (lambda: block(NF4, 64.0), "block_size must be positive, a whole number; got 64.0"),
        (lambda: block(NF4, None), "block_size must be positive, a whole number; got None"),
        (lambda: block(NF4, True), "block_size must be positive, a whole number; got True"),
        (lambda: block("normal", 64), r"such as codebooks.normal_float\(4\); got 'normal'"),
        (lambda: block(codebooks.normal_float, 64), "codebook must be one of .*; got <"),
        (lambda: block(NF4, 32, scale_dtype=jnp.int8), "scale_dtype must be one of"),
        (lambda: block(NF4, 32, scale_dtype="fp16"), "scale_dtype must be one of .*; got 'fp16'"),
        (lambda: block(NF4, 32).quantize(jnp.zeros((2, 4, 64)), EMPTY), "group=1"),
        (lambda: minmax(2, 32, axis="tokens").quantize(jnp.zeros((16, 4, 64)), EMPTY), "group=32"),
        (lambda: block(NF4, 32).quantize(jnp.zeros((1, 4, 64), jnp.int32), EMPTY), "int32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_block_sizes_may_be_those_of_numpy():
    same = block(NF4, np.int64(64))
    assert same == block(NF4, 64) and type(same.block_size) is int


def test_static_and_hashable():
    assert jax.tree.leaves(QUANTIZERS["nf4"]) == []
    assert hash(block(NF4, 64)) == hash(block(NF4, 64, scale_dtype="float16"))
