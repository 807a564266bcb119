"""From words to factors of a matrix product, in the registers of a TPU.

    affine  two codes at a time become bfloat16 numbers 128 + code by an OR into the mantissa,
            exactly. What is constant in them is taken back from the sums. Of 8 bits, of which the
            mantissa has seven, only where there are bfloat16 units, for a subtraction.
    cubic   likewise, then multiplications in bfloat16. Chips without bfloat16 units (before v6e)
            go by way of float32.
    stepped bit operations on the eight codes of a register lane at once (`stepped_normal`).
    float8  two at a time they are bfloat16 with fewer bits and another bias: tiny numbers, so that
            queries and sums are multiplied by `GAIN`. There are no subnormal ones on a TPU: what is
            below 2^-15 of a block's largest is 0.
    table   a gather along the 128 lanes of a register that repeats the table; of four levels, three
            selections.

With float32 products every level is computed in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from nqkv_jax import tiles
from nqkv_jax.codebooks import STEPS, Codebook, Float8
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_rounding import cubic, rounded

GAIN = 2.0**60


@dataclasses.dataclass(frozen=True)
class Levels:
    """level = slope * gain * factor + offset.

    Attributes:
      paired: the 16-bit halves of 32-bit registers are decoded together, and rows come out in their
        order. Else rows 0, 2, ... of a field come before rows 1, 3, ...: `restore` and `permute`
        move the scores and weights that belong to them.
    """

    codebook: Codebook | Float8
    dtype: jnp.dtype  # of the factors
    paired: bool

    @classmethod
    def can_pair(cls, codes: TiledCodes, dtype, bfloat16_units: bool) -> bool:
        codebook = codes.codebook
        if isinstance(codebook, Float8):
            # Scales of channels meet queries, not sums: what is tiny would not be made up for.
            return dtype == jnp.bfloat16 and not codes.per_channel
        if dtype != jnp.bfloat16:
            return False
        if codebook.coefficients is None:
            return _is_stepped(codebook)
        affine = len(codebook.coefficients) == 2
        if codebook.bits == 8:
            return affine and bfloat16_units
        return affine or bfloat16_units

    @property
    def _bits(self) -> int:
        return self.codebook.bits

    @property
    def _middle(self) -> float:
        return (2**self._bits - 1) / 2

    @property
    def _polynomial(self) -> tuple[float, ...] | None:
        return self.codebook.coefficients

    @property
    def slope(self) -> float:
        if self._is_affine:
            return self._polynomial[1]
        if self._is_float:
            return 2.0 ** (127 - self.codebook.bias) / GAIN if self.paired else 1.0
        if self._polynomial is None and self.paired:
            return self.codebook.levels[8]
        return self._scaled[0]

    @property
    def gain(self) -> float:
        """What keys' queries and values' sums are multiplied by, beside the slope, which scales
        are: both at once could overflow."""
        return GAIN if self._is_float and self.paired else 1.0

    @property
    def _is_float(self) -> bool:
        return isinstance(self.codebook, Float8)

    @property
    def _is_affine(self) -> bool:
        return self._polynomial is not None and len(self._polynomial) == 2

    @property
    def _scaled(self) -> tuple[float, tuple[float, ...]]:
        """The slope, and the factors of a table or a cubic's coefficients but for the constant."""
        if self.dtype == jnp.bfloat16:
            return rounded(self.codebook, in_bfloat16=self.paired)
        if self._polynomial is None:
            return 1.0, self.codebook.levels
        return self._polynomial[1], tuple(c / self._polynomial[1] for c in self._polynomial[1:])

    @property
    def offset(self) -> float:
        if self._polynomial is None:
            stepped = self.paired and not self._is_float
            return -(128 + STEPPED_ZERO) * self.slope if stepped else 0.0
        constant, slope = self._polynomial[:2]
        if not self._is_affine:
            return constant
        added = 0 if not self.paired else -128 if self._bits == 8 else 128
        return constant - slope * (self._middle + added)

    def factors(self, words: jax.Array, head_dim: int) -> jax.Array:
        """dtype[128 / fold, lanes] of one tile of one head, int16[rows, 128]."""
        columns = max(1, head_dim // tiles.LANES)
        low_bits = 2 if self._bits == 3 else self._bits
        size = tiles.num_rows(head_dim, low_bits) // columns
        parts = []
        for c in range(columns):
            low = pltpu.bitcast(words[c * size : (c + 1) * size], jnp.int32)
            high = None
            if self._bits == 3:
                start = columns * size + c * size // 2
                high = pltpu.bitcast(words[start : start + size // 2], jnp.int32)
                high = jnp.concatenate([high, _shift(high, 8)], axis=0)
            parts.append(self._paired(low, high) if self.paired else self._single(low, high))
        return parts[0] if columns == 1 else jnp.concatenate(parts, axis=1)

    def restore(self, scores: jax.Array, fold: int) -> jax.Array:
        """[rows, 128] of a unit, from the order of `factors` to that of tokens."""
        if self.paired:
            return scores
        lane = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        half = self._half_field(fold)
        row = lane & (2 * half - 1)
        return jnp.take_along_axis(scores, lane - row + half * (row & 1) + (row >> 1), axis=1)

    def permute(self, weights: jax.Array, fold: int) -> jax.Array:
        """The inverse of `restore`."""
        if self.paired:
            return weights
        lane = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
        half = self._half_field(fold)
        row = lane & (2 * half - 1)
        place = 2 * (row & (half - 1)) + (row >> (half.bit_length() - 1))
        return jnp.take_along_axis(weights, lane - row + place, axis=1)

    def _half_field(self, fold: int) -> int:
        """Half the rows of a field, a power of two.

        Indices are computed with shifts and masks: the lowering of `//` and `%` to TPU wants to
        know the chip, which may not be there.
        """
        return 4 * (2 if self._bits == 3 else self._bits) // fold

    def _paired(self, low: jax.Array, high: jax.Array | None) -> jax.Array:
        if self._is_float:
            return _widened(low, self.codebook)
        if self._polynomial is None:
            return _stepped(low)
        if self._bits == 8:
            return _signed(low)
        low_bits = self._bits - (high is not None)
        affine = self._is_affine
        # A bfloat16 has 7 bits of mantissa: 128 + code has the code in its lowest bits, and
        # 2^bits + code, of which the middle of the codes can be subtracted exactly, in its highest.
        at = 0 if affine else 7 - self._bits
        exponent = (127 + (7 if affine else self._bits)) << 7
        out = []
        for k in range(16 // low_bits):
            field = _halves(_shift(low, low_bits * k - at), (2**low_bits - 1) << at)
            if high is not None:
                third = _shift(high, tiles.high_bit(k) - at - 2)
                field = field | _halves(third, 1 << (at + 2))
            x = pltpu.bitcast(field | _both(exponent), jnp.bfloat16)
            centred = lambda x: x - jnp.bfloat16(2**self._bits + self._middle)
            out.append(x if affine else self._cubic(centred(x)))
        return jnp.concatenate(out, axis=0)

    def _single(self, low: jax.Array, high: jax.Array | None) -> jax.Array:
        low_bits = self._bits - (high is not None)
        out = []
        for k in range(16 // low_bits):
            for half in (0, 16):
                code = _shift(low, low_bits * k + half) & jnp.int32(2**low_bits - 1)
                if high is not None:
                    third = _shift(high, tiles.high_bit(k) + half) & jnp.int32(1)
                    code = code | (third << jnp.int32(2))
                out.append(self._level(code))
        return jnp.concatenate(out, axis=0).astype(self.dtype)

    def _level(self, code: jax.Array) -> jax.Array:
        """f32 factors of i32 codes."""
        if self._is_float:
            return float32(code, self.codebook)
        if self._polynomial is None:
            factors = self._scaled[1]
            if len(factors) > tiles.LANES:
                low = self._look_up(code & jnp.int32(127), factors[:128])
                high = self._look_up(code & jnp.int32(127), factors[128:])
                return jnp.where(code < 128, low, high)
            return self._look_up(code, factors)
        if self._is_affine:
            return code.astype(jnp.float32)
        return self._cubic(code.astype(jnp.float32) - jnp.float32(self._middle))

    def _cubic(self, t: jax.Array) -> jax.Array:
        return cubic(t, *(np.asarray(c, t.dtype) for c in self._scaled[1]))

    @staticmethod
    def _look_up(code: jax.Array, levels) -> jax.Array:
        # What the compiler makes of a tree is shorter for 2 bits and longer for 4; for 3 it is 5 %
        # shorter on v5e and 10 % longer on v6e (tests/aot/look_ups.py).
        return (select if len(levels) == 4 else gather)(code, levels)


def gather(code: jax.Array, levels) -> jax.Array:
    """f32 levels of i32[rows, 128] codes, by a gather along lanes."""
    # The table, as scalars placed in lanes: a kernel cannot capture an array.
    lane = jax.lax.broadcasted_iota(jnp.int32, code.shape, 1)
    table = jnp.zeros(code.shape, jnp.float32)
    for i, level in enumerate(levels):
        table = jnp.where(lane == i, jnp.float32(level), table)
    return jnp.take_along_axis(table, code, axis=1)


def select(code: jax.Array, levels) -> jax.Array:
    """f32 levels of i32[rows, 128] codes, by a tree of selections on their bits."""
    values = [jnp.full(code.shape, level, jnp.float32) for level in levels]
    for bit in range((len(levels) - 1).bit_length()):
        on = (code & jnp.int32(1 << bit)) != 0
        values = [jnp.where(on, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _signed(words: jax.Array) -> jax.Array:
    """bfloat16[4 rows, 128], code - 128 of all codes of 8 bits in i32[rows, 128]."""
    out = []
    for k in (0, 8):
        codes = _shift(words, k)
        number = _halves(codes, 0x7F) | _both((127 + 7) << 7)  # 128 + lower bits
        less = _both((127 + 8) << 7) - _halves(codes, 0x80)  # 256, or with the highest bit 128
        number, less = (pltpu.bitcast(x, jnp.bfloat16) for x in (number, less))
        out.append(number - less)
    return jnp.concatenate(out, axis=0)


def _widened(words: jax.Array, codebook: Float8) -> jax.Array:
    """bfloat16[4 rows, 128], numbers over 2^(127 - bias) of all bytes in i32[rows, 128]."""
    out, by = [], 7 - codebook.mantissa_bits
    for k in (0, 8):
        magnitude = _halves(_shift(words, k - by), 0x7F << by)
        out.append(magnitude | _halves(_shift(words, k - 8), 0x8000))
    return jnp.concatenate([pltpu.bitcast(x, jnp.bfloat16) for x in out], axis=0)


def float32(code: jax.Array, codebook: Float8) -> jax.Array:
    """f32 numbers, exactly, of their bytes i32[...]."""
    magnitude = code & jnp.int32(0x7F)
    bits = magnitude << jnp.int32(23 - codebook.mantissa_bits)
    bits = bits + jnp.int32((127 - codebook.bias) << 23)
    number = jax.lax.bitcast_convert_type(bits, jnp.float32)
    smallest_normal = 1 << codebook.mantissa_bits
    unit = 2.0 ** (1 - codebook.bias) / smallest_normal
    subnormal = magnitude.astype(jnp.float32) * jnp.float32(unit)
    number = jnp.where(magnitude < smallest_normal, subnormal, number)
    return jnp.where(code < 128, number, -number)


# What `_stepped` counts from: 2 * 7.5 for the codes, and 8 so that nothing is negative.
STEPPED_ZERO = 23


def _is_stepped(codebook: Codebook) -> bool:
    levels = np.asarray(codebook.levels)
    steps = np.concatenate([-np.array(STEPS[::-1]), STEPS])
    return codebook.bits == 4 and np.allclose(levels, levels[8] * steps, rtol=1e-6, atol=0)


def _stepped(words: jax.Array) -> jax.Array:
    """bfloat16[4 rows, 128]: 128 + STEPPED_ZERO + the steps of all codes in i32[rows / 2, 128]."""
    every = lambda nibble: _both(nibble * 0x1111)
    ones = every(1)
    positive = _shift(words, 3) & ones
    # 1000 takes the highest bit off the codes that have it, 0111 mirrors the others.
    mirror = positive + every(7)
    u = words ^ mirror  # 0 .. 7: codes from zero outwards
    b21 = _shift(u + every(2), 3) & ones  # 6 and 7
    b210 = b21 & u
    more = b21 + b210 + b210
    nibbles = (more ^ mirror) + (ones - positive)  # 8 + more, or 8 - more
    # 2 code + nibble of the even and of the odd fields, a byte each.
    low, twice = _both(0x0F0F), _both(0x1E1E)
    even = (_shift(words, -1) & twice) + (nibbles & low)
    odd = (_shift(words, 3) & twice) + (_shift(nibbles, 4) & low)
    byte, exponent = _both(0xFF), _both((127 + 7) << 7)
    fields = [(_shift(pair, at) & byte) | exponent for at in (0, 8) for pair in (even, odd)]
    return jnp.concatenate([pltpu.bitcast(f, jnp.bfloat16) for f in fields], axis=0)


def _both(half: int) -> jax.Array:
    """The same 16 bits in both halves of an i32."""
    return jnp.int32(np.array(half * 0x10001, np.uint32).astype(np.int32))


def _halves(words: jax.Array, mask: int) -> jax.Array:
    return words & _both(mask)


def _shift(words: jax.Array, right: int) -> jax.Array:
    if right > 0:
        return jax.lax.shift_right_logical(words, jnp.int32(right))
    return jax.lax.shift_left(words, jnp.int32(-right)) if right else words
