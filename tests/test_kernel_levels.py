"""From codes to the factors of products, as kernels compute them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import uneven

from nqkv_jax import codebooks, tiles
from nqkv_jax.pallas_kernels.decode_attention import (
    mosaic_gpu_levels,
    mosaic_gpu_words,
    mosaic_tpu_levels,
    mosaic_tpu_rounding,
)


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize(
    "codebook, tolerance",
    [
        (codebooks.cubic_normal(4, 128), 7e-4),
        (codebooks.cubic_normal(4, 128, signed=True), 1.1e-3),
        (codebooks.cubic_normal(3, 128), 1e-4),
        (codebooks.lloyd_max_normal(2), 2e-5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_cubics_that_bfloat16_holds(codebook, tolerance, in_bfloat16):
    """Up to a factor; rounding each level would leave up to 2^-9 of it."""
    levels = np.asarray(codebook.levels)
    slope, numbers = mosaic_tpu_rounding.rounded(codebook, in_bfloat16)
    dtype = jnp.bfloat16 if in_bfloat16 else np.float32
    t = (np.arange(levels.size) - (levels.size - 1) / 2).astype(dtype)
    one, two, three = np.asarray(numbers).astype(dtype)
    factors = t * (t * (t * three + two) + one) if two else t * (t * t * three + one)
    factors = factors.astype(jnp.bfloat16).astype(np.float64)
    np.testing.assert_allclose(
        slope * factors + codebook.coefficients[0], levels, rtol=0, atol=tolerance * levels.max()
    )


@pytest.mark.parametrize(
    "codebook, tolerance",
    [
        (codebooks.normal_float(4), 8e-4),
        (codebooks.normal_float(2), 1e-5),
        (codebooks.lloyd_max_normal(4), 3e-4),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tables_that_bfloat16_holds(codebook, tolerance):
    slope, factors = mosaic_tpu_rounding.rounded(codebook, False)
    found = slope * np.asarray(factors).astype(jnp.bfloat16).astype(np.float64)
    largest = max(codebook.levels)
    np.testing.assert_allclose(found, codebook.levels, rtol=0, atol=tolerance * largest)


OF_THE_GPU = (
    codebooks.cubic_normal(4, 128), codebooks.cubic_normal(4, 128, signed=True),
    codebooks.lloyd_max_normal(2), codebooks.integer(8), codebooks.uniform(2),
    codebooks.normal_float(4), codebooks.normal_float(2), codebooks.centred_integers(2),
    codebooks.cubic_normal(3, 128), codebooks.uniform(3), codebooks.centred_integers(3),
    codebooks.lloyd_max_normal(3), codebooks.lloyd_max_normal(4), codebooks.block_normal(4, 64),
    codebooks.block_normal(4, 256), codebooks.block_normal(4, 256, signed=True),
    codebooks.block_normal(3, 128, signed=True), codebooks.normal_float(3),
    codebooks.stepped_normal(4, 64), uneven(4), uneven(3),
)  # fmt: skip


@pytest.mark.parametrize("codebook", OF_THE_GPU, ids=lambda c: c.name)
def test_levels_in_the_gpu_kernel(codebook):
    """Of every code, in every field of a word, as good as products in float16."""
    bits, levels = codebook.bits, mosaic_gpu_levels.Levels(codebook)
    assert levels.served
    low_bits = 2 if bits == 3 else bits
    # Words turn in pairs: those beside must not be seen.
    codes = np.random.default_rng(0).integers(0, 2**bits, (16 // low_bits, 1000))
    codes[:, : 2**bits] = np.arange(2**bits)
    word = lambda parts, size: jnp.asarray(
        sum(c << size * k for k, c in enumerate(parts)).astype(np.uint16).view(np.int16)
    )
    rotate = functools.partial(mosaic_gpu_words.rotate_pairs, interpret=True)
    words, per_part = word(codes % 2**low_bits, low_bits), 8 // low_bits
    high_bits = [tiles.high_bit(k) for k in range(8)]
    for k, expected in enumerate(np.asarray(codebook.levels)[codes]):
        part, field = divmod(k, per_part)
        moved = [rotate(words, part * per_part * low_bits - levels.first)]
        if bits == 3:
            high = word((codes >> 2)[np.argsort(high_bits)], 1)
            high = rotate(high, high_bits[part * per_part] - levels.first - low_bits)
            moved = levels.merge(*moved, high, jnp.int16(0))
        found = levels.factor(moved[field % len(moved)], field, jnp.int16(0), interpret=True)
        assert found.dtype == jnp.float16
        found = np.asarray(found, np.float64)
        found = found * levels.unit(field) - levels.centre if levels.even else found
        found = (found + levels.ratio) * levels.slope
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8_in_the_gpu_kernel(format):
    """Every byte of a word, exactly."""
    codebook = codebooks.Float8(format)
    levels = mosaic_gpu_levels.Levels(codebook)
    assert levels.served
    # Words turn in pairs: those beside must not be seen.
    codes = np.stack([np.arange(256), np.random.default_rng(0).permutation(256)])
    words = jnp.asarray((codes[0] | codes[1] << 8).astype(np.uint16).view(np.int16))
    rotate = functools.partial(mosaic_gpu_words.rotate_pairs, interpret=True)
    for part, expected in enumerate(np.asarray(codebook.levels)[codes]):
        moved = rotate(words, 8 * part - levels.first)
        moved = levels.widen(moved, rotate(moved, levels.first - 8), jnp.int16(0))
        found = levels.factor(moved, 0, jnp.int16(0), interpret=True)
        assert found.dtype == jnp.float16
        finite = np.isfinite(expected)
        found = np.asarray(found, np.float64)[finite] * levels.slope
        np.testing.assert_array_equal(found, expected[finite])


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8_in_the_tpu_kernel(format):
    codebook, codes = codebooks.Float8(format), np.arange(256)
    expected = np.asarray(codebook.levels)
    finite = np.isfinite(expected)
    found = mosaic_tpu_levels.float32(jnp.asarray(codes, jnp.int32), codebook)
    np.testing.assert_array_equal(np.asarray(found)[finite], expected[finite])


def test_levels_of_every_smooth_codebook_are_computed():
    for bits in (2, 3, 4):
        found = [codebooks.normal_float(bits), codebooks.lloyd_max_normal(bits)]
        found += [
            make(bits, size, signed=signed)
            for make in (codebooks.block_normal, codebooks.cubic_normal)
            for size in (32, 64, 128, 256)
            for signed in (False, True)
        ]
        missing = [c.name for c in found if mosaic_gpu_levels.Levels(c).table]
        assert not missing, missing


def test_levels_that_the_gpu_kernel_looks_up():
    for bits in (1, 2, 3, 4):
        assert mosaic_gpu_levels.Levels(uneven(bits)).served
    for codebook in (codebooks.stepped_normal(4, 64), uneven(4)):
        levels = mosaic_gpu_levels.Levels(codebook)
        assert np.abs(levels.table).max() == 1 and levels.long
    assert not mosaic_gpu_levels.Levels(uneven(8)).served
