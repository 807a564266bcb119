"""Multiples of levels that bfloat16 holds well."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from nqkv_jax.codebooks import Codebook

# Of a coefficient that is tried in bfloat16: itself, and its neighbours.
NEIGHBOURS = np.arange(-3, 4) * 2.0**-8


def cubic(t, slope, square, cube):
    """slope t + square t^2 + cube t^3, in the dtype of its arguments: NumPy's or JAX's."""
    if square == 0:
        return t * (t * t * cube + slope)
    return t * (t * (t * cube + square) + slope)


@functools.lru_cache
def rounded(codebook: Codebook, in_bfloat16: bool) -> tuple[float, tuple[float, ...]]:
    """Levels as a multiple of factors that bfloat16 holds well.

    It rounds a number by up to 2^-9 of it, and a level always alike, so that sums over tokens do
    not average such errors out. But levels may have any factor in common, which goes into scales:
    of 128, the one is taken that leaves the smallest error of a level, 1e-5 to 1e-3 of the largest.

    Args:
      codebook: a cubic, or a table.
      in_bfloat16: a cubic is computed in bfloat16, so that what is rounded depends on its
        coefficients too; else it is computed in float32, and then rounded.

    Returns:
      (slope, factors) of a table, with levels of about slope * factor, and of a cubic
      (slope, its coefficients without the constant).
    """
    levels = np.asarray(codebook.levels, np.float64)
    neighbours = np.zeros(1)
    if codebook.coefficients is None:
        numbers = levels / np.abs(levels).max()
        evaluate = lambda numbers: numbers
    else:
        levels = levels - codebook.coefficients[0]
        numbers = np.asarray(codebook.coefficients[1:]) / codebook.coefficients[1]
        dtype = jnp.bfloat16 if in_bfloat16 else np.float32
        neighbours = NEIGHBOURS if in_bfloat16 else neighbours
        t = (np.arange(levels.size) - (levels.size - 1) / 2).astype(dtype)
        evaluate = lambda numbers: cubic(t, *numbers.astype(dtype))
    best = np.inf, None
    for scaled in (numbers * (1 + k / 128) for k in range(128)):
        slope, *others = scaled
        tried = ([c] if c == 0 else c * (1 + neighbours) for c in others)
        for candidate in map(np.array, itertools.product([slope], *tried)):
            factors = evaluate(candidate).astype(jnp.bfloat16).astype(np.float64)
            multiple = (factors @ levels) / (factors @ factors)
            error = np.abs(multiple * factors - levels).max()
            if error < best[0]:
                best = error, (float(multiple), tuple(candidate.tolist()))
    return best[1]
