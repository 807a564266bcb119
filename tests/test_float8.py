"""8-bit floats, to the bit against another implementation of the formats."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_cases import block, encode, round_trip, sample

from nqkv_jax import codebooks

pytestmark = pytest.mark.optimized

FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
both = pytest.mark.parametrize("name", FORMATS)


def numbers(name) -> np.ndarray:
    """Those of the format, increasing, without the second zero."""
    grid = np.arange(256, dtype=np.uint8).view(FORMATS[name]).astype(np.float32)
    return np.unique(grid[np.isfinite(grid)])


def cast(y: np.ndarray, name) -> np.ndarray:
    """The bytes of f32 `y`, without overflow and negative zeros."""
    top = float(ml_dtypes.finfo(FORMATS[name]).max)
    codes = np.clip(y, -top, top).astype(FORMATS[name]).view(np.uint8)
    return np.where(codes == 0x80, 0, codes)


@both
def test_levels_are_the_numbers_of_the_bytes(name):
    book = codebooks.Float8(name)
    expected = np.arange(256, dtype=np.uint8).view(FORMATS[name]).astype(np.float32)
    np.testing.assert_array_equal(np.float32(book.levels), expected)
    finite = np.isfinite(expected)
    codes = np.arange(256, dtype=np.uint8)[finite]
    np.testing.assert_array_equal(book.decode(jnp.asarray(codes)), expected[finite])
    np.testing.assert_array_equal(
        book.encode(jnp.asarray(expected[finite])), cast(expected[finite], name)
    )
    assert book.of_absmax == expected[finite].max()


@both
def test_ties_go_to_the_even_number(name):
    grid = numbers(name)
    ties = (grid[1:] + grid[:-1]) / 2
    y = np.concatenate([ties, np.nextafter(ties, grid[:-1]), np.nextafter(ties, grid[1:])])
    codes = codebooks.Float8(name).encode(jnp.asarray(y))
    np.testing.assert_array_equal(codes, cast(y, name))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.floats(width=32, allow_nan=False))
def test_codes_are_those_of_a_cast_that_saturates(name, y):
    y = np.float32([y])
    np.testing.assert_array_equal(codebooks.Float8(name).encode(jnp.asarray(y)), cast(y, name))


@both
def test_the_grid_round_trips(name):
    grid = np.resize(numbers(name), 256)  # contains the largest: the scale is 1
    decoded = round_trip(block(codebooks.Float8(name), 256), grid.reshape(1, 1, 256))
    np.testing.assert_array_equal(decoded[0, 0], grid)


@both
def test_blocks_saturate_where_the_stored_scale_was_rounded_down(name):
    book = codebooks.Float8(name)
    quantizer = block(book, 64)
    x = sample(quantizer, seed=11) * np.float32(3.3)
    payload = encode(quantizer, jnp.asarray(x))
    y = x / np.asarray(payload.scale).astype(np.float32).reshape(1, 4, 1)
    assert np.abs(y).max() > book.of_absmax
    np.testing.assert_array_equal(payload.codes, cast(y, name))


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format must be one of e4m3, e5m2; got 'e3m4'"):
        codebooks.Float8("e3m4")
