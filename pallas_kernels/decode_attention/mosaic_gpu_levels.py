"""From words to float16 factors of a tensor core's product, in the registers of a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.codebooks import Codebook, Float8
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_table import look_up

FIT = 1e-3  # error of levels that are approximated, of the largest, in float16
MOST = 9  # operations of an approximation, on two codes at once


@dataclasses.dataclass(frozen=True)
class Approximation:
    """Levels as a polynomial of t = (code - middle) / 2^(b-1).

    Attributes:
      coefficients: of 1, x, x^2 ..., or if `odd` of x, x^3, x^5 ...
      stretched: x is not t but, with u = code - (2^(b-1) - 1) counted from the level at 0, u /
        2^(b-1) above 0 and u / (2^(b-1) - 1) below. Both halves of NormalFloat are one odd function
        of that, the quantile function of the normal distribution (Dettmers et al., 2023,
        appendix E).
    """

    coefficients: tuple[float, ...]
    odd: bool
    stretched: bool

    @property
    def operations(self) -> int:
        return len(self.coefficients) + (1 if self.odd else -1) + 2 * self.stretched

    def __call__(self, x):
        """Of float16 `x`, u / 2^(b-1) if it is to be stretched."""
        *rest, value = (x.dtype.type(c) for c in self.coefficients)
        by = x * x if self.odd else x
        for c in reversed(rest):
            value = value * by + c
        return value * x if self.odd else value


@functools.lru_cache
def approximation(codebook: Codebook | Float8) -> Approximation | None:
    """The one with the fewest operations that has the levels within `FIT`, or None."""
    half, levels = 2 ** (codebook.bits - 1), np.asarray(codebook.levels)
    code = np.arange(2 * half)
    middle, u = (code - (half - 0.5)) / half, code - (half - 1)
    places = {False: middle, True: np.minimum(u / half, u / max(half - 1, 1))}
    forms = [
        Approximation((0.0,) * n, odd=odd, stretched=stretched)
        for odd, stretched in ((True, False), (True, True), (False, False))
        for n in range(2, MOST + 2)
    ]
    for form in sorted(forms, key=lambda form: form.operations):
        if form.operations > MOST:
            break
        x, n = places[form.stretched], len(form.coefficients)
        powers = x[:, None] ** (np.arange(n) * (2 if form.odd else 1) + form.odd)
        fit = np.linalg.lstsq(powers, levels, rcond=None)[0]
        found = dataclasses.replace(form, coefficients=tuple(fit.tolist()))
        error = np.abs(found(x.astype(np.float16)).astype(np.float64) - levels).max()
        if error <= FIT * np.abs(levels).max():
            return found
    return None


@dataclasses.dataclass(frozen=True)
class Levels:
    """level = slope * factor + offset, with factors of 4 at most (of 8-bit floats, any).

    With t = (code - middle) / 2^(b-1), the factor of a + c t + d t^3 is t (t^2 + c / d): one
    operation less than t + d / c t^3. Other polynomials have theirs in the latter form, and
    codebooks that are none have an `approximation`, or are looked up in a table. 8-bit floats are
    float16 with fewer bits.
    """

    codebook: Codebook | Float8

    @property
    def floats(self) -> bool:
        return isinstance(self.codebook, Float8)

    @property
    def approximation(self) -> Approximation | None:
        return None if self.floats or self.polynomial else approximation(self.codebook)

    @property
    def table(self) -> tuple[float, ...] | None:
        """Factors, by code, if they are looked up."""
        if self.floats or self.polynomial or self.approximation:
            return None
        return tuple(level / self.slope for level in self.codebook.levels)

    @property
    def served(self) -> bool:
        """Whether there are few enough of them, if they are looked up."""
        return self.codebook.bits <= 4 or self.table is None

    @property
    def long(self) -> bool:
        """Whether they take many operations, and as many registers."""
        found = self.approximation
        return self.table is not None or (found is not None and found.operations > 4)

    @property
    def low_bits(self) -> int:
        """Of a code, in its word; the third of 3 bits is in a plane of its own."""
        return 2 if self.codebook.bits == 3 else self.codebook.bits

    @property
    def half(self) -> int:
        return 2 ** (self.codebook.bits - 1)

    @property
    def polynomial(self) -> tuple[float, float, float, float] | None:
        """Coefficients of 1, t, t^2 and t^3."""
        if self.codebook.coefficients is None:
            return None
        padded = (*self.codebook.coefficients, 0.0, 0.0)[:4]
        return tuple(c * self.half**i for i, c in enumerate(padded))

    @property
    def slope(self) -> float:
        if self.floats:
            return self.codebook.float16_unit
        if self.polynomial is None:
            return 1.0 if self.approximation else float(np.abs(self.codebook.levels).max())
        _, slope, square, cube = self.polynomial
        return cube if cube and not square else slope

    @property
    def ratio(self) -> float:
        """offset / slope"""
        return 0.0 if self.polynomial is None else self.polynomial[0] / self.slope

    def middle(self, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Of the levels of a block: what its factors are counted from."""
        middle = scale * jnp.float32(self.ratio * self.slope)
        return middle if zero is None else middle + zero

    @property
    def even(self) -> bool:
        """Whether levels are evenly spaced. Their factors are the codes themselves, see `unit`."""
        return self.polynomial is not None and not any(self.polynomial[2:])

    @property
    def centre(self) -> float:
        """What t is less than code / 2^(b-1)."""
        return (self.half - 0.5) / self.half

    @property
    def first(self) -> int:
        """The bit at which a part begins in words as `factor` takes them: the fields of a byte then
        end within the mantissa, third bits too, and numbers that are centred have halves."""
        if self.floats:
            return self.codebook.dropped_bits
        if self.even or self.table:
            return 0
        return 1 if self.codebook.bits == 3 else 2

    def place(self, field: int) -> int:
        """Of the first bit of a field of a part, in words as `factor` takes them."""
        return self.first + field * self.low_bits

    def unit(self, field: int) -> float:
        """Of factors, if levels are even, in code / 2^(b-1). They are float16 below the smallest
        normal one, with codes somewhere in their bits, the last of which is worth 2^-24: the tensor
        core takes them as they are (Fasi et al., PeerJ Computer Science 7:e330, 2021)."""
        return 2.0 ** (24 - self.place(field)) / self.half

    def merge(self, low: jax.Array, high: jax.Array, zero: jax.Array) -> tuple[jax.Array, ...]:
        """Of 3 bits, words with the codes of even fields of a part, and with those of odd ones.

        Args:
          low: int16 words of a part, from bit `first` on.
          high: words with the third bit of each field beside its low bits.
          zero: see `factor`.
        """
        low_bits = lambda field: 3 << self.place(field)
        masks = [low_bits(n) | low_bits(n + 2) for n in range(2)]
        # One operation on three numbers: a selection by bits.
        return tuple(high ^ ((high ^ low) & (jnp.int16(mask) | zero)) for mask in masks)

    def widen(self, words: jax.Array, signs: jax.Array, zero: jax.Array) -> jax.Array:
        """Of 8-bit floats, the bits of float16 factors.

        Args:
          words: int16, with a float from bit `first` on.
          signs: with its sign as the highest bit.
          zero: see `factor`.
        """
        magnitudes = words & (jnp.int16(0x7F << self.first) | zero)
        return magnitudes | (signs & (jnp.int16(-0x8000) | zero))

    def factor(self, words: jax.Array, field: int, zero: jax.Array, interpret: bool) -> jax.Array:
        """float16 factors of one field of the part of int16 words that begins at bit `first`, or of
        what `merge` or `widen` found for it; if levels are even, codes, by `unit`.

        `zero` int16[] is a 0 that the compiler does not know of: masks it knows, the assembler
        puts into a register again for every use.
        """
        if self.floats:
            return jax.lax.bitcast_convert_type(words, jnp.float16)
        at = self.place(field)
        if self.table:
            return look_up(words, at, self.table, interpret)
        number = words & (jnp.int16((2**self.codebook.bits - 1) << at) | zero)
        if not self.even:
            # Below the exponent of `base`, the last bit of a code is worth 1 / half.
            exponent = 11 - at - self.codebook.bits
            base, above = 2.0**exponent, (15 + exponent) << 10
            number = number | jnp.int16(above)
        number = jax.lax.bitcast_convert_type(number, jnp.float16)
        if self.even:
            return number
        less = lambda x: number - jnp.float16(base + x / self.half)
        if self.polynomial is None:
            levels = self.approximation
            if not levels.stretched:
                return levels(less(self.half - 0.5))
            x = less(self.half - 1)
            return levels(jnp.minimum(x, x * jnp.float16(self.half / (self.half - 1))))
        t = less(self.half - 0.5)
        _, slope, square, cube = self.polynomial
        if not square:
            return t * (t * t + jnp.float16(slope / cube))
        constant = lambda c: jnp.float16(c / slope)
        return t * (t * (t * constant(cube) + constant(square)) + jnp.float16(1))
