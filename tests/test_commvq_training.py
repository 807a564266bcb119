"""How CommVQ learns: expectation maximisation for keys, codebooks and encoders for values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax.calibration import commvq_keys, commvq_values
from nqkv_jax.quantizers import Context

HEADS, HEAD_DIM = 2, 16
HALF, HIDDEN = HEAD_DIM // 2, HEADS * HEAD_DIM


def complex_of(x):
    """c128[..., n / 2] of halves."""
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return real + 1j * imaginary


# Expectation maximisation ------------------------------------------------------------------------


@functools.cache
def clustered():
    """f32[256, 16], around few points."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, HEAD_DIM))
    return (points[rng.integers(0, 40, 256)] + 0.3 * rng.normal(size=(256, HEAD_DIM))).astype("f4")


def soft_assignment(codebook, x, temperature):
    """Squared distances f64[vectors, 4096], and weights."""
    c = complex_of(codebook)
    centres = (c[:, None] + 1j * c[None]).reshape(4096, -1)
    x = complex_of(x)
    distance = np.sum(np.abs(x[:, None] - centres[None]) ** 2, axis=-1)
    weights = np.exp(-(distance - distance.min(axis=1, keepdims=True)) / temperature)
    return distance, weights / weights.sum(axis=1, keepdims=True)


def test_no_step_raises_the_free_energy():
    x, temperature = clustered(), 0.3
    step = jax.jit(commvq_keys.em_step)
    codebook, energy, errors = jnp.asarray(x[:64]), [], []
    for _ in range(8):
        distance, _ = soft_assignment(codebook, x, temperature)
        least = distance.min(axis=1)
        spread = np.exp(-(distance - least[:, None]) / temperature).sum(axis=1)
        energy.append(np.sum(least - temperature * np.log(spread)))
        codebook, error = step(codebook, jnp.asarray(x), jnp.float32(temperature))
        errors.append((error, least.mean()))
    assert np.all(np.diff(energy) < 1e-4 * np.abs(energy[0]))
    assert energy[-1] < energy[0] - 1
    np.testing.assert_allclose(*np.transpose(errors), rtol=1e-4)


def test_normal_equations():
    """commvq.md: T' S (T phi - m) = 0 with T of zeros and ones, [2 * 4096, 128]."""
    x, temperature = clustered()[:128], 0.5
    start = jnp.asarray(clustered()[128:192])
    found = np.asarray(jax.jit(commvq_keys.em_step)(start, jnp.asarray(x), jnp.float32(0.5))[0])
    _, weights = soft_assignment(start, x, temperature)
    a, b = (i.ravel() for i in np.indices((64, 64)))
    real, imaginary = np.zeros((2, 4096, 128))
    rows = np.arange(4096)
    real[rows, a], real[rows, 64 + b] = 1, -1  # x_a - y_b
    imaginary[rows, b], imaginary[rows, 64 + a] = 1, 1  # x_b + y_a
    T, S = np.concatenate([real, imaginary]), np.tile(weights.sum(axis=0), 2)
    for pair in range(0, HALF, 3):
        sums = [weights.T @ np.float64(x[:, j]) for j in (pair, HALF + pair)]
        phi = np.concatenate([found[:, pair], found[:, HALF + pair]]).astype(np.float64)
        residual = T.T @ (S * (T @ phi) - np.concatenate(sums))
        assert np.abs(residual).max() < 1e-4 * np.abs(T.T @ np.concatenate(sums)).max()


def test_the_best_step_is_kept():
    x = jnp.asarray(np.stack([clustered(), clustered()[:, ::-1]]))
    codebook, left, errors = commvq_keys.fit_level(x, jax.random.key(0), np.float32(1), steps=6)
    assert codebook.shape == (2, 64, HEAD_DIM) and codebook.dtype == jnp.float16
    errors = np.asarray(errors)
    np.testing.assert_array_equal(errors[:, -1], errors.min(axis=1))
    assert np.all(errors[:, -1] < 0.7 * errors[:, 0])
    for head in (0, 1):
        distance, _ = soft_assignment(codebook[head], x[head], 1.0)
        mean = np.mean(np.sum(np.float64(left[head]) ** 2, axis=1))
        # Codewords are rounded to float16.
        np.testing.assert_allclose([mean, errors[head, -1]], distance.min(axis=1).mean(), rtol=2e-3)


def test_number_of_levels():
    """commvq.md, section 3, for head_dim 128; else what stays within the bits."""
    levels = {(1, 128): 11, (2, 128): 21, (1, 64): 5, (2, 64): 10, (2, 80): 13}
    assert {at: commvq_keys.default_levels(*at) for at in levels} == levels


@functools.cache
def correlated(count=600):
    """f32[tokens, heads, head_dim] with variances that fall by a factor of 100, and a mean."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0]
    x = (rng.normal(size=(count, HIDDEN)) + 0.3) * np.logspace(0, -1, HIDDEN) @ basis
    return x.astype(np.float32).reshape(-1, HEADS, HEAD_DIM)


@jax.jit
def decoded(quantizer, x):
    """What tokens x [tokens, heads, head_dim], one by one, come back as."""
    round_trip = lambda x: quantizer.dequantize(quantizer.quantize(x, Context()), Context())
    return jax.vmap(round_trip)(x[:, None])[:, 0]


def error_of(quantizer, x):
    return np.sum((np.float64(decoded(quantizer, x)) - x) ** 2) / np.sum(np.float64(x) ** 2)


@pytest.mark.parametrize("bits, most", [pytest.param(1, 0.36, marks=pytest.mark.slow), (2, 0.13)])
def test_training_starts_with_scalar_codes_and_improves(bits, most):
    """Lloyd-Max levels lose 0.363 and 0.117 of the energy of components of equal variance."""
    train = functools.partial(
        commvq_values.train_values, correlated(), bits, batch=256, weight_decay=0.1, seed=0
    )
    begin = train(steps=1, learning_rate=1e-9)[0]
    before, size = error_of(begin, correlated()), bits * HIDDEN
    assert before < most
    assert begin.codebook.shape == (size, HEADS, HEAD_DIM)
    assert begin.encoder.inner.shape == (HIDDEN, 2 * size)
    if bits == 1:
        quantizer, losses = train(steps=60, learning_rate=2e-3)
        assert error_of(quantizer, correlated()) < 0.97 * before
        assert losses.shape == (60,) and losses[-10:].mean() < losses[:3].mean()


def test_training_on_few_values():
    """Of which some are 0, and that fill few dimensions."""
    x = np.zeros((300, HEADS, HEAD_DIM), np.float32)
    x[::100] = correlated()[:3]
    train = functools.partial(
        commvq_values.train_values, bits=1, steps=1, batch=256, learning_rate=1e-9,
        weight_decay=0.1, seed=0,
    )  # fmt: skip
    quantizer, _ = train(x)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(quantizer))
    with pytest.raises(ValueError, match="expected values of which some are not 0; got none"):
        train(0 * x)


def test_attention_is_that_of_the_oracle():
    rng = np.random.default_rng(0)
    x, queries, keys = (rng.normal(size=(7, n, 4)).astype(np.float32) for n in (2, 6, 2))
    found = np.asarray(
        commvq_values.attend(jnp.asarray(x), jnp.asarray(queries), jnp.asarray(keys))
    )
    for head in range(6):
        scores = np.float64(queries[:, head]) @ np.float64(keys[:, head // 3]).T
        weights = np.exp(scores) * np.tri(7)
        expected = weights / weights.sum(axis=1, keepdims=True) @ x[:, head // 3]
        np.testing.assert_allclose(found[:, head // 3, head % 3], expected, atol=1e-5)


def test_training_for_the_output_of_attention():
    """Where only every fourth token is looked at, the output gains what other tokens lose."""
    x = correlated(512)
    looked_at = np.arange(64) % 4 == 0
    # Those have keys of their own, and values of their own kind.
    keys = np.zeros((8, 64, HEADS, HEAD_DIM), np.float32)
    keys[:, looked_at, :, 0] = 8
    queries = np.zeros((8, 64, 2 * HEADS, HEAD_DIM), np.float32)
    queries[..., 0] = 1
    x = x.reshape(8, 64, HEADS, HEAD_DIM).copy()
    x[:, looked_at] = x[:, looked_at][..., ::-1]
    x = x.reshape(512, HEADS, HEAD_DIM)
    train = functools.partial(
        commvq_values.train_values, x, 1, steps=60, batch=64, learning_rate=2e-3, weight_decay=0.1,
        seed=0, scores=(queries, keys),
    )  # fmt: skip

    def output_error(quantizer):
        error = (decoded(quantizer, x) - x).reshape(8, 64, HEADS, HEAD_DIM)
        attend = jax.vmap(commvq_values.attend)
        energy = lambda a: np.sum(np.square(np.float64(attend(a, queries, keys))))
        return energy(error) / energy(jnp.asarray(x).reshape(error.shape))

    (plain, losses), (aimed, both) = train(), train(attention=4.0)
    assert output_error(aimed) < 0.9 * output_error(plain)
    assert error_of(aimed, x) > error_of(plain, x)
    assert both[0] > losses[0]
