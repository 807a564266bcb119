"""NSNQuant: the paper's algorithm in float64, its identities, and its traps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import ROTARY, make_cache, make_qkv

import nqkv_jax as nq
from nqkv_jax import vector_codebooks
from nqkv_jax.calibration import codebook
from nqkv_jax.quantizers.nsn import NSNKeys, NSNQuantizer
from nqkv_jax.rotary import Rotary

WINDOW, HEADS, DIM, FIRST = 16, 2, 32, 37  # of the small cases; the window begins at position 37
POSITIONS = FIRST + np.arange(WINDOW, dtype=np.int32)


# The algorithm in float64 ------------------------------------------------------------------------


def half(x):
    """Rounded to float16, as it is stored."""
    return np.float64(np.float32(x).astype(np.float16))


def rtn4(rows):
    """Rows [..., n] as they come back from 4 bits, and the steps [..., 1]."""
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    step, low = half(np.maximum((high - low) / 15, 1e-5)), half(low)
    return np.clip(np.round((rows - low) / step), 0, 15) * step + low, step


def rope(x, positions, rotary=ROTARY):
    """Rotate-half of the first channels of x [tokens, D]."""
    if rotary is None:
        return x
    angle = np.asarray(positions)[:, None] * np.float64(rotary.inverse_frequencies)
    cos, sin = (f(angle) * rotary.attention_factor for f in (np.cos, np.sin))
    n = angle.shape[1]
    a, b = x[:, :n], x[:, n : 2 * n]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[:, 2 * n :]], axis=1)


def nearest(z, bits):
    """z^ by exhaustive search in float64."""
    words = np.float64(vector_codebooks.normal(bits))
    parts = np.abs(z) if bits == 2 else z
    parts = parts.reshape(len(z), -1, 8)
    distance = np.sum((parts[:, :, None] - words) ** 2, axis=-1)
    decoded = words[np.argmin(distance, axis=-1)].reshape(z.shape)
    return np.where(z >= 0, decoded, -decoded) if bits == 2 else decoded


def oracle(x, bits, *, keys, rotary=ROTARY, normalise=True, hadamard=True, adjust=True, code=None):
    """What one head's window x [tokens, D] decodes to, and the steps in between, f64."""
    tokens, dim = x.shape
    h = scipy.linalg.hadamard(dim) / np.sqrt(dim) if hadamard else np.eye(dim)
    x = np.float64(x) if keys else np.float64(x) @ h.T
    root = lambda a: np.linalg.norm(a, axis=1, keepdims=True) / np.sqrt(dim)
    safe = lambda a: np.where(a > 0, a, 1)
    s1 = rtn4(root(x).T)[0].T if normalise else np.ones((tokens, 1))
    u = np.where(s1 > 0, x / safe(s1), 0)
    o, step = rtn4(u.mean(0).reshape(-1, min(dim, 32)))
    o = o.reshape(1, dim)
    w = u - o
    s2 = root(w)
    n = w / safe(s2)
    turn = (lambda a: rope(a, POSITIONS, rotary)) if keys else (lambda a: a)
    z = turn(n) @ h.T if keys else n
    decoded = nearest(z, bits) if code is None else code(z)
    inner = lambda a, b: np.sum(a * b, axis=1, keepdims=True)
    scale = s2 * inner(z, z) / np.maximum(inner(z, decoded), 1e-12) if adjust else s2
    scale = half(np.minimum(scale, 65504))
    mean = turn(np.repeat(o, tokens, 0))
    result = s1 * (scale * decoded @ h + mean) if keys else s1 * (scale * decoded + o) @ h
    return dict(result=result, s1=s1, s2=s2, o=o, step=step, u=u, w=w, n=n, z=z, decoded=decoded,
                scale=scale, mean=mean, h=h)  # fmt: skip


def sample(seed=0, window=WINDOW, heads=HEADS, dim=DIM):
    """Tokens f32 [window, heads, D] with channel means, and norms of their own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((window, heads, dim)) + 2 * rng.standard_normal((1, heads, dim))
    return np.float32(x * np.exp(rng.standard_normal((window, 1, 1)) / 2))


def layer(spec, dim=DIM):
    return nq.schemes.get(spec).layer(nq.schemes.LayerShape(num_kv_heads=HEADS, head_dim=dim))


def context(rotary=ROTARY, positions=POSITIONS):
    return nq.Context(rotary=rotary, positions=jnp.asarray(positions))


quantize = jax.jit(lambda quantizer, x, context: quantizer.quantize(x, context))
dequantize = jax.jit(lambda quantizer, payload, context: quantizer.dequantize(payload, context))
folded = jax.jit(lambda quantizer, payload, context: quantizer.dequantize_folded(payload, context))

round_trip = jax.jit(lambda quantizer, x: nq.dequantize(nq.quantize(x, quantizer)))

# Without RoPE: `test_without_rope_and_with_one_query_head_per_key`, and below.
OPTIONS = [dict(bits=1), dict(bits=2), dict(bits=1, normalise=False, hadamard=False, adjust=False)]


def spec_of(options):
    given = dict(window=WINDOW, residual=WINDOW) | options
    return "nsnquant:" + ",".join(f"{k}={v}" for k, v in given.items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_algorithm_in_float64(options):
    """Every step, in its order; traps 1, 2, 6 and 9 of the sheet would change most numbers."""
    scheme, x = layer(spec_of(options)), sample()
    for keys in (True, False):
        quantizer = scheme.key if keys else scheme.value
        where = context()
        payload = quantize(quantizer, x, where)
        found = np.float64(dequantize(quantizer, payload, where))
        for head in range(HEADS):
            expected = oracle(x[:, head], keys=keys, **options)
            error = np.abs(found[:, head] - expected["result"]) / expected["s1"]
            # A scale near the middle of two float16 may be the other one.
            assert np.median(error) < 1e-5 and error.max() < 5e-3
            np.testing.assert_allclose(payload.scale[head], expected["scale"][:, 0], rtol=1e-3)


def test_what_is_stored_where():
    """Decoded in NumPy from the documented layout alone."""
    scheme, x = layer("nsnquant", dim=64), sample(window=64, dim=64)
    payload = quantize(scheme.value.inner, x, nq.Context())
    assert {a.dtype.name for a in jax.tree.leaves(payload)} == {"uint8", "float16"}
    assert payload.scale.dtype == jnp.float16  # trap 3
    p = jax.tree.map(np.asarray, payload)
    assert p.codes.shape == p.signs.shape == (HEADS, 8, 64) and p.scale.shape == (HEADS, 64)
    assert p.norms.codes.shape == (HEADS, 32) and p.mean.codes.shape == (HEADS, 2, 16)
    nibbles = lambda a: (
        np.concatenate([a.codes & 15, a.codes >> 4], axis=-1) * a.step[..., None].astype(np.float64)
        + a.low[..., None].astype(np.float64)
    )
    z = np.float64(vector_codebooks.normal(2))[p.codes]  # [heads, D / 8, tokens, 8]
    bits = (p.signs[..., None] >> np.arange(8, dtype=np.uint8)) & 1
    z = np.where(bits == 1, z, -z).transpose(0, 2, 1, 3).reshape(HEADS, 64, 64)
    o = nibbles(p.mean).reshape(HEADS, 1, 64)
    decoded = nibbles(p.norms)[..., None] * (np.float64(p.scale)[..., None] * z + o)
    found = dequantize(scheme.value.inner, payload, nq.Context())
    np.testing.assert_allclose(np.swapaxes(found, 0, 1), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec, dim, bits",
    [
        ("nsnquant:bits=1", 128, 1 + (16 + 4.5 + 10) / 128),
        ("nsnquant", 128, 2 + (16 + 4.5 + 10) / 128),
        ("nsnquant:bits=1", 64, 1 + (16 + 4.5 + 5) / 64),
        ("nsnquant", 64, 2 + (16 + 4.5 + 5) / 64),
        ("nsnquant:bits=1,window=128", 128, 1 + (16 + 4.25 + 5) / 128),
        ("nsnquant:window=128", 128, 2 + (16 + 4.25 + 5) / 128),
        ("nsnquant:normalise=False", 64, 2 + (16 + 5) / 64),
    ],
)
def test_stored_bits(spec, dim, bits):
    sizes = dict(num_layers=1, batch=1, max_len=1024, num_kv_heads=3, head_dim=dim)
    assert nq.schemes.get(spec).abstract(**sizes).stored_bits == bits


def test_bits_and_bytes_of_the_sheet():
    """1.238 and 2.238, never 1 and 2; 634 and 1146 bytes per side of 32 heads of 128."""
    for bits, about, size in ((1, 1.238, 634), (2, 2.238, 1146)):
        scheme = nq.schemes.get("nsnquant", bits=bits)
        sizes = dict(num_layers=1, batch=1, max_len=1024, num_kv_heads=32, head_dim=128)
        assert scheme.abstract(**sizes).stored_bits == pytest.approx(about, abs=5e-4)
        assert scheme.abstract(**sizes).token_bytes == 2 * size


@pytest.mark.parametrize("spec, encoded", [("nsnquant", 192), ("nsnquant:bits=1", 128)])
def test_of_255_tokens(spec, encoded):
    for window in (layer(spec).key_window, layer(spec).value_window):
        assert window.encoded(255) == encoded and window.encoded(256) == 256


# Identities --------------------------------------------------------------------------------------


def test_algebra_in_float64():
    """Exact without the codebook; score and value identities; the error is orthogonal."""
    x, rng = np.float64(sample()[:, 0]), np.random.default_rng(1)
    keys = oracle(x, 2, keys=True, code=lambda z: z)
    exact = keys["s1"] * (keys["s2"] * keys["z"] @ keys["h"] + keys["mean"])
    np.testing.assert_allclose(exact, rope(x, POSITIONS), atol=1e-12)
    keys, values = oracle(x, 2, keys=True), oracle(x, 2, keys=False)
    q = rng.standard_normal(DIM)
    # Trap 10: H q once, not per token.
    scores = keys["scale"] * (keys["decoded"] @ (keys["h"] @ q))[:, None]
    scores = keys["s1"][:, 0] * (scores[:, 0] + keys["mean"] @ q)
    np.testing.assert_allclose(scores, keys["result"] @ q, atol=1e-11)
    a = rng.random((1, WINDOW))
    scale = values["s1"] * values["scale"]
    mixed = (a * scale.T) @ values["decoded"] + np.sum(a * values["s1"].T) * values["o"]
    np.testing.assert_allclose(mixed @ values["h"], a @ values["result"], atol=1e-12)
    # H and RoPE do not commute: trap 1.
    turned = rope(keys["n"] @ keys["h"].T, POSITIONS)
    assert np.abs(turned - keys["z"]).max() > 1


def test_steps_leave_what_the_paper_says():
    """From what is stored: no mean but for the rounding of o, norms sqrt(D), errors orthogonal."""
    quantizer, x = layer(spec_of(dict(bits=1))).value.inner, sample()
    payload = quantize(quantizer, x, nq.Context())
    decoded = np.float64(dequantize(quantizer, payload, nq.Context()))
    for head in range(HEADS):
        steps = oracle(x[:, head], 1, keys=False, hadamard=False)
        assert np.all(np.abs(steps["w"].mean(0)) <= steps["step"].max() / 2 + 1e-3)
        np.testing.assert_allclose(np.linalg.norm(steps["n"], axis=1), np.sqrt(DIM), rtol=1e-12)
        error = steps["w"] - (decoded[:, head] / steps["s1"] - steps["o"])
        along = np.sum(error * steps["w"], axis=1) / np.sum(steps["w"] ** 2, axis=1)
        assert np.abs(along).max() < 2**-10  # of a float16 scale
    unadjusted = oracle(x[:, 0], 1, keys=False, hadamard=False, adjust=False)
    error = unadjusted["z"] - unadjusted["decoded"]
    assert np.mean(np.sum(error * unadjusted["z"], axis=1)) / DIM > 0.1


@pytest.mark.parametrize("rotary", [ROTARY, None])
def test_folded_keys_meet_folded_queries(rotary):
    quantizer, x, where = layer(spec_of(dict(bits=2))).key, sample(), context(rotary)
    payload = quantize(quantizer, x, where)
    q = np.float32(np.random.default_rng(1).standard_normal((3, HEADS, DIM)))
    turned, shift = quantizer.fold_queries(jnp.asarray(q), where)
    mine = folded(quantizer, payload, where)
    assert shift is None and mine.shape == (WINDOW, HEADS, 2 * DIM)
    np.testing.assert_array_equal(turned[..., DIM:], q)
    scores = np.einsum("shd,thd->sht", turned, mine)
    expected = np.einsum("shd,thd->sht", q, dequantize(quantizer, payload, where))
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_folding_into_the_weights_is_the_same():
    """The paper's W_v <- H W_v, W_o <- W_o H^T: nothing else would change in the model."""
    rng = np.random.default_rng(2)
    quantizer = layer(spec_of(dict(bits=2))).value
    hidden, w_v = rng.standard_normal((WINDOW, 24)), rng.standard_normal((24, HEADS, DIM))
    w_o, weights = rng.standard_normal((HEADS, DIM, 24)), rng.random((HEADS, WINDOW))
    weights /= weights.sum(1, keepdims=True)
    h = scipy.linalg.hadamard(DIM) / np.sqrt(DIM)
    project = lambda w: np.float32(np.einsum("tc,chd->thd", hidden, w))
    plain = np.einsum("ht,thd,hdc->c", weights, project(w_v), w_o)
    both = np.einsum("ht,thd,hdc->c", weights, project(w_v @ h.T), np.einsum("de,hec->hdc", h, w_o))
    np.testing.assert_allclose(both, plain, atol=1e-4)  # exact without codes
    # The paper's: the inner quantizer on rotated projections, and no map on the output.
    payload = quantize(quantizer.inner, project(w_v @ h.T), nq.Context())
    paper = dequantize(quantizer.inner, payload, nq.Context())
    paper = np.einsum("ht,thd,hdc->c", weights, paper, np.einsum("de,hec->hdc", h, w_o))
    # Ours: the map on values as they are encoded, and its inverse on the output.
    ours = folded(quantizer, quantize(quantizer, project(w_v), nq.Context()), nq.Context())
    out = jnp.asarray(np.einsum("ht,thd->hd", weights, ours), jnp.float32)
    ours = np.einsum("hd,hdc->c", quantizer.unfold_output(out, nq.Context()), w_o)
    np.testing.assert_allclose(ours, paper, rtol=2e-3, atol=2e-2)
    assert np.abs(paper - plain).max() > 0.1


def test_position_0_and_no_angle_are_no_rope():
    quantizer, x = layer(spec_of(dict(bits=2))).key, sample()
    still = Rotary(inverse_frequencies=np.zeros(8, np.float32))
    plain, at_0, turned_by_0 = (
        np.asarray(dequantize(quantizer, quantize(quantizer, x, where), where))
        for where in (context(None), context(positions=0 * POSITIONS), context(still))
    )
    np.testing.assert_allclose(at_0, plain, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(turned_by_0, at_0)


def test_rope_that_scales():
    """YaRN multiplies rotated keys: their error only grows in proportion."""
    quantizer, x, relative = layer(spec_of(dict(bits=2))).key, sample(), []
    for factor in (1.0, 1.5):
        rotary = Rotary(
            inverse_frequencies=np.float32(10.0) ** -np.arange(0, 2, 0.125, dtype=np.float32),
            attention_factor=factor,
        )
        where = context(rotary)
        decoded = np.asarray(dequantize(quantizer, quantize(quantizer, x, where), where))
        expected = np.stack([rope(x[:, h], POSITIONS, rotary) for h in range(HEADS)], axis=1)
        relative.append(np.sum((decoded - expected) ** 2) / np.sum(expected**2))
    assert relative[1] == pytest.approx(relative[0], rel=0.01) and relative[0] < 0.03


# Extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [True, False])
def test_windows_without_a_direction_or_a_scale(keys):
    scheme, rng = layer(spec_of(dict(bits=2))), np.random.default_rng(3)
    quantizer = scheme.key if keys else scheme.value
    row = np.float32(rng.standard_normal((1, HEADS, DIM)))
    zero, one = np.zeros((WINDOW, HEADS, DIM), np.float32), sample()
    one[1:] = 0
    gap = sample()
    gap[5] = 0
    for x in (zero, np.repeat(row, WINDOW, 0), one, gap, 0 * one + 3, 1e-30 * one, 1e30 * one):
        where = context(None)
        decoded = np.asarray(dequantize(quantizer, quantize(quantizer, x, where), where))
        assert np.all(np.isfinite(decoded))
        # A token of zeros, or smaller than anything that float16 can say, is 0.
        np.testing.assert_array_equal(decoded[np.all(np.abs(x) < 1e-20, axis=(1, 2))], 0)
    x = np.repeat(row, WINDOW, 0)
    decoded = dequantize(quantizer, quantize(quantizer, x, context(None)), context(None))
    assert np.abs(np.asarray(decoded) - x).max() < 0.1 * np.abs(x).max()


def test_scales_beyond_float16_saturate():
    quantizer, x = NSNQuantizer(bits=2, window=WINDOW, normalise=False), 3e5 * sample()
    payload = quantize(quantizer, x, nq.Context())
    assert np.asarray(payload.scale).max() == 65504
    assert np.all(np.isfinite(dequantize(quantizer, payload, nq.Context())))


def test_zero_of_either_sign_is_positive():
    """Trap 5: a bit is x >= 0."""
    quantizer = NSNQuantizer(bits=2, window=WINDOW)
    z = np.zeros((WINDOW, HEADS, DIM), np.float32)
    for zeros in (z, -z):
        codes, signs = quantizer._encode(jnp.asarray(zeros))
        np.testing.assert_array_equal(signs, 255)
        assert np.all(np.asarray(quantizer._decode(codes, signs)) >= 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_window_and_head(bad):
    quantizer, x, where = layer(spec_of(dict(bits=2))).key, sample(), context()
    x[3, 1, 2] = bad
    decoded = np.asarray(dequantize(quantizer, quantize(quantizer, x, where), where))
    assert np.all(np.isnan(decoded[:, 1])) and np.all(np.isfinite(decoded[:, 0]))


@pytest.mark.parametrize(
    "spec, dim, message",
    [
        ("nsnquant:bits=3", 64, "bits: expected one of 1, 2; got 3"),
        ("nsnquant:window=63", 64, "window must be an even number of tokens; got 63"),
        ("nsnquant:window=0", 64, "window must be an even number of tokens; got 0"),
        ("nsnquant:residual=96", 64, "positive multiple of window=64; got 96"),
        ("nsnquant:residual=0", 64, "positive multiple of window=64; got 0"),
        ("nsnquant", 184, "a Hadamard transform, .*; got head_dim=184. Take turboquant"),
        ("nsnquant", 4, "positive multiple of 8 for bits=2, for the codebook; got 4"),
        ("nsnquant:bits=1", 72, "positive multiple of 16 for bits=1, for the codebook; got 72"),
    ],
)
def test_bad_settings(spec, dim, message):
    with pytest.raises(ValueError, match=message):
        make_cache(spec, max_len=70, head_dim=dim)


# Quality -----------------------------------------------------------------------------------------


@functools.cache
def normal_tokens():
    return np.random.default_rng(5).standard_normal((4, 64, 4, 128), dtype=np.float32)


@pytest.mark.parametrize("bits, least, mse, adjusted", [(1, 0.824, 0.321, 0.473),
                                                        (2, 0.952, 0.094, 0.104)])  # fmt: skip
def test_distortion_of_normal_tokens(bits, least, mse, adjusted):
    """The codebook alone, and the whole quantizer, on samples that it has not seen."""
    cosine = codebook.cosine(vector_codebooks.normal(bits), bits, seed=1234)
    assert cosine >= least
    assert 1 - cosine**2 <= mse and 1 / cosine**2 - 1 <= adjusted
    x = normal_tokens()
    for adjust, expected in ((False, 1 - cosine**2), (True, 1 / cosine**2 - 1)):
        quantizer = NSNQuantizer(bits=bits, adjust=adjust)
        decoded = np.asarray(round_trip(quantizer, x))
        # What is in the mean of the window, a 64th, is not in the codes.
        assert np.mean((x - decoded) ** 2) == pytest.approx(expected * 63 / 64, rel=0.02)


@pytest.mark.slow
def test_every_step_buys_something():
    """On tokens with norms of their own, and channels with means and scales of their own."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((64, 2, 64)) * np.exp(rng.standard_normal((1, 2, 64)))
    x = x + 4 * rng.standard_normal((1, 2, 64))
    x = np.float32(x * np.exp(rng.standard_normal((64, 1, 1))))

    def error(hadamard=True, **options):
        quantizer = NSNKeys(bits=2, hadamard=hadamard, **options)
        decoded = np.asarray(round_trip(quantizer, x))
        return np.mean(np.sum((x - decoded) ** 2, -1) / np.sum(x**2, -1))

    full = error()
    assert full < 0.9 * error(normalise=False) and full < 0.9 * error(hadamard=False)


def test_windows_of_128():
    """Encoded by whole windows; the rest waits, keys before RoPE."""
    _q, k, v = make_qkv(140, batch=1)
    cache = make_cache("nsnquant:bits=2,window=128", max_len=141, batch=1)
    layer = jax.jit(lambda c: c.append(k, v, jnp.full(1, 140, jnp.int32), None))(cache.layers[0])
    assert layer.key.body.words.shape == (1, 1, 2, 4, 128)
    payload = jax.tree.map(lambda a: a[0, 0], layer.value.body)
    decoded = np.asarray(dequantize(layer.value.quantizer, payload, nq.Context()))
    error = np.sum((decoded - np.asarray(v[0, :128])) ** 2) / np.sum(np.asarray(v[0, :128]) ** 2)
    assert 0.05 < error < 0.12
    np.testing.assert_array_equal(layer.value.residual[0, :12], v[0, 128:])
