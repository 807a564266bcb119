"""From words to float16 factors of a tensor core's product, in the registers of a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.codebooks import Codebook

# Where the fields of a part begin in a word that was moved for them: those of a byte then end
# within the mantissa, and numbers have halves.
FIRST = 2
FIT = 1e-3  # error of levels that are computed instead of looked up, of the largest


@functools.lru_cache
def quantile_fit(codebook: Codebook) -> tuple[float, ...] | None:
    """Coefficients of x, x^3 ... x^9 that give the levels of NormalFloat, or None.

    With u = code - (2^(b-1) - 1), counted from the level at 0, both halves of these levels are one
    odd function, the quantile function of the normal distribution, of x = u / 2^(b-1) above 0 and
    of x = u / (2^(b-1) - 1) below (Dettmers et al., 2023, appendix E). That takes ten operations on
    two codes at once, where selecting from a table takes 15 on each, and more registers than there
    are.
    """
    half = 2 ** (codebook.bits - 1)
    u = np.arange(2 * half) - (half - 1)
    x = np.minimum(u / half, u / max(half - 1, 1))
    powers = x[:, None] ** np.arange(1, 10, 2)
    levels = np.asarray(codebook.levels)
    fit = np.linalg.lstsq(powers, levels, rcond=None)[0]
    close = np.abs(powers @ fit - levels).max() <= FIT * np.abs(levels).max()
    return tuple(fit.tolist()) if close else None


@dataclasses.dataclass(frozen=True)
class Levels:
    """level = slope * factor + offset, with factors of 4 at most.

    With t = (code - middle) / 2^(b-1), the factor of a + c t + d t^3 is t (t^2 + c / d): one
    operation less than t + d / c t^3. Other polynomials have theirs in the latter form, and
    NormalFloat has `quantile_fit`.
    """

    codebook: Codebook

    @property
    def computed(self) -> bool:
        return self.codebook.coefficients is not None or quantile_fit(self.codebook) is not None

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
        if self.polynomial is None:
            return 1.0
        _, slope, square, cube = self.polynomial
        return cube if cube and not square else slope

    @property
    def ratio(self) -> float:
        """offset / slope"""
        return 0.0 if self.polynomial is None else self.polynomial[0] / self.slope

    def place(self, field: int) -> int:
        """Of the first bit of a field of a part, in words as `factor` takes them."""
        return FIRST + field * self.low_bits

    def factor(
        self, words: jax.Array, field: int, high: jax.Array | None, zero: jax.Array
    ) -> jax.Array:
        """float16 factors of one field of the part of int16 words that begins at bit `FIRST`.

        Of 3 bits, words have the low two, and the bit beside them of `high` int16 is the third.

        `zero` int16[] is a 0 that the assembler does not know of: masks it knows, it puts into a
        register again for every use.
        """
        bits, at = self.codebook.bits, self.place(field)
        code = words & (jnp.int16((2**self.low_bits - 1) << at) | zero)
        if high is not None:
            code = code | (high & (jnp.int16(1 << (at + self.low_bits)) | zero))
        # Below the exponent of `base`, the last bit of a code is worth 1 / half.
        exponent = 10 - at - (bits - 1)
        number, base = code | jnp.int16((15 + exponent) << 10), 2.0**exponent
        number = jax.lax.bitcast_convert_type(number, jnp.float16)
        if self.polynomial is None:
            return self._quantile(number - jnp.float16(base + (self.half - 1) / self.half))
        t = number - jnp.float16(base + (self.half - 0.5) / self.half)
        _, slope, square, cube = self.polynomial
        if not cube:
            return t
        if not square:
            return t * (t * t + jnp.float16(slope / cube))
        constant = lambda c: jnp.float16(c / slope)
        return t * (t * (t * constant(cube) + constant(square)) + jnp.float16(1))

    def _quantile(self, x: jax.Array) -> jax.Array:
        """Of x = u / 2^(b-1), which is stretched below 0."""
        x = jnp.minimum(x, x * jnp.float16(self.half / (self.half - 1)))
        *odd, value = (jnp.float16(c) for c in quantile_fit(self.codebook))
        for c in reversed(odd):
            value = value * (x * x) + c
        return value * x
