"""CommVQ: codes, scores and folded values against float64 NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMMVQ_FILE, make_cache

import nqkv_jax as nq
from nqkv_jax.partial import mix
from nqkv_jax.quantizers import CommVQKeys, CommVQValues, Context
from nqkv_jax.quantizers.commvq import Encoder, encode_keys, times_i
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import LayerScheme, LayerShape

LEVELS, HEADS, HEAD_DIM = 3, 2, 16
COUNT = 30  # tokens of most tests, which share compiled programs
HALF, HIDDEN = HEAD_DIM // 2, HEADS * HEAD_DIM
ROTARY = nq.Rotary(inverse_frequencies=np.float32(10) ** -np.linspace(0, 3, HALF, dtype=np.float32))
SPEC = f"commvq:bits=1,calibration={COMMVQ_FILE}"


@functools.cache
def keys_quantizer(heads=HEADS, levels=LEVELS):
    rng = np.random.default_rng(0)
    sizes = 0.5 ** np.arange(1, levels + 1)[:, None, None, None] / 4
    codebook = rng.normal(size=(levels, heads, 64, HEAD_DIM)) * sizes
    return CommVQKeys(jnp.asarray(codebook, jnp.float16))


@functools.cache
def values_quantizer(size=2 * HIDDEN):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float16)
    return CommVQValues(
        codebook=draw(size, HEADS, HEAD_DIM),
        scale=jnp.asarray(rng.uniform(0.5, 2, (HEADS, HEAD_DIM)), jnp.float32),
        encoder=Encoder(inner=draw(HIDDEN, 40), inner_bias=draw(40), outer=draw(40, 2 * size),
                        outer_bias=draw(2 * size)),
    )  # fmt: skip


def tokens(count, heads=HEADS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, heads, HEAD_DIM)).astype(np.float32) * 3


@jax.jit
def coded(quantizer, groups):
    """Payloads and decoded values of groups [n, group, heads, head_dim]."""
    encode = lambda x: quantizer.quantize(x, Context())
    payload = jax.vmap(encode)(groups)
    return payload, jax.vmap(lambda p: quantizer.dequantize(p, Context()))(payload)


def complex_of(x):
    """c128[..., n / 2] of halves."""
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return real + 1j * imaginary


def indices(quantizer, payload):
    """a and b, [tokens, levels, heads]."""
    a, b = jax.vmap(quantizer._indices)(payload)
    return [np.asarray(i).reshape(-1, *i.shape[2:]) for i in (a, b)]


def summed(quantizer, a, b):
    """sum over levels of c_a + i c_b: c128[tokens, heads, head_dim / 2]."""
    book = complex_of(quantizer.codebook)
    level, head = np.arange(book.shape[0])[:, None], np.arange(book.shape[1])
    return np.sum(book[level, head, a] + 1j * book[level, head, b], axis=1)


# Keys --------------------------------------------------------------------------------------------


def test_the_product_with_i():
    """commvq.md: centre(a, b) = (x_a - y_b, y_a + x_b)."""
    c = np.random.default_rng(0).normal(size=(2, 6))
    (xa, ya), (xb, yb) = (np.split(row, 2) for row in c)
    centre = c[0] + np.asarray(times_i(jnp.asarray(c[1], jnp.float32)), np.float64)
    np.testing.assert_allclose(centre, np.concatenate([xa - yb, ya + xb]), atol=1e-6)


def test_keys_are_norms_times_sums_of_centres():
    quantizer, x = keys_quantizer(), tokens(COUNT)
    payload, decoded = coded(quantizer, x[:, None])
    norm = np.linalg.norm(x.reshape(COUNT, -1).astype(np.float64), axis=1)
    np.testing.assert_allclose(payload.norm[:, 0], norm, rtol=2**-11)
    expected = summed(quantizer, *indices(quantizer, payload))
    expected *= np.float64(payload.norm)[:, :, None]
    np.testing.assert_allclose(complex_of(decoded[:, 0]), expected, atol=1e-4)


def test_cheap_encoding_is_that_of_all_centres():
    """commvq.md: the same argmin as 4096 distances, level by level."""
    quantizer, x = keys_quantizer(), tokens(60, seed=3) / 20
    a, b = (np.asarray(i) for i in jax.jit(encode_keys)(jnp.asarray(x), quantizer.codebook))
    book, left = complex_of(quantizer.codebook), complex_of(x)
    for level in range(LEVELS):
        for head in range(HEADS):
            c = book[level, head]
            centres = (c[:, None] + 1j * c[None]).reshape(4096, HALF)
            distance = np.sum(np.abs(left[:, head, None] - centres[None]) ** 2, axis=-1)
            chosen = 64 * a[:, level, head] + b[:, level, head]
            np.testing.assert_array_equal(chosen, distance.argmin(axis=1))
            left[:, head] -= centres[chosen]


def test_pairs_are_ordered():
    """commvq.md: (b, a) is another centre. What is a centre is found again."""
    quantizer = keys_quantizer(levels=1)
    a, b = np.array([[3, 60], [60, 3]]).reshape(2, 2, 1, 1).repeat(HEADS, axis=-1)
    x = summed(quantizer, a, b)
    x = np.concatenate([x.real, x.imag], axis=-1).astype(np.float32)
    found = np.asarray(jax.jit(encode_keys)(jnp.asarray(x), quantizer.codebook))
    np.testing.assert_array_equal(found, [a, b])
    assert np.abs(x[0] - x[1]).max() > 0.1


def test_the_error_never_rises_with_the_level_if_a_codeword_is_zero():
    quantizer, x = CommVQKeys(keys_quantizer().codebook.at[:, :, 0].set(0)), tokens(COUNT)
    payload, _ = coded(quantizer, x[:, None])
    a, b = indices(quantizer, payload)
    unit, errors = complex_of(x) / np.float64(payload.norm)[:, :, None], []
    for levels in range(LEVELS + 1):
        first = dataclasses.replace(quantizer, codebook=quantizer.codebook[:levels])
        left = unit - summed(first, a[:, :levels], b[:, :levels])
        errors.append(np.sum(np.abs(left) ** 2, axis=-1))
    assert np.all(np.diff(errors, axis=0) <= 1e-6)
    assert np.sum(errors[-1]) < 0.7 * np.sum(errors[0])


def test_turning_keys_is_turning_codewords():
    """RoPE of what is decoded, and what codewords decode to that were turned before."""
    quantizer, x = keys_quantizer(), tokens(COUNT)
    turned = ROTARY(quantizer.codebook.astype(jnp.float32), jnp.full((LEVELS, HEADS), 23))
    payload, _ = coded(quantizer, x[:, None])

    @jax.jit
    def both(quantizer, turned, payload):
        context = Context(positions=jnp.array([23]), rotary=ROTARY)
        decode = lambda p: Unrotated(quantizer).dequantize(p, context)
        codewords = lambda p: turned.dequantize(p, Context())
        return jax.vmap(decode)(payload), jax.vmap(codewords)(payload)

    np.testing.assert_allclose(*both(quantizer, CommVQKeys(turned), payload), atol=1e-5)


@pytest.mark.parametrize("rotary", [ROTARY, None])
def test_scores_by_look_up(rotary):
    """commvq.md: the score identity, against turning and multiplying in float64."""
    quantizer, rng = keys_quantizer(), np.random.default_rng(2)
    x, q = tokens(COUNT), rng.normal(size=(COUNT, HEADS, HEAD_DIM)).astype(np.float32)
    positions = rng.integers(0, 5000, COUNT)
    payload, _ = coded(quantizer, x[:, None])
    key = summed(quantizer, *indices(quantizer, payload)) * np.float64(payload.norm)[:, :, None]

    @jax.jit
    def scores(q, payload, position):
        context = Context(positions=position[None], rotary=rotary)
        return quantizer.scores_by_lookup(q, payload, context)[0]

    found = jax.vmap(scores)(jnp.asarray(q), payload, jnp.asarray(positions, jnp.int32))
    if rotary is not None:
        # In the angles' own precision: at position 5,000 that of float32 is seen.
        angle = np.float64(np.float32(positions)[:, None] * rotary.inverse_frequencies)
        key = key * np.exp(1j * angle)[:, None]
    expected = np.sum(np.conj(complex_of(q)) * key, axis=-1).real
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_scores_by_look_up_need_all_channels_turned():
    quantizer = keys_quantizer()
    rotary = nq.Rotary(inverse_frequencies=np.ones(HALF // 2, np.float32))
    context = Context(positions=jnp.array([3]), rotary=rotary)

    def score(x, q):
        return quantizer.scores_by_lookup(q, quantizer.quantize(x, Context()), context)

    with pytest.raises(ValueError, match=r"needs RoPE on all 16 channels; got 8. Decode and turn"):
        jax.eval_shape(score, jnp.ones((1, HEADS, HEAD_DIM)), jnp.ones((HEADS, HEAD_DIM)))


@pytest.mark.parametrize("kind", ["key", "value"])
def test_zeros_and_what_is_no_number(kind):
    quantizer = keys_quantizer() if kind == "key" else values_quantizer()
    x = tokens(COUNT)
    x[0], x[1, 1, 3], x[2, 0, 0] = 0, np.nan, np.inf
    x[3] *= 1e-12
    payload, decoded = coded(quantizer, x[:, None])
    np.testing.assert_array_equal(decoded[0], 0)
    if kind == "key":
        np.testing.assert_array_equal(indices(quantizer, payload)[0][0], 0)
    assert np.isnan(decoded[1]).all() and np.isnan(decoded[2]).all()
    assert np.isfinite(decoded[3:]).all()
    again, _ = coded(quantizer, x[:, None])
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(payload), jax.tree.leaves(again), strict=True)
    )


def test_two_tokens_share_a_byte():
    """3 codes of 12 bits are 4.5 bytes."""
    quantizer, x = keys_quantizer(heads=1), tokens(COUNT, heads=1)
    assert quantizer.group == 2 and keys_quantizer().group == 1
    payload, decoded = coded(quantizer, x.reshape(-1, 2, 1, HEAD_DIM))
    assert payload.codes.shape == (COUNT // 2, 9) and payload.norm.shape == (COUNT // 2, 2)
    expected = summed(quantizer, *indices(quantizer, payload))
    expected *= np.linalg.norm(np.float64(x), axis=(1, 2))[:, None, None]
    decoded = complex_of(decoded.reshape(x.shape))
    np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-3)
    assert np.sum(np.abs(decoded - complex_of(x)) ** 2) < 0.9 * np.sum(x**2)


# Values ------------------------------------------------------------------------------------------


def value_oracle(quantizer, x, bits):
    """f64: w, and decoded values, for s f64[tokens, N]."""
    book = np.float64(quantizer.codebook).reshape(bits.shape[1], -1)
    scale = np.float64(quantizer.scale).ravel()
    made = bits @ book
    length = np.linalg.norm(x.reshape(len(x), -1) / scale, axis=1)
    weight = length / np.linalg.norm(made, axis=1)
    return weight, (scale * weight[:, None] * made).reshape(x.shape)


def bits_of_oracle(quantizer, x):
    """f64[tokens, N] and how clear the choices were [tokens, N / 2]."""
    encoder = {name: np.float64(a) for name, a in vars(quantizer.encoder).items()}
    u = np.float64(x).reshape(len(x), -1) / np.float64(quantizer.scale).ravel()
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    u = (u - u.mean(axis=1, keepdims=True)) / u.std(axis=1, keepdims=True)
    y = u @ encoder["inner"] + encoder["inner_bias"]
    erf = np.vectorize(math.erf)
    y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    logits = (y @ encoder["outer"] + encoder["outer_bias"]).reshape(len(x), -1, 4)
    top = np.sort(logits, axis=-1)
    # commvq.md: e0 -> 10, e1 -> 01, e2 -> 11, e3 -> 00.
    pairs = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])[logits.argmax(axis=-1)]
    return pairs.reshape(len(x), -1).astype(np.float64), top[..., 3] - top[..., 2]


@jax.jit
def folded(quantizer, payload):
    return jax.vmap(lambda p: quantizer.dequantize_folded(p, Context())[0, 0])(payload)


def test_values_match_the_oracle():
    quantizer, x = values_quantizer(), tokens(COUNT)
    payload, decoded = coded(quantizer, x[:, None])
    weighted = np.asarray(folded(quantizer, payload), np.float64)
    bits = (weighted > 0).astype(np.float64)
    expected, clear = bits_of_oracle(quantizer, x)
    clear = np.repeat(clear > 1e-4, 2, axis=1)
    np.testing.assert_array_equal(bits[clear], expected[clear])
    assert clear.mean() > 0.99 and 0.2 < bits.mean() < 0.8
    weight, values = value_oracle(quantizer, x, bits)
    np.testing.assert_allclose(payload.weight[:, 0], weight, rtol=2**-10)
    np.testing.assert_allclose(decoded[:, 0], values, rtol=2e-3, atol=2e-3)
    # The length is that of the value.
    norm = lambda x: np.linalg.norm(
        np.float64(x).reshape(COUNT, -1) / np.ravel(quantizer.scale), axis=1
    )
    np.testing.assert_allclose(norm(decoded), norm(x), rtol=2e-3)


def test_sums_of_bits_are_sums_of_values():
    """commvq.md: sum_t a_t v_t = scale * ((sum_t a_t w_t s_t) C), for every head's own weights."""
    quantizer, x = values_quantizer(), tokens(COUNT)
    payload, decoded = coded(quantizer, x[:, None])
    attention = np.random.default_rng(0).random((3, HEADS, COUNT)).astype(np.float32)
    mixed = jnp.einsum("ght,tn->ghn", attention, folded(quantizer, payload))
    found = jax.jit(lambda q, m: q.unfold_output(m, Context()))(quantizer, mixed)
    expected = np.einsum("ght,thd->ghd", np.float64(attention), np.float64(decoded[:, 0]))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_folded_values_of_one_head_are_not_repeated():
    """A tile of them has the bytes of one head."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 256), jnp.bool_)
    compiled = jax.jit(mix).lower(shape(1, 8, 4, 1, 256), shape(1, 256, 1, 512), mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 512 * 4
    rng = np.random.default_rng(0)
    weights, v = rng.random((2, 2, 3, 1, 5), np.float32), rng.random((2, 5, 1, 7), np.float32)
    found = mix(jnp.asarray(weights), jnp.asarray(v), jnp.ones((2, 1, 5), jnp.bool_))
    np.testing.assert_allclose(found, np.einsum("bhgst,btd->bhgsd", weights, v[:, :, 0]), rtol=1e-5)


# The scheme --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, levels, keys", [(1, 11, 1.03125), (2, 21, 1.96875)])
def test_stored_bits(bits, levels, keys):
    """commvq.md, section 3: d = 1024, head_dim 128; codebooks are bytes, but not among these."""
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float16)
    encoder = Encoder(inner=half(1024, 8), inner_bias=half(8), outer=half(8, 2048 * bits),
                      outer_bias=half(2048 * bits))  # fmt: skip
    key = CommVQKeys(half(levels, 8, 64, 128))
    value = CommVQValues(
        codebook=half(1024 * bits, 8, 128), scale=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        encoder=encoder,
    )  # fmt: skip
    window = nq.Window(chunk=128)
    scheme = LayerScheme(key=Unrotated(key), value=value, key_window=window, value_window=window)
    shape = LayerShape(num_kv_heads=8, head_dim=128)

    def init(key, value):
        own = dataclasses.replace(scheme, key=Unrotated(key), value=value)
        layer = own.init(shape, batch=1, max_len=1000, dtype=jnp.bfloat16)
        return nq.KVCache(layers=(layer,), scheme="")

    cache = jax.eval_shape(init, key, value)
    (layer,) = cache.layers
    assert layer.key.capacity == 7 * 128
    stored = lambda side: sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(side.body))
    assert stored(layer.key) == 7 * 128 * 1024 * (keys + 16 / 1024)
    assert stored(layer.value) == 7 * 128 * 1024 * (bits + 16 / 1024)
    assert cache.stored_bits == (keys + bits) / 2 + 16 / 1024
    book = layer.key.quantizer.inner.codebook
    assert book.size * 2 == levels * 2**17
    bodies = (stored(layer.key) + stored(layer.value)) / 8
    assert cache.nbytes - bodies > book.size * 2 + 2 * 1024 * bits * 1024


def test_residual_and_what_is_coded():
    """commvq.md, section 4: all whole chunks of 128 tokens, no sinks."""
    cache = make_cache(SPEC, max_len=300)
    layer = cache.layers[0]
    assert not layer.rotated and layer.key.num_sinks == 0
    for length in (0, 127, 128, 255, 256, 300):
        for side in (layer.key, layer.value):
            assert int(side.encoded(jnp.asarray(length))) == length // 128 * 128
    assert layer.key.capacity == layer.value.capacity == 256


@pytest.mark.parametrize(
    "spec, message",
    [
        ("commvq:bits=3", "commvq: bits: expected one of 1, 2; got 3"),
        ("commvq:bits=1", "needs a calibration of the model. .* commvq --model NAME .* --bits 1"),
        (f"commvq:calibration={COMMVQ_FILE}", "made for bits=1; got bits=2. Calibrate with --bits"),
        (f"{SPEC},residual=1", "residual is how many tokens wait .*; got 1"),
        ("commvq:calibration=nowhere", "the calibration nowhere cannot be read: No such file"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        make_cache(spec, max_len=8)


def test_a_calibration_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="2 layers of 2 KV heads x 32; got 1 layer of 4 x 32"):
        make_cache(SPEC, max_len=8, num_kv_heads=4)
    with pytest.raises(ValueError, match="2 layers of 2 KV heads x 32; got 3 layers of 2 x 32"):
        make_cache(SPEC, max_len=8, num_layers=3)


@pytest.mark.parametrize(
    "quantizer, heads, message",
    [
        (keys_quantizer(), 3, r"codebook must be \[levels, heads, 64, head_dim\] with 3 heads"),
        (values_quantizer(), 3, r"codebook must be \[N, heads, head_dim\] .* with 3 heads"),
        (values_quantizer(12), HEADS, "and N a multiple of 8; got .12, 2, 16"),
        (dataclasses.replace(values_quantizer(), encoder=values_quantizer(8).encoder), HEADS,
         "must map 32 numbers to 128 logits; got inner .32, 40., outer .40, 16"),
    ],
)  # fmt: skip
def test_arrays_of_other_shapes_are_refused(quantizer, heads, message):
    with pytest.raises(ValueError, match=message):
        quantizer.check(heads, HEAD_DIM)
