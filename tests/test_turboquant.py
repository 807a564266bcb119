"""TurboQuant and QuaRot: published distortions, bias, bits, and that the rotations fold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

import nqkv_jax as nq
from nqkv_jax.quantizers import BlockQuantizer, Hadamard, ResidualSketch

DIM = 128
# turboquant.md 6.1: distortion of unit vectors on the sphere of D = 128, per bits.
MSE = {1: 0.361, 2: 0.116, 3: 0.034, 4: 0.0093}
BIAS = {1: -0.36, 2: -0.115, 3: -0.033, 4: -0.009}  # section 5: of <x, x~>
NORMAL = {1: 0.3634, 2: 0.1175, 3: 0.03455, 4: 0.00950}


@functools.lru_cache
def coder(spec, heads=1, head_dim=DIM):
    shape = nq.schemes.LayerShape(num_kv_heads=heads, head_dim=head_dim)
    return nq.schemes.get(spec).layer(shape).key


@functools.partial(jax.jit, static_argnums=0)
def encode(quantizer, x):
    """x [tokens, heads, D], each token by itself."""
    return jax.vmap(lambda row: quantizer.quantize(row[None], nq.Context()))(x)


@functools.partial(jax.jit, static_argnums=(0, 2))
def decode(quantizer, payload, folded=False):
    method = quantizer.dequantize_folded if folded else quantizer.dequantize
    return jax.vmap(lambda p: method(p, nq.Context())[0])(payload)


def round_trip(spec, x):
    quantizer = coder(spec, *x.shape[1:])
    return np.float64(decode(quantizer, encode(quantizer, jnp.asarray(x, jnp.float32))))


def sphere(tokens):
    """Uniform directions; of several norms, as one norm would be rounded one way every time."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 1, DIM))
    return x / np.linalg.norm(x, axis=-1, keepdims=True) * rng.uniform(1, 2, (tokens, 1, 1))


def bias(decoded, x):
    return np.mean(np.sum(x * decoded, -1) / np.sum(x**2, -1)) - 1


def distortion(decoded, x):
    return np.mean(np.sum((decoded - x) ** 2, -1)) / np.mean(np.sum(x**2, -1))


@pytest.mark.parametrize(
    "bits, rotation", [(1, "hadamard"), (2, "haar"), (3, "hadamard"), (4, "hadamard")]
)
def test_distortion_and_bias_of_mse(bits, rotation):
    x = sphere(4000)
    decoded = round_trip(f"turboquant:bits={bits},rotation={rotation}", x)
    # The published figures have two digits at 3 bits.
    np.testing.assert_allclose(distortion(decoded, x), MSE[bits], rtol=0.015)
    np.testing.assert_allclose(bias(decoded, x), BIAS[bits], rtol=0.03)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_normal_distortion_is_that_of_lloyd_and_max(bits):
    """Up to the norm, which is that of each vector: at D = 1024 almost that of the distribution."""
    x = np.random.default_rng(1).standard_normal((1000, 1, 1024))
    decoded = round_trip(f"turboquant:bits={bits}", x)
    np.testing.assert_allclose(distortion(decoded, x), NORMAL[bits], rtol=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prod_is_unbiased_and_its_error_is_the_published_one(bits):
    x = sphere(4000)
    decoded = round_trip(f"turboquant:bits={bits},variant=prod", x)
    # For queries of all directions alike D * E <q, x~ - x>^2 = E |x~ - x|^2.
    expected = {2: 0.569, 3: 0.181, 4: 0.053}[bits]
    np.testing.assert_allclose(distortion(decoded, x), expected, rtol=0.02)
    np.testing.assert_allclose(expected, np.pi / 2 * MSE[bits - 1], rtol=0.02)
    assert abs(bias(decoded, x)) < 3e-3


@pytest.mark.parametrize("rotation, expected", [("hadamard", 0.197), ("haar", 0.116)])
def test_a_row_with_one_large_channel(rotation, expected):
    """turboquant.md 6.2: one Hadamard transform leaves such a row with two values, not normal."""
    rng = np.random.default_rng(2)
    x = 0.1 * rng.standard_normal((4000, 1, DIM))
    x[np.arange(4000), 0, rng.integers(0, DIM, 4000)] += 10
    decoded = round_trip(f"turboquant:bits=2,rotation={rotation}", x)
    # One random matrix has 128 columns, and the error of a column varies.
    tolerance = 0.02 if rotation == "hadamard" else 0.03
    np.testing.assert_allclose(distortion(decoded, x), expected, rtol=tolerance)


@pytest.mark.parametrize(
    "spec, head_dim, bits",
    [(f"turboquant:bits={b}", 128, b + 16 / 128) for b in (1, 2, 3, 4)]
    + [(f"turboquant:bits={b},variant=prod", 128, b + 32 / 128) for b in (2, 3, 4)]
    + [
        ("turboquant", 64, 4.25),
        ("turboquant:rotation=haar", 80, 4.2),
        ("quarot", 128, 4.25),
        ("quarot:symmetric=True", 128, 4.125),
        ("quarot:heads_per_group=8", 128, 4.25),
    ],
)
def test_stored_bits(spec, head_dim, bits):
    sizes = dict(num_layers=1, batch=1, max_len=64, num_kv_heads=8, head_dim=head_dim)
    cache = nq.schemes.get(spec).abstract(**sizes)
    np.testing.assert_allclose(cache.stored_bits, bits, rtol=1e-12)
    if spec == "turboquant" and head_dim == 128:
        assert cache.token_bytes == 2 * 8 * 66


@pytest.mark.parametrize("spec", ["turboquant", "turboquant:variant=prod", "quarot"])
def test_extreme_norms(spec):
    x = np.tile(sphere(1), (5, 1, 1))
    x[0], x[1] = 0, x[1] * 6e4
    x[2] *= 1e30
    x[3, 0, 7], x[4, 0, 7] = np.nan, np.inf
    decoded = round_trip(spec, x)
    assert not decoded[0].any()
    # The root mean square is 1 / sqrt(D) of the norm: norms beyond 65504 are no problem yet.
    assert distortion(decoded[1], x[1]) < 0.1
    assert np.isfinite(decoded[2]).all()
    assert np.isnan(decoded[3:]).all()


@pytest.mark.parametrize(
    "spec", ["turboquant", "turboquant:bits=3,variant=prod", "turboquant:rotation=haar", "quarot"]
)
def test_rotations_move_to_queries_and_output(spec):
    rng = np.random.default_rng(3)
    x, q = (jnp.asarray(rng.standard_normal((n, 2, 64)), jnp.float32) for n in (30, 4))
    quantizer = coder(spec, 2, 64)
    payload = encode(quantizer, x)
    plain, folded = (np.float64(decode(quantizer, payload, f)) for f in (False, True))
    assert np.abs(plain - folded).max() > 0.5
    rotated, shift = quantizer.fold_queries(q, nq.Context())
    assert shift is None
    scores = [
        np.einsum("qhd,thd->qht", np.float64(a), b) for a, b in ((q, plain), (rotated, folded))
    ]
    np.testing.assert_allclose(*scores, atol=2e-5)
    weights = rng.dirichlet(np.ones(30), (4, 2))
    mixed = jnp.asarray(np.einsum("qht,thd->qhd", weights, folded), jnp.float32)
    out = quantizer.unfold_output(mixed, nq.Context())
    np.testing.assert_allclose(out, np.einsum("qht,thd->qhd", weights, plain), atol=1e-5)


def test_sketch_is_that_of_the_definition():
    """Against float64, but for signs of products that are zero up to the rounding of r."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((200, 1, DIM))
    inner = BlockQuantizer(nq.codebooks.lloyd_max_normal(2), block_size=DIM, scale="rms")
    sketch = ResidualSketch(inner, seed=5)
    first, whole = (
        encode(inner, jnp.asarray(x, jnp.float32)),
        encode(sketch, jnp.asarray(x, jnp.float32)),
    )
    residual = x - np.float64(decode(inner, first))
    gaussian = np.round(32 * np.random.default_rng(5).standard_normal((DIM, DIM))) / 32
    products = residual @ gaussian.T
    signs = np.where(products >= 0, 1, -1)
    norm = np.linalg.norm(residual, axis=-1, keepdims=True)
    expected = np.sqrt(np.pi / 2) / DIM * norm * (signs @ gaussian)
    found = np.float64(decode(sketch, whole)) - (x - residual)
    agree = np.all(np.abs(products) > 0.01 * norm, axis=-1)[:, 0]
    assert agree.mean() > 0.2
    np.testing.assert_allclose(found[agree], expected[agree], atol=2e-3)
    # All others differ by few signs.
    assert np.mean((found - expected) ** 2) < 0.005 * np.mean(expected**2)


def test_sign_of_zero_is_positive():
    sketch = ResidualSketch(BlockQuantizer(nq.codebooks.uniform(8), block_size=32, scale="minmax"))
    payload = encode(sketch, jnp.zeros((1, 1, 32)))
    np.testing.assert_array_equal(payload.signs, 255)
    np.testing.assert_array_equal(payload.rms, 0)


@pytest.mark.optimized
def test_signs_do_not_depend_on_how_many_tokens_come():
    x = jnp.asarray(np.random.default_rng(6).standard_normal((96, 2, 64)), jnp.bfloat16)
    quantizer = coder("turboquant:bits=2,variant=prod", 2, 64)
    many = encode(quantizer, x)
    for at in (0, 17, 95):
        one = encode(quantizer, x[at : at + 1])
        jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b[0]), many, one)


def test_grouped_heads_are_one_hadamard_matrix():
    """RotateKV's transform: over the channels of several heads; it refuses to be folded."""
    rotation = Hadamard(seed=2, size=32)
    x = np.random.default_rng(7).standard_normal((3, 4, 16))
    y = jax.jit(lambda x: rotation.apply((), x))(jnp.asarray(x, jnp.float32))
    signs = np.random.default_rng(2).integers(0, 2, 32) * 2 - 1
    matrix = linalg.hadamard(32) / np.sqrt(32)
    expected = (x.reshape(3, 2, 32) * signs) @ matrix
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(rotation.invert((), y), x, atol=1e-5)
    for call in (rotation.fold_query, rotation.unfold_output):
        with pytest.raises(ValueError, match="size=32 mixes KV heads of 16"):
            call((), y)


@pytest.mark.parametrize(
    "spec, shape, message",
    [
        ("turboquant:bits=1,variant=prod", None, "variant=prod: expected one of 2, 3, 4; got 1"),
        ("turboquant:variant=qjl", None, "expected one of mse, prod; got 'qjl'"),
        ("turboquant:rotation=givens", None, "expected one of hadamard, haar; got 'givens'"),
        ("turboquant", (2, 90), "a Hadamard transform, .*; got head_dim=90. Take rotation=haar"),
        ("quarot:heads_per_group=0", None, "heads_per_group >= 1; got 0"),
        (
            "quarot:heads_per_group=4",
            (6, 64),
            "6 heads of 64; got 4. Take heads_per_group=3",
        ),
        ("quarot:heads_per_group=5", (6, 64), "one of 1, 2, 3, 6 for 6 heads of 64; got 5"),
    ],
)
def test_bad_settings(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        scheme = nq.schemes.get(spec)
        heads, head_dim = shape
        scheme.init(num_layers=1, batch=1, max_len=8, num_kv_heads=heads, head_dim=head_dim)
