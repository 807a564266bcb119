"""Errors on Gaussian data: published and independently measured figures."""

import jax
import jax.numpy as jnp
import pytest
from quantizer_cases import EMPTY, NF4, block, minmax

from nqkv_jax import codebooks


def slow(block_size):
    return pytest.param(block_size, marks=pytest.mark.slow)


def nmse(quantizer, num_samples=2**20):
    """Mean squared error over mean square of N(0, 1), to about 0.4 %."""
    x = jax.random.normal(jax.random.key(0), (num_samples // 1024, 1, 4, 256))
    if quantizer.group > 1:
        x = x.reshape(-1, quantizer.group, 4, 256)

    @jax.jit
    def measure(x):
        def one(x):
            return quantizer.dequantize(quantizer.quantize(x, EMPTY), EMPTY)

        return jnp.sum((x - jax.vmap(one)(x)) ** 2) / jnp.sum(x * x)

    return float(measure(x))


NF3_OWN = 0.5 * ((1 - 1 / 16) + (1 - 1 / 14))  # the outermost quantile for 8 levels
# (how to make the quantizer of a block size, NMSE at n = 32, 64, 128, 256), measured independently.
NORMAL_ERRORS = {
    "nf4": (lambda n: block(NF4, n), (0.00763, 0.00846, 0.00913, 0.00973)),
    "lloyd4": (
        lambda n: block(codebooks.lloyd_max_normal(4), n, scale="rms"),
        (0.00893, 0.00917, 0.00933, 0.00941),
    ),
    "u4": (lambda n: minmax(4, n), (0.00612, 0.00803, 0.00995, 0.01186)),
    "int4": (
        lambda n: block(codebooks.integer(4), n), (0.00942, 0.01157, 0.01377, 0.01594),
    ),
    "int4-signed": (
        lambda n: block(codebooks.integer(4, True), n, scale="signed_absmax"),
        (0.00738, 0.00900, 0.01064, 0.01228),
    ),
    "block4": (
        lambda n: block(codebooks.block_normal(4, n), n), (0.00662, 0.00762, 0.00838, 0.00895),
    ),
    "block4-signed": (
        lambda n: block(codebooks.block_normal(4, n, True), n, scale="signed_absmax"),
        (0.00628, 0.00728, 0.00807, 0.00869),
    ),
    "nf3": (lambda n: block(codebooks.normal_float(3), n), (0.0360, 0.0406, 0.0444, 0.0476)),
    "nf3-own-offset": (
        lambda n: block(codebooks.normal_float(3, NF3_OWN), n), (0.0335, 0.0389, 0.0440, 0.0486),
    ),
    "lloyd3": (
        lambda n: block(codebooks.lloyd_max_normal(3), n, scale="rms"),
        (0.0325, 0.0334, 0.0340, 0.0343),
    ),
    "u3": (lambda n: minmax(3, n), (0.0282, 0.0369, 0.0457, 0.0545)),
    "block3-signed": (
        lambda n: block(codebooks.block_normal(3, n, True), n, scale="signed_absmax"),
        (0.0262, 0.0299, 0.0325, 0.0342),
    ),
    "nf2": (lambda n: block(codebooks.normal_float(2), n), (0.268, 0.316, 0.359, 0.396)),
    "u2": (lambda n: minmax(2, n), (0.155, 0.202, 0.251, 0.299)),
    "u2-tokens": (lambda n: minmax(2, n, axis="tokens"), (0.155, 0.202, 0.251, 0.299)),
    "lloyd2": (
        lambda n: block(codebooks.lloyd_max_normal(2), n, scale="rms"),
        (0.112, 0.114, 0.116, 0.117),
    ),
    "block2": (lambda n: block(codebooks.block_normal(2, n), n), (0.113, 0.118, 0.120, 0.121)),
}  # fmt: skip


@pytest.mark.parametrize("block_size", [slow(32), 64, slow(128), 256])
@pytest.mark.parametrize("name", NORMAL_ERRORS)
def test_error_on_gaussian_blocks(name, block_size):
    make, expected = NORMAL_ERRORS[name]
    at = (32, 64, 128, 256).index(block_size)
    assert nmse(make(block_size)) == pytest.approx(expected[at], rel=0.01)


# The published figures come from a search with a resolution of 1 to 2 %.
CUBIC_ERRORS = {
    (4, False): (0.00778, 0.00858, 0.00908),
    (3, False): (0.0321, 0.0338, 0.0347),
    (2, False): (0.119, 0.120, 0.121),
    (4, True): (0.00738, 0.00819, 0.00885),
    (3, True): (0.0303, 0.0327, 0.0343),
    (2, True): (0.116, 0.119, 0.120),
}


@pytest.mark.parametrize("n", [64, slow(128), 256])
@pytest.mark.parametrize(("bits", "signed"), CUBIC_ERRORS)
def test_error_of_cubic_codebooks(bits, signed, n):
    book = codebooks.cubic_normal(bits, n, signed)
    scale = "signed_absmax" if signed else "absmax"
    expected = CUBIC_ERRORS[bits, signed][(64, 128, 256).index(n)]
    assert nmse(block(book, n, scale=scale)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("n, expected", [(64, 0.00785), (256, 0.00932)])
def test_error_of_stepped_levels(n, expected):
    error = nmse(block(codebooks.stepped_normal(4, n), n))
    assert error == pytest.approx(expected, rel=0.005)
    assert error < 1.025 * nmse(block(codebooks.cubic_normal(4, n), n))
    assert error < nmse(block(NF4, n))


def test_signed_extreme_gains_nothing_with_nf4():
    assert nmse(block(NF4, 256, scale="signed_absmax")) == pytest.approx(0.00973, rel=0.01)


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (block(codebooks.Float8("e4m3"), 128), 6.6e-4),
        # 2.8e-3 is published for one scale for all; with one per block it depends on where in an
        # octave the largest element falls.
        (block(codebooks.Float8("e5m2"), 128), 2.64e-3),
        (block(codebooks.integer(8), 128), 4.2e-5),
        (block(codebooks.integer(8), 64), 3.5e-5),
        (minmax(8, 128), 3.4e-5),
        (block(codebooks.integer(8), 32), 2.9e-5),
        (block(codebooks.integer(4, True), 32, scale="signed_absmax"), 7.4e-3),
    ],
    ids=["e4m3", "e5m2", "int8-128", "int8-64", "u8-128", "q8_0", "q4_0"],
)
def test_error_of_baselines(quantizer, expected):
    # Two digits are published.
    assert nmse(quantizer) == pytest.approx(expected, rel=0.02)
