"""The layout of packed codes, against an oracle that places one code at a time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqkv_jax import packing

WORDS = (jnp.uint8, jnp.uint16)


def oracle_pack(codes: np.ndarray, bits: int, word_bits: int) -> np.ndarray:
    """One row of codes, by the definition in the docstring of the module."""
    if bits in (3, 5, 6, 7):
        low = 2 if bits == 3 else 4
        rows = oracle_pack(codes & (2**low - 1), low, word_bits), codes >> low
        return np.concatenate([rows[0], oracle_pack(rows[1], bits - low, word_bits)])
    count = len(codes) * bits // word_bits
    words = [0] * count
    for i, code in enumerate(codes.tolist()):
        words[i % count] |= code << (i // count * bits)
    return np.array(words, np.uint64)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bits", packing.SUPPORTED_BITS)
@settings(deadline=None, max_examples=10)
@given(multiple=st.sampled_from([1, 5]), seed=st.integers(0, 2**32 - 1))
def test_round_trip_and_layout(bits, word, multiple, seed):
    n, word_bits = 16 * multiple, jnp.dtype(word).itemsize * 8
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 3, n), dtype=np.uint8)
    packed = packing.pack(jnp.asarray(codes), bits, word)
    chex.assert_shape(packed, (2, 3, packing.packed_size(n, bits, word)))
    assert packed.dtype == word
    assert packed.nbytes * 8 == codes.size * bits  # 3 bits cost 3 bits
    rows = [oracle_pack(row, bits, word_bits) for row in codes.reshape(-1, n)]
    np.testing.assert_array_equal(packed.reshape(-1, packed.shape[-1]), np.stack(rows))
    unpacked = packing.unpack(packed, bits, n)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, codes)


def test_low_nibbles_are_the_first_half_of_the_row():
    packed = packing.pack(jnp.arange(8, dtype=jnp.uint8), 4)
    np.testing.assert_array_equal(packed, [0x40, 0x51, 0x62, 0x73])


def test_example_of_the_docstring():
    codes = jnp.array([1, 2, 3, 0, 2, 1, 0, 3], jnp.uint8)
    word_0, word_1 = packing.pack(codes, 2).tolist()
    assert word_0 == 1 | 3 << 2 | 2 << 4 | 0 << 6
    assert word_1 == 2 | 0 << 2 | 1 << 4 | 3 << 6


def test_8_bits_in_bytes_are_the_codes():
    codes = jnp.arange(10, dtype=jnp.uint8)
    np.testing.assert_array_equal(packing.pack(codes, 8), codes)


def test_signed_codes_and_excess_bits():
    codes = jnp.array([17, 2, 3, 4], jnp.int32)  # 17 = 1 in four bits
    np.testing.assert_array_equal(packing.unpack(packing.pack(codes, 4), 4, 4), [1, 2, 3, 4])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", packing.SUPPORTED_BITS)
def test_head_dims_in_use(bits, head_dim):
    assert packing.packed_size(head_dim, bits) * 8 == head_dim * bits


def test_traces_once_and_maps():
    unpack = jax.jit(chex.assert_max_traces(lambda p: packing.unpack(p, 3, 16), n=1))
    codes = np.arange(5 * 16, dtype=np.uint8).reshape(5, 16) % 8
    packed = jax.vmap(lambda c: packing.pack(c, 3))(jnp.asarray(codes))
    for _ in range(2):
        np.testing.assert_array_equal(unpack(packed), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.packed_size(63, 4), "multiple of 2; got 63"),
        (lambda: packing.packed_size(12, 3), "multiple of 8; got 12"),
        (lambda: packing.packed_size(24, 1, jnp.uint16), "multiple of 16; got 24"),
        (lambda: packing.packed_size(0, 4), "positive multiple"),
        (lambda: packing.packed_size(64, 9), "bits must be one of"),
        (lambda: packing.packed_size(64, 4, jnp.uint32), "uint8 or uint16; got uint32"),
        (lambda: packing.pack(jnp.zeros((2, 6), jnp.uint8), 2), "multiple of 4; got 6"),
        (lambda: packing.unpack(jnp.zeros((2, 6), jnp.uint8), 2, 32), "take 8 uint8 words"),
    ],
)
def test_errors_name_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
