"""Levels against published tables and optimality conditions, codes against a float64 search."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from nqkv_jax import codebooks, rounding

ALL = [
    *(codebooks.uniform(b) for b in (1, 2, 3, 4, 8)),
    *(codebooks.integer(b, signed) for b in (2, 3, 4, 8) for signed in (False, True)),
    *(codebooks.normal_float(b) for b in (2, 3, 4)),
    *(codebooks.lloyd_max_normal(b) for b in (1, 2, 3, 4)),
    *(codebooks.uniform_normal(b) for b in (2, 3, 4)),
    *(codebooks.centred_integers(b) for b in (1, 4, 8)),
    *(codebooks.block_normal(b, 64, signed) for b in (1, 4) for signed in (False, True)),
    *(codebooks.cubic_normal(b, 64, signed) for b in (2, 3, 4) for signed in (False, True)),
    codebooks.stepped_normal(4, 64),
    codebooks.fit(np.random.default_rng(0).gamma(2.0, size=4000), 5),
]
every = pytest.mark.parametrize("book", ALL, ids=lambda book: book.name)

# The 15 thresholds of the reference implementation of NF4 (bitsandbytes).
NF4_THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784178118011,
]  # fmt: skip


@every
def test_laws(book):
    assert hash(book) == hash(codebooks.Codebook(**{f: getattr(book, f) for f in FIELDS}))
    codes = jnp.arange(2**book.bits, dtype=jnp.uint8)
    levels = jax.jit(book.decode)(codes)
    scale = np.abs(book.levels).max()
    np.testing.assert_allclose(levels, book.levels, rtol=0, atol=3e-7 * scale)
    np.testing.assert_array_equal(jax.jit(book.encode)(levels), codes)  # encode(decode(c)) == c
    assert book.decode(codes, jnp.bfloat16).dtype == jnp.bfloat16
    ends = book.encode(jnp.array([-1e30, 1e30, -np.inf, np.inf], jnp.float32))
    np.testing.assert_array_equal(ends, [0, 2**book.bits - 1] * 2)


def test_levels_of_any_sequence_are_a_tuple_of_floats():
    book = codebooks.uniform(2)
    for sequence in (np.array, list, lambda numbers: jnp.asarray(numbers, jnp.float32)):
        levels, coefficients = sequence(book.levels), sequence(book.coefficients)
        same = codebooks.Codebook(bits=2, levels=levels, coefficients=coefficients, name="u2")
        assert same == book and hash(same) == hash(book)
        assert {type(x) for x in same.levels + same.coefficients} == {float}


FIELDS = ("bits", "levels", "coefficients", "name")


@every
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_encode_takes_the_nearest_level(book, seed):
    low, high = book.levels[0] - 0.2, book.levels[-1] + 0.2
    y = np.random.default_rng(seed).uniform(low, high, 200).astype(np.float32)
    distance = np.abs(y.astype(np.float64)[:, None] - np.array(book.levels))
    codes = np.asarray(book.encode(jnp.asarray(y)))
    chosen = np.take_along_axis(distance, codes[:, None].astype(np.int64), axis=1)[:, 0]
    # Within float32 rounding of a threshold either neighbour is nearest.
    assert np.all(chosen <= distance.min(axis=1) + 1e-6 * (high - low))


def test_nf4_is_the_published_table():
    book = codebooks.normal_float(4)
    np.testing.assert_array_equal(book.levels, codebooks.NF4_LEVELS)
    np.testing.assert_allclose(book.thresholds, NF4_THRESHOLDS, rtol=0, atol=4e-8)
    constructed = codebooks.normal_float(4, offset=0.9677083)
    np.testing.assert_allclose(constructed.levels, book.levels, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("book", "levels"),
    [
        (codebooks.normal_float(3),
         [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1]),
        (codebooks.normal_float(2), [-1, 0, 0.3379152, 1]),
        (codebooks.normal_float(3, offset=0.5 * ((1 - 1 / 16) + (1 - 1 / 14))),
         [-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1]),
        (codebooks.lloyd_max_normal(1), [-0.7978846, 0.7978846]),
        (codebooks.lloyd_max_normal(2), [-1.5104176, -0.4527800, 0.4527800, 1.5104176]),
        (codebooks.centred_integers(2), [-1.5, -0.5, 0.5, 1.5]),
    ],
)  # fmt: skip
def test_tables(book, levels):
    np.testing.assert_allclose(book.levels, levels, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "bits", "distortion"),
    [
        *((codebooks.lloyd_max_normal, *row) for row in (
            (1, 0.3633802), (2, 0.1174818), (3, 0.0345478), (4, 0.0095010))),
        *((codebooks.uniform_normal, *row) for row in (
            (2, 0.1188463), (3, 0.0374396), (4, 0.0115429))),
    ],
)  # fmt: skip
def test_distortion(make, bits, distortion):
    levels = np.array(make(bits).levels)

    def cost(x):
        return np.min((x - levels) ** 2) * stats.norm.pdf(x)

    ends = [-12, *(levels[1:] + levels[:-1]) / 2, 12]
    parts = [integrate.quad(cost, a, b)[0] for a, b in itertools.pairwise(ends)]
    assert sum(parts) == pytest.approx(distortion, rel=1e-5)


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)])
def test_uniform_steps_are_those_of_max(bits, step):
    steps = np.diff(codebooks.uniform_normal(bits).levels)
    np.testing.assert_allclose(steps, step, rtol=0, atol=5e-5)


def test_block_normal_levels_are_centroids():
    """The optimality condition, on simulated blocks: level = E[s^2 y | code] / E[s^2 | code]."""
    x = np.random.default_rng(1).standard_normal((40000, 64))
    at = np.argmax(np.abs(x), axis=1)[:, None]
    for signed in (False, True):
        s = np.take_along_axis(x, at, 1) if signed else np.abs(np.take_along_axis(x, at, 1))
        y = x / s
        book = codebooks.block_normal(4, 64, signed)
        codes = np.searchsorted(book.thresholds, y)
        weight = np.broadcast_to(s**2, y.shape)
        mass = np.bincount(codes.ravel(), weight.ravel())
        centroid = np.bincount(codes.ravel(), (weight * y).ravel()) / mass
        np.testing.assert_allclose(book.levels, centroid, rtol=0, atol=1.5e-3)


def test_signed_block_levels_are_those_of_the_simulation():
    # Measured by simulation, to .01 (the optimum is flat).
    expected = [-.821, -.631, -.493, -.380, -.281, -.191, -.106, -.023,
                .059, .143, .229, .322, .426, .547, .702, .936]  # fmt: skip
    levels = codebooks.block_normal(4, 256, signed=True).levels
    np.testing.assert_allclose(levels, expected, rtol=0, atol=0.01)


def test_cubics_are_what_they_say():
    odd = codebooks.cubic_normal(4, 64)
    assert odd.coefficients[0] == odd.coefficients[2] == 0
    np.testing.assert_allclose(odd.levels, -np.array(odd.levels)[::-1], atol=1e-15)
    assert all(codebooks.cubic_normal(4, 64, signed=True).coefficients)


def test_steps_are_what_they_say():
    levels = np.array(codebooks.stepped_normal(4, 128).levels)
    u = np.arange(8)
    b0, b1, b2 = u & 1, u >> 1 & 1, u >> 2
    steps = 2 * u + 1 + b2 * b1 * (1 + 2 * b0)
    np.testing.assert_allclose(levels[8:], levels[8] * steps, rtol=1e-12)
    np.testing.assert_allclose(levels, -levels[::-1], rtol=1e-12)
    with pytest.raises(ValueError, match="bits must be one of"):
        codebooks.stepped_normal(3, 128)


@pytest.mark.parametrize("make", [codebooks.normal_float, codebooks.lloyd_max_normal])
def test_numbers_of_bits_are_whole_whatever_was_made_before(make):
    expected = make(4)
    same = make(np.int64(4))
    assert same == expected and type(same.bits) is int
    with pytest.raises(ValueError, match=r"bits must be one of .*; got 4\.0"):
        make(4.0)


def test_nf4_example_codes_and_ties():
    nf4 = codebooks.normal_float(4)
    y = jnp.array([0, 0.25, -0.5, 1], jnp.float32)
    np.testing.assert_array_equal(nf4.encode(y), [7, 10, 2, 15])
    np.testing.assert_array_equal(nf4.encode(jnp.asarray(nf4.thresholds)), np.arange(15))
    u2 = codebooks.uniform(2).encode(jnp.array([-0.6, 0.5, 1.5, 2.5, 9], jnp.float32))
    np.testing.assert_array_equal(u2, [0, 0, 2, 2, 3])  # half to even


def test_levels_far_from_zero():
    """Where floats are no finer than the steps, rounding by the bits of a sum would be off."""
    levels = tuple(6e6 + np.arange(4))
    far = codebooks.Codebook(bits=2, levels=levels, coefficients=(6e6 + 1.5, 1.0))
    np.testing.assert_array_equal(far.encode(jnp.asarray(levels, jnp.float32)), range(4))


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**20), 2.0**20, width=32))
def test_the_nearest_integer(x):
    x = np.float32(x)
    for value in (x, np.floor(x) + np.float32(0.5)):
        assert int(rounding.nearest_integer(jnp.float32(value))) == np.round(value)


def test_integer_codes():
    int8 = codebooks.integer(8)
    y = jnp.asarray(np.linspace(-1.0005, 1.0005, 999, dtype=np.float32))
    assert int(int8.encode(y).min()) == 1  # -128 never occurs
    assert float(int8.decode(jnp.uint8(255))) == 1.0
    assert float(codebooks.integer(4, signed=True).decode(jnp.uint8(15))) == 1.0


def test_fit_is_deterministic_and_no_worse_than_lloyd_max():
    x = np.random.default_rng(2).standard_normal(20000)
    book = codebooks.fit(x, 3)
    assert book == codebooks.fit(x, 3)
    best = np.array(codebooks.lloyd_max_normal(3).levels)

    def error(levels):
        return np.mean(np.min((x[:, None] - np.array(levels)) ** 2, axis=1))

    assert error(book.levels) <= error(best)
    np.testing.assert_allclose(book.levels, best, atol=0.1)


def test_fit_weights_are_counts():
    x, counts = np.array([-3.0, -1, 0, 1, 2, 7]), np.array([3, 1, 5, 2, 4, 1])
    np.testing.assert_allclose(
        codebooks.fit(x, 2, counts).levels, codebooks.fit(np.repeat(x, counts), 2).levels
    )


def test_fit_survives_outliers_and_repeated_values():
    x = np.random.default_rng(3).standard_normal(5000)
    levels = codebooks.fit(np.append(x, 1e6), 3).levels
    assert levels[-1] == pytest.approx(1e6) and levels[-2] < 4
    zeros = codebooks.fit(np.append(x, np.zeros(20000)), 3).levels
    assert np.abs(zeros).min() < 0.02
    np.testing.assert_allclose(codebooks.fit(np.repeat([1.0, 5, 6, 9], 7), 2).levels, [1, 5, 6, 9])


def test_thresholds_of_an_8_bit_fit():
    book = codebooks.fit(special.ndtri((np.arange(20000) + 0.5) / 20000), 8)
    codes = jnp.arange(256, dtype=jnp.uint8)
    chex.assert_trees_all_equal(book.encode(book.decode(codes)), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codebooks.normal_float(5), "bits must be one of"),
        (lambda: codebooks.normal_float(0), "normal_float: bits must be one of .*; got 0"),
        (lambda: codebooks.normal_float(2.5), "normal_float: bits must be one of .*; got 2.5"),
        (lambda: codebooks.normal_float("4"), "normal_float: bits must be one of .*; got '4'"),
        (lambda: codebooks.normal_float(4, "nf4"), "offset must be a quantile .*; got 'nf4'"),
        (lambda: codebooks.normal_float(4, 1.0), "offset must be a quantile .*; got 1.0"),
        (lambda: codebooks.uniform(5), "bits must be one of"),
        (lambda: codebooks.uniform(True), "uniform: bits must be one of .*; got True"),
        (lambda: codebooks.block_normal(4, 1), "block_size must be at least 2"),
        (lambda: codebooks.block_normal(4, 2.5), "at least 2, a whole number; got 2.5"),
        (lambda: codebooks.Codebook(bits=1.0, levels=(0.0, 1.0)), "got bits=1.0 and 2 levels"),
        (lambda: codebooks.fit([1.0, 2.0], 2), "needs at least"),
        (lambda: codebooks.fit([1.0, np.nan], 1), "must be finite"),
        (lambda: codebooks.fit([1.0, 2.0], 1, [1.0]), "2 samples and 1 weights"),
        (lambda: codebooks.Codebook(bits=1, levels=(1.0, 0.0)), "increasing"),
        (lambda: codebooks.Codebook(bits=2, levels=(0.0, 1.0)), "2 levels"),
        (lambda: codebooks.Codebook(bits=1, levels=(0.0, 1.0), coefficients=(0.0, 1.0)),
         "must give the levels"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
