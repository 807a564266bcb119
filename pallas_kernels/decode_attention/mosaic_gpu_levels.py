"""From words to float16 factors of a tensor core's product, in the registers of a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.codebooks import Codebook

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
    """level = slope * factor + offset.

    The factor is t + square t^2 + cube t^3, for a codebook with coefficients, or as in
    `quantile_fit`.
    """

    codebook: Codebook

    @property
    def computed(self) -> bool:
        return self.codebook.coefficients is not None or quantile_fit(self.codebook) is not None

    @property
    def slope(self) -> float:
        return 1.0 if self.codebook.coefficients is None else self.codebook.coefficients[1]

    @property
    def ratio(self) -> float:
        """offset / slope"""
        if self.codebook.coefficients is None:
            return 0.0
        return self.codebook.coefficients[0] / self.slope

    def factor(
        self, words: jax.Array, shift: jax.Array, field: int, high: jax.Array | None = None
    ) -> jax.Array:
        """float16 factors of a field of int16 words, counted from the bit `shift` i32[] on.

        Of 3 bits, words have the low two, and bit `field` of `high` int16 is the third.
        """
        bits = self.codebook.bits
        low_bits = bits if high is None else bits - 1
        at = field * low_bits
        words = jax.lax.shift_right_logical(words, jnp.full_like(words, shift.astype(jnp.int16)))
        code = words & jnp.int16((2**low_bits - 1) << at)
        if high is not None:
            place = at + low_bits
            high = jax.lax.shift_left(high, jnp.full_like(high, place - field))
            code = code | (high & jnp.int16(1 << place))
        # The number 2^(10 - at) + code, whose last bit of mantissa is worth 2^-at.
        number = code | jnp.int16((25 - at) << 10)
        number = jax.lax.bitcast_convert_type(number, jnp.float16)
        base, middle = 2 ** (10 - at), (2**bits - 1) / 2
        if self.codebook.coefficients is None:
            return self._quantile(number - jnp.float16(base + 2 ** (bits - 1) - 1))
        if at:
            t = number - jnp.float16(base + middle)
        else:
            # In one step it would not be exact. XLA, which an interpreter uses, would merge two.
            t = jax.lax.optimization_barrier(number - jnp.float16(base)) - jnp.float16(middle)
        _, slope, square, cube = (*self.codebook.coefficients, 0.0, 0.0)[:4]
        half = lambda c: jnp.float16(c / slope)
        if square:
            return t * (t * (t * half(cube) + half(square)) + jnp.float16(1))
        return t * (t * t * half(cube) + jnp.float16(1)) if cube else t

    def _quantile(self, u: jax.Array) -> jax.Array:
        half = 2 ** (self.codebook.bits - 1)
        x = jnp.minimum(u * jnp.float16(1 / half), u * jnp.float16(1 / max(half - 1, 1)))
        *odd, value = (jnp.float16(c) for c in quantile_fit(self.codebook))
        for c in reversed(odd):
            value = value * (x * x) + c
        return value * x
