"""Codes of 1 to 8 bits in arrays of whole words: the one way of packing of the whole library.

Quantizers pack channels or tokens into bytes; the tiles that Pallas kernels read
(`nqkv_jax.tiles`) are tokens in 16-bit words. Files hold what is in memory. A row of n codes of b
bits becomes words of W bits (`uint8` or `uint16`) in W / b *planes* of n * b / W codes:

    word j holds, at bit offset p * b, the code i = j + p * (n * b / W), for p in 0 .. W / b - 1

so at 4 bits in bytes the low nibbles are the first half of the row and the high nibbles the second.
Codes are never interleaved: a plane is a run of neighbouring channels, and unpacking it is one
shift and one mask per lane, with no shuffle. For example n = 8, b = 2, W = 8 stores two words:

    word 0 = code 0 | code 2 << 2 | code 4 << 4 | code 6 << 6
    word 1 = code 1 | code 3 << 2 | code 5 << 4 | code 7 << 6

Widths that are no power of two do not divide a word. They are stored as rows of powers of two, one
after the other along that axis, the widest first and with the lowest bits: 3 bits are the low
two bits of every code (n / (W / 2) words), then the high bit of every code (n / W words); 5 are
4 + 1, 6 are 4 + 2, 7 are 4 + 2 + 1. So 3-bit codes cost 3.0 bits.

8 bits in bytes is the array of codes itself.
"""

import jax
import jax.numpy as jnp

SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def packed_size(n: int, bits: int, word=jnp.uint8) -> int:
    """The number of words that `n` codes of `bits` bits take.

    Raises: ValueError if `bits` or `word` is not supported, or if words would not be full.
    """
    word_bits = _word_bits(word)
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"packing: bits must be one of {SUPPORTED_BITS}; got {bits}")
    # The narrowest row decides: the 1-bit row of 3-bit codes, else the codes themselves.
    per_word = word_bits // (bits & -bits)
    if n % per_word or n <= 0:
        full = [str(b) for b in SUPPORTED_BITS if n > 0 and n % (word_bits // (b & -b)) == 0]
        raise ValueError(
            f"packing: codes of {bits} bits fill whole {jnp.dtype(word).name} words only if their "
            f"number is a positive multiple of {per_word}; got {n}"
            + (f", which is one for codes of {', '.join(full)} bits" if full else "")
        )
    return n * bits // word_bits


def pack(codes: jax.Array, bits: int, word=jnp.uint8, axis: int = -1) -> jax.Array:
    """Packs rows of codes along `axis`, in the layout of this module.

    Args:    codes: integers [..., n, ...], each in [0, 2**bits); higher bits are dropped.
             bits: 1..8.  word: jnp.uint8 or jnp.uint16.
    Returns: word[..., n * bits / word_bits, ...].
    Raises:  ValueError if `bits`, `word` or n is not supported.
    """
    packed_size(codes.shape[axis], bits, word)
    low = _widest(bits)
    if low < bits:
        high = pack(codes >> _like(codes, low), bits - low, word, axis)
        return jnp.concatenate([pack(codes, low, word, axis), high], axis=axis)
    planes = _word_bits(word) // bits
    codes = (codes & _like(codes, 2**bits - 1)).astype(word)
    packed = None
    for p, plane in enumerate(jnp.split(codes, planes, axis=axis)):
        shifted = plane << _like(plane, p * bits)
        packed = shifted if packed is None else packed | shifted
    return packed


def unpack(packed: jax.Array, bits: int, n: int, axis: int = -1) -> jax.Array:
    """The inverse of `pack`: uint8 codes [..., n, ...] from [..., n * bits / word_bits, ...].

    Args:    packed: uint8 or uint16, as `pack` returns it.  bits: as packed.  n: codes per row.
    Raises:  ValueError if the number of words is not what `n` codes take.
    """
    words = packed_size(n, bits, packed.dtype)
    if packed.shape[axis] != words:
        raise ValueError(
            f"unpack: {n} codes of {bits} bits take {words} {packed.dtype.name} words; "
            f"got packed.shape={packed.shape}"
        )
    # One row along the last axis is concatenated of its planes: on XLA:CPU, fused into the product
    # that reads the codes, that takes 0.5 to 0.7 of the time of a shift by an amount of its own for
    # each. Several rows, or eight planes, take 2 to 4 times as long, and along another axis it is a
    # branch for every element.
    if axis % packed.ndim == packed.ndim - 1 and bits in (2, 4, 8):
        shifts = range(0, _word_bits(packed.dtype), bits)
        codes = [packed >> _like(packed, by) & _like(packed, 2**bits - 1) for by in shifts]
        return jnp.concatenate([c.astype(jnp.uint8) for c in codes], axis=axis)
    return _shifted(packed, bits, n, axis % packed.ndim)


def _shifted(packed: jax.Array, bits: int, n: int, axis: int) -> jax.Array:
    word_bits, widest = _word_bits(packed.dtype), _widest(bits)
    if widest < bits:
        low, high = jnp.split(packed, [n * widest // word_bits], axis=axis)
        low, high = _shifted(low, widest, n, axis), _shifted(high, bits - widest, n, axis)
        return low | (high << _like(high, widest))
    # Shifted are 32 bits: there are no vectors of words that are shifted by different amounts.
    shifts = jnp.arange(0, word_bits, bits, dtype=jnp.int32)
    shifts = jnp.expand_dims(shifts, [n for n in range(packed.ndim + 1) if n != axis])
    codes = jnp.expand_dims(packed.astype(jnp.int32), axis) >> shifts
    codes = (codes & jnp.int32(2**bits - 1)).astype(jnp.uint8)
    return codes.reshape(*packed.shape[:axis], n, *packed.shape[axis + 1 :])


def _widest(bits: int) -> int:
    """The largest power of two that is at most `bits`."""
    return 1 << (bits.bit_length() - 1)


def _word_bits(word) -> int:
    """Bits of a word dtype."""
    dtype = jnp.dtype(word)
    if dtype not in (jnp.dtype(jnp.uint8), jnp.dtype(jnp.uint16)):
        raise ValueError(f"packing: word must be uint8 or uint16; got {dtype.name}")
    return dtype.itemsize * 8


def _like(x: jax.Array, value: int) -> jax.Array:
    """A constant of the dtype of `x`, so that nothing is promoted."""
    return jnp.asarray(value, x.dtype)
