"""Levels that codes stand for, and how codes and levels are found."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.checks import is_whole
from nqkv_jax.rounding import nearest_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook:
    """2^bits sorted levels; hashable, so that it can be a static argument.

    Attributes:
      bits: bits per code, 1..8.
      levels: the 2^bits levels, increasing; any sequence of numbers, kept as a tuple of floats.
      coefficients: if given, level = sum_k coefficients[k] * t^k with t = code - (2^bits - 1) / 2.
        Such levels are computed rather than looked up, which is cheaper.
      name: for messages and tables.
    """

    bits: int
    levels: tuple[float, ...]
    coefficients: tuple[float, ...] | None = None
    name: str = "custom"
    of_absmax: ClassVar[float] = 1.0  # what the largest magnitude of a block becomes

    def __post_init__(self):
        levels = np.asarray(self.levels, np.float64)
        whole = is_whole(self.bits) and 1 <= self.bits <= 8
        if not whole or levels.shape != (2**self.bits,):
            raise ValueError(
                f"Codebook {self.name!r}: needs 2**bits levels with bits in 1..8; "
                f"got bits={self.bits!r} and {levels.size} levels"
            )
        object.__setattr__(self, "bits", int(self.bits))
        if not np.all(np.diff(levels) > 0) or not np.all(np.isfinite(levels)):
            raise ValueError(
                f"Codebook {self.name!r}: levels must be finite and increasing; got {self.levels}"
            )
        # An array could be neither compared nor hashed.
        object.__setattr__(self, "levels", tuple(levels.tolist()))
        if self.coefficients is not None:
            coefficients = np.asarray(self.coefficients, np.float64)
            object.__setattr__(self, "coefficients", tuple(coefficients.tolist()))
            computed = np.polynomial.polynomial.polyval(self._centred, self.coefficients)
            if not np.allclose(computed, levels, rtol=0, atol=1e-6 * np.abs(levels).max()):
                raise ValueError(
                    f"Codebook {self.name!r}: coefficients must give the levels; they give "
                    f"{computed}, levels are {self.levels}"
                )

    @property
    def thresholds(self) -> np.ndarray:
        """f32[2^bits - 1], midpoints of neighbouring levels; ties take the lower code."""
        levels = np.asarray(self.levels, np.float64)
        return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)

    @property
    def is_even(self) -> bool:
        """Whether the levels are multiples of a step, which is how they are encoded."""
        return self._step_and_offset is not None

    @property
    def is_searched(self) -> bool:
        """Whether codes are found by a search through a table, which kernels do not have."""
        return self.bits > 4 and not self.is_even

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are the codes themselves, 0 .. 2^bits - 1."""
        return self._step_and_offset == (1.0, 0)

    def encode(self, y: jax.Array) -> jax.Array:
        """The codes (uint8, shape of `y`) of the levels nearest to `y` f32[...].

        Values beyond the levels take the outermost. Ties take the lower code, except for evenly
        spaced levels with a level at 0 (`uniform`, `integer`), which round half to even. NaN takes
        an arbitrary code: callers keep it visible.
        """
        if self._step_and_offset is not None:
            step, offset = self._step_and_offset
            steps = y if step == 1.0 else y * np.float32(1 / step)
            top = 2**self.bits - 1
            # Between product and sum, so that no fused multiply-add can change the result.
            steps = jnp.clip(steps, np.float32(-offset), np.float32(top - offset))
            codes = nearest_integer(steps) + np.int32(offset)
            return (codes & np.int32(top)).astype(jnp.uint8)  # of NaN too
        if self.is_searched:
            thresholds = jnp.asarray(self.thresholds)
            return jnp.searchsorted(thresholds, y, side="left").astype(jnp.uint8)
        # Counting comparisons has no branches or gathers, and fuses with whatever makes `y`.
        codes = jnp.zeros(y.shape, jnp.uint8)
        for threshold in self.thresholds:
            codes = codes + (y > threshold).astype(jnp.uint8)
        return codes

    def decode(self, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """The levels of `codes` (unsigned integers), in float32 and then rounded to `dtype`."""
        if self._step_and_offset is not None:
            step, offset = self._step_and_offset
            values = codes.astype(jnp.float32)
            values = values - np.float32(offset) if offset else values
            values = values * np.float32(step) if step != 1.0 else values
        elif self.coefficients is not None:
            values = self._polynomial(codes.astype(jnp.float32) - np.float32(self._middle))
        elif self.bits <= 4:
            # A tree of selects on the bits of the code. On XLA:CPU, fused into the product with one
            # query per key, it takes half the time of a gather (62 against 133 us for codes
            # [512, 3, 64]), with three queries 1.0..1.3 of it; a one-hot product takes 5 to 17
            # times as long. The bits are tested as int32: a byte would be widened at every select.
            codes = codes.astype(jnp.int32)
            values = [np.float32(level) for level in self.levels]
            for bit in range(self.bits):
                is_set = (codes & np.int32(1 << bit)) != 0
                pairs = zip(values[::2], values[1::2], strict=True)
                values = [jnp.where(is_set, high, low) for low, high in pairs]
            (values,) = values
        else:
            levels = jnp.asarray(np.asarray(self.levels, np.float32))
            values = levels.at[codes.astype(jnp.int32)].get(mode="clip")
        return values.astype(dtype)

    def _polynomial(self, t: jax.Array) -> jax.Array:
        """Horner's rule; odd polynomials in the square of `t`."""
        coefficients = [np.float32(c) for c in self.coefficients]
        if not any(coefficients[::2]):
            square, odd = t * t, coefficients[1::2]
            value = jnp.full_like(t, odd[-1])
            for c in odd[-2::-1]:
                value = value * square + c
            return value * t
        value = jnp.full_like(t, coefficients[-1])
        for c in coefficients[-2::-1]:
            value = value * t + c
        return value

    @property
    def _middle(self) -> float:
        return (2**self.bits - 1) / 2

    @property
    def _centred(self) -> np.ndarray:
        """The centred codes t, f64[2^bits]."""
        return np.arange(2**self.bits) - self._middle

    @functools.cached_property
    def _step_and_offset(self) -> tuple[float, int] | None:
        """(step, offset) if every level is (code - offset) * step with an integer offset."""
        if self.coefficients is None or len(self.coefficients) != 2:
            return None
        step = self.coefficients[1]
        offset = self._middle - self.coefficients[0] / step
        if abs(offset - round(offset)) >= 1e-9 or abs(offset) >= 2**20:  # see `nearest_integer`
            return None
        return step, round(offset)
