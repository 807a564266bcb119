"""KVQuant: outliers, levels and ranges against float64 NumPy and the tables of the paper."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, KVQUANT_FILE, make_cache, make_qkv, write_kvquant_calibration
from hypothesis import given, settings
from hypothesis import strategies as st

import nqkv_jax as nq
from nqkv_jax.calibration import artifact
from nqkv_jax.cli import main
from nqkv_jax.quantizers import Context, DenseSparseChannels, DenseSparseTokens
from nqkv_jax.quantizers.dense_sparse import slots_per_side, token_range

SPEC = f"kvquant:calibration={KVQUANT_FILE}"
LEVELS = np.array([-0.9, -0.6, -0.35, -0.1, 0.12, 0.33, 0.6, 0.95], np.float32)
HEADS, HEAD_DIM = 3, 64
HIDDEN = HEADS * HEAD_DIM


@jax.jit
def coded(quantizer, x):
    """Payloads and decoded values of tokens [T, heads, head_dim], each alone."""
    encode = lambda row: quantizer.quantize(row[None], Context())
    payload = jax.vmap(encode)(x)
    return payload, jax.vmap(lambda p: quantizer.dequantize(p, Context())[0])(payload)


def channels_quantizer(m, seed=0, **fields):
    rng = np.random.default_rng(seed)
    shape = (HEADS, HEAD_DIM)
    return DenseSparseChannels(
        zero=jnp.asarray(3 * rng.normal(size=shape), jnp.float32),
        scale=jnp.asarray(rng.uniform(0.5, 2, size=shape), jnp.float32),
        levels=jnp.asarray(LEVELS), outliers=m, **fields,
    )  # fmt: skip


def oracle(x, zero, scale, levels, outlier, decoded=None):
    """f64 of the dense part, outliers exact: x, zero, scale and outlier [hidden]."""
    x, zero, scale = (np.asarray(a, np.float64) for a in (x, zero, scale))
    safe = np.where(scale > 0, scale, 1)
    nearest = np.abs(((x - zero) / safe)[:, None] - levels.astype(np.float64)).argmin(1)
    dense = (levels if decoded is None else decoded).astype(np.float64)[nearest] * scale + zero
    return np.where(outlier, x, dense)


def test_number_of_slots():
    """kvquant.md, section 2."""
    table = {768: 4, 1024: 6, 2048: 11, 2560: 13, 4096: 21, 5120: 26, 7168: 36}
    assert {h: slots_per_side(0.01, h) for h in table} == table
    assert slots_per_side(0, 4096) == 0


@pytest.mark.parametrize("hidden", [64, 192, 768, 1024, 3200])
def test_largest_m_are_those_beyond_the_quantiles(hidden):
    """Except for multiples of 200, where the quantile rule takes one fewer on each side."""
    x = np.random.default_rng(hidden).standard_t(3, hidden).astype(np.float32)
    m = slots_per_side(0.01, hidden)
    zero, scale, index = jax.jit(token_range, static_argnums=1)(x, m)
    upper, lower = np.quantile(x.astype(np.float64), [0.995, 0.005])
    beyond = np.flatnonzero((x >= upper) | (x <= lower))
    assert len(set(np.asarray(index).tolist())) == 2 * m
    if hidden % 200:
        assert set(beyond.tolist()) == set(np.asarray(index).tolist())
        rest = np.delete(x, beyond)
        np.testing.assert_allclose(zero, (rest.max() + rest.min()) / 2, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scale, (rest.max() - rest.min()) / 2, rtol=1e-3)
    else:
        # x >= quantile keeps the value that the quantile falls on.
        assert m == hidden // 200 + 1 and set(beyond) <= set(np.asarray(index).tolist())


def test_normal_float_levels():
    """kvquant.md: one outermost quantile for every width."""
    layer = lambda bits: nq.schemes.get(f"{SPEC},datatype=nf,bits={bits}").layer(
        nq.schemes.LayerShape(num_kv_heads=2, head_dim=32)
    )
    nf3 = [-1, -0.478629, -0.217142, 0, 0.16093, 0.337915, 0.562617, 1]
    for bits, levels in ((3, nf3), (2, [-1, 0, 0.337915, 1])):
        for quantizer in (layer(bits).key.inner, layer(bits).value):
            np.testing.assert_allclose(quantizer.levels, levels, atol=1e-6)
            assert quantizer.decoded_levels is None
    np.testing.assert_array_equal(
        layer(4).value.levels, np.asarray(nq.codebooks.NF4_LEVELS, np.float32)
    )


@pytest.mark.parametrize("m", [0, 1, 3])
def test_keys_match_the_oracle(m):
    quantizer = channels_quantizer(m)
    rng = np.random.default_rng(m)
    zero, scale = np.asarray(quantizer.zero), np.asarray(quantizer.scale)
    # Some tokens have more outliers than slots, some have none.
    width = np.repeat([0.3, 0.6, 1.2], 30)[:, None, None]
    x = (zero + scale * width * rng.normal(size=(90, HEADS, HEAD_DIM))).astype(np.float32)
    payload, decoded = coded(quantizer, x)
    most = 0
    for t in range(len(x)):
        relative = ((x[t].astype(np.float64) - zero) / scale).ravel()
        order = np.argsort(relative)
        outlier = np.zeros(HIDDEN, bool)
        if m:
            outlier[order[-m:]] = relative[order[-m:]] > 1
            outlier[order[:m]] |= relative[order[:m]] < -1
            used = np.asarray(payload.residuals[t]) != 0
            assert set(np.asarray(payload.channels[t])[used]) == set(np.flatnonzero(outlier))
            assert not np.any(np.asarray(payload.channels[t])[~used])
        most = max(most, np.sum(relative > 1))
        expected = oracle(x[t].ravel(), zero.ravel(), scale.ravel(), LEVELS, outlier)
        np.testing.assert_allclose(decoded[t].ravel(), expected, rtol=1e-3, atol=2e-3)
        # Residuals are the only thing that is rounded.
        dense = ~outlier
        np.testing.assert_allclose(decoded[t].ravel()[dense], expected[dense], atol=2e-6)
    assert most > m


@pytest.mark.parametrize("m", [0, 1, 4])
def test_values_match_the_oracle(m):
    quantizer = DenseSparseTokens(levels=jnp.asarray(LEVELS), outliers=m)
    x = np.random.default_rng(m).standard_t(3, (40, HEADS, HEAD_DIM)).astype(np.float32) + 1
    payload, decoded = coded(quantizer, x)
    for t in range(len(x)):
        flat = x[t].ravel().astype(np.float64)
        order = np.argsort(flat)
        outlier = np.zeros(HIDDEN, bool)
        outlier[order[:m]] = outlier[order[HIDDEN - m :]] = True
        zero, scale = np.float64(payload.zero[t]), np.float64(payload.scale[t])
        rest = flat[~outlier]
        np.testing.assert_allclose(zero, (rest.max() + rest.min()) / 2, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scale, (rest.max() - rest.min()) / 2, rtol=1e-3)
        wide = np.full(HIDDEN, 1.0)
        expected = oracle(flat, zero * wide, scale * wide, LEVELS, outlier)
        np.testing.assert_allclose(decoded[t].ravel(), expected, rtol=1e-3, atol=2e-3)


@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_dense_and_residual_add_up(seed, size, digits):
    """To the rounding of the residual, also where values tie or hardly differ."""
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_t(2, (1, HEADS, HEAD_DIM)), digits).astype(np.float32) * np.float32(
        size
    )
    for quantizer in (
        DenseSparseTokens(levels=jnp.asarray(LEVELS), outliers=4),
        channels_quantizer(2),
    ):
        payload, decoded = coded(quantizer, x)
        without = dataclasses.replace(payload, residuals=jnp.zeros_like(payload.residuals))
        dense = coded_dense(quantizer, without)
        x_flat, decoded, dense = (np.asarray(a, np.float64).ravel() for a in (x, decoded, dense))
        slots = np.asarray(payload.channels[0])[np.asarray(payload.residuals[0]) != 0]
        assert len(set(slots.tolist())) == len(slots)
        residual = np.abs(x_flat - dense)[slots]
        error = np.abs(decoded - x_flat)[slots]
        fine = residual < 60000
        assert np.all(error[fine] <= 2.0**-11 * residual[fine] + 2.0**-24 + 1e-6 * size)
        rest = np.delete(np.arange(HIDDEN), slots)
        np.testing.assert_array_equal(decoded[rest], dense[rest])


@jax.jit
def coded_dense(quantizer, payload):
    return jax.vmap(lambda p: quantizer.dequantize(p, Context())[0])(payload)


def test_ties_fill_no_slot_twice():
    """`>= threshold` would take all of them."""
    x = np.ones((3, HEADS, HEAD_DIM), np.float32)
    x[1, 0, :10] = 2.5
    x[2] = 0
    payload, decoded = coded(DenseSparseTokens(levels=jnp.asarray(LEVELS), outliers=4), x)
    for channels in np.asarray(payload.channels):
        assert len(set(channels.tolist())) == 8
    np.testing.assert_allclose(decoded[0], 1)
    np.testing.assert_array_equal(decoded[2], 0)


def test_q_norm_decodes_with_other_levels():
    x = np.random.default_rng(0).normal(size=(5, HEADS, HEAD_DIM)).astype(np.float32)
    moved = LEVELS * np.float32(1.1) - np.float32(0.02)
    for plain in (DenseSparseTokens(levels=jnp.asarray(LEVELS), outliers=2), channels_quantizer(2)):
        quantizer = dataclasses.replace(plain, decoded_levels=jnp.asarray(moved))
        (payload, decoded), (same, _) = coded(quantizer, x), coded(plain, x)
        chex.assert_trees_all_equal(payload.codes, same.codes)
        dense = ~np.isin(np.arange(HIDDEN), np.asarray(payload.channels[0]))
        if payload.scale is None:
            zero, scale = np.asarray(quantizer.zero).ravel(), np.asarray(quantizer.scale).ravel()
        else:
            zero, scale = (np.full(HIDDEN, np.float32(a[0])) for a in (payload.zero, payload.scale))
        expected = oracle(x[0].ravel(), zero, scale, LEVELS, ~dense, decoded=moved)
        np.testing.assert_allclose(decoded[0].ravel()[dense], expected[dense], atol=2e-6)
        np.testing.assert_allclose(decoded[0].ravel(), expected, rtol=1e-3, atol=2e-3)


def test_score_of_unrotated_keys():
    """kvquant.md: attention on packed keys, in the rotate-half convention."""
    layer = nq.schemes.get(SPEC).layer(nq.schemes.LayerShape(num_kv_heads=2, head_dim=32))
    rotary = nq.Rotary(inverse_frequencies=np.float32(10.0) ** -np.linspace(0, 2, 16, dtype="f4"))
    q, k, _ = make_qkv(12, batch=1)
    query = np.asarray(rotary(q[0, 11:], jnp.array([11]))[0, ::3], np.float64)  # [2, 32]
    theta = np.tile(np.asarray(rotary.inverse_frequencies, np.float64), 2)
    sign = np.repeat([1.0, -1.0], 16)
    for p in (0, 3, 11):
        payload = layer.key.quantize(k[0, p : p + 1], Context())
        key = np.asarray(layer.key.inner.dequantize(payload, Context())[0], np.float64)
        other = np.roll(query, 16, axis=-1)
        expected = key * (np.cos(p * theta) * query + sign * np.sin(p * theta) * other)
        rotated = layer.key.dequantize(payload, Context(positions=jnp.array([p]), rotary=rotary))
        rotated = np.asarray(rotated[0], np.float64)
        np.testing.assert_allclose(np.sum(rotated * query, -1), np.sum(expected, -1), atol=5e-5)


append = jax.jit(lambda cache, k, v, n: cache.layers[0].append(k, v, n, None))


def test_key_ranges_stay_as_calibrated():
    """From the token itself no outlier would ever be found."""
    _, k, v = make_qkv(40)
    cache = make_cache(SPEC, max_len=64)
    before = jax.tree.map(np.asarray, cache.layers[0].key.quantizer)
    k = np.asarray(k).copy()
    k[:, 20, 1, 7] += 100
    layer = cache.layers[0]
    for start, stop in ((0, 20), (20, 21), (21, 40)):
        count = jnp.full(BATCH, stop - start, jnp.int32)
        layer = append(
            nq.KVCache(layers=(layer,), scheme=""), k[:, start:stop], v[:, start:stop], count
        )
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, layer.key.quantizer), before)
    # The first token is exact, so that the body begins with token 1.
    np.testing.assert_array_equal(layer.key.sinks[:, 0], k[:, 0])
    np.testing.assert_array_equal(layer.value.sinks[:, 0], v[:, 0])
    body = jax.tree.map(lambda a: a[:, 19], layer.key.body)
    assert np.all(np.asarray(body.channels) == [[32 + 7, 0]] * BATCH) or np.all(
        np.asarray(body.channels)[:, 0] == 32 + 7
    )
    decoded = coded_dense(layer.key.quantizer.inner, body)
    np.testing.assert_allclose(decoded[:, 1, 7], k[:, 20, 1, 7], rtol=1e-3)


@pytest.mark.parametrize(
    "hidden, bits, outliers, keys, values",
    [
        (4096, 4, 0.01, 4.33, 4.34), (4096, 3, 0.01, 3.33, 3.34), (4096, 2, 0.01, 2.33, 2.34),
        (1024, 3, 0.01, 3.38, 3.41), (768, 3, 0.01, 3.33, 3.38),
        (4096, 4, 0, 4.00, 4.008), (1024, 3, 0, 3.00, 3.03), (768, 3, 0, 3.00, 3.04),
    ],
)  # fmt: skip
def test_stored_bits(hidden, bits, outliers, keys, values):
    """kvquant.md, section 3; without outliers keys have one byte per token for NaN."""
    heads, m = hidden // 64, slots_per_side(outliers, hidden)
    levels = jnp.linspace(-1, 1, 2**bits)
    wide = jnp.ones((heads, 64))
    x = jax.ShapeDtypeStruct((1, heads, 64), jnp.bfloat16)
    for quantizer, expected, exactly in (
        (DenseSparseChannels(zero=wide, scale=wide, levels=levels, outliers=m), keys, 8 * (not m)),
        (DenseSparseTokens(levels=levels, outliers=m), values, 32),
    ):
        quantizer.check(heads, 64)
        payload = jax.eval_shape(quantizer.quantize, x, Context())
        stored = sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(payload))
        assert stored == hidden * bits + 2 * m * 32 + exactly
        # The table is rounded.
        assert math.isclose(stored / hidden, expected, abs_tol=0.006 + (not m) * 8 / hidden)


def test_calibrated_arrays_are_counted():
    cache = make_cache(SPEC, max_len=65)
    calibrated = (2 * 64 + 8 + 8) * 4
    sinks, m = 1, 1
    per_token = 2 * (64 * 3 // 8 + 2 * m * 4) + 4
    lengths = 2 * BATCH * 4
    assert cache.nbytes == calibrated + BATCH * (64 * per_token + 2 * sinks * 64 * 4) + lengths


@pytest.mark.parametrize("outliers", [0, 0.01])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_no_number_stays_visible(outliers, bad):
    spec = f"kvquant:outliers={outliers},calibration={KVQUANT_FILE}"
    _, k, v = make_qkv(5)
    k = np.asarray(k).copy()
    k[0, 3, 0, 5] = bad
    cache = make_cache(spec, max_len=8)
    layer = append(cache, jnp.asarray(k), v, jnp.full(BATCH, 5, jnp.int32))
    decoded = np.stack([
        coded_dense(layer.key.quantizer.inner, jax.tree.map(lambda a, t=t: a[:, t], layer.key.body))
        for t in range(4)
    ])  # fmt: skip
    broken = np.isnan(decoded).any(axis=(2, 3))  # [body token, sequence]
    assert np.argwhere(broken).tolist() == [[2, 0]]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("kvquant:bits=5", "kvquant: bits: expected one of 2, 3, 4; got 5"),
        ("kvquant:datatype=int", "expected one of nuq, nf, uniform; got 'int'"),
        ("kvquant:datatype=nf,q_norm=on", "q_norm=on goes with datatype=nuq; got datatype=nf"),
        (f"{SPEC},outliers=0.02", "made for outliers=0.01, and serves that and 0; got outliers=0."),
        ("kvquant", "needs a calibration of the model. Make one with `nqkv calibrate kvquant"),
        ("kvquant:calibration=nowhere.safetensors", "nowhere.safetensors cannot be read: No such"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        make_cache(spec, max_len=8)


def test_a_calibration_of_another_shape_is_refused():
    assert nq.schemes.get("kvquant").name == "kvquant"  # without loading anything
    with pytest.raises(ValueError, match="2 layers of 2 KV heads x 32; got 1 layer of 4 x 32"):
        make_cache(SPEC, max_len=8, num_kv_heads=4)
    with pytest.raises(ValueError, match="2 layers of 2 KV heads x 32; got 3 layers of 2 x 32"):
        make_cache(SPEC, max_len=8, num_layers=3)


def test_a_calibration_that_changes_is_read_again(tmp_path):
    path = tmp_path / "a.safetensors"
    write_kvquant_calibration(path)
    scale = lambda: make_cache(f"kvquant:calibration={path}", max_len=4).layers[0].key.quantizer
    before = np.asarray(scale().inner.scale)
    arrays, about = artifact.load(path, "kvquant 1")
    changed = {name: 2 * a if "scale" in name else a for name, a in arrays.items()}
    kind = about.pop("kind")
    artifact.save(path, kind, changed, about)
    np.testing.assert_array_equal(scale().inner.scale, 2 * before)


def test_lists_of_all_schemes_say_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(nq.schemes, "names", lambda: ["kvquant", "none"])
    assert main(["plan", "--model", "opt-125m", "--memory", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["scheme"] for row in found["rows"]] == ["none"]
    assert "nqkv calibrate kvquant" in found["left_out"]["kvquant"]
    assert main(["plan", "--model", "opt-125m", "--memory", "1GiB"]) == 0
    assert "left out: kvquant: needs a calib" in capsys.readouterr().out
    assert main(["schemes"]) == 0
    assert "no bits: kvquant: needs a calib" in capsys.readouterr().out
    assert main(["plan", "--model", "opt-125m", "--memory", "1GiB", "--scheme", "kvquant"]) == 2
    assert "error: kvquant: needs a calibration" in capsys.readouterr().err
