"""Codebooks: the 2^bits levels that codes stand for, relative to the scale of their block.

A decoded value is `levels[code] * scale + zero`. Which scale a codebook was made for is part of its
meaning: `normal_float`, `block_normal`, `cubic_normal` and `integer` divide by the largest
magnitude of a block (`signed=True`: by the largest element with its sign, so that +1 always
occurs), `lloyd_max_normal` by the root mean square, and `uniform` counts steps from the minimum.
`Float8`, the numbers of a format of 8 bits, takes the place of a codebook too.

Everything here is NumPy and SciPy in float64, done once per codebook.
"""

import functools
import numbers

import numpy as np
from scipy import optimize, special

from nqkv_jax.checks import is_whole
from nqkv_jax.codebook import Codebook as Codebook
from nqkv_jax.float8 import Float8 as Float8
from nqkv_jax.lloyd import companded_start, histogram_moments, lloyd

# Dettmers et al. (2023), QLoRA, appendix E, as stored by bitsandbytes: made with a float32
# linspace, so that the construction below reproduces 10 of the 16 values only up to the last bits.
# Kept as printed.
NF4_LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
# The quantile at which the construction of NF4 stops: the mean of 1 - 1/32 and 1 - 1/30 (one half
# less than the probability of the outermost of 16 and of 15 levels).
NF4_OFFSET = 929 / 960

# By the types of arguments, too: 4.0 bits are refused, whether or not 4 bits were asked for before.
_made_once = functools.lru_cache(typed=True)


def uniform(bits: int) -> Codebook:
    """The integers 0 .. 2^bits - 1: steps above the minimum of a block (scale="minmax")."""
    _check_bits("uniform", bits, (1, 2, 3, 4, 8))
    levels = tuple(float(c) for c in range(2**bits))
    coefficients = ((2**bits - 1) / 2, 1.0)
    return Codebook(bits=bits, levels=levels, coefficients=coefficients, name=f"u{bits}")


def centred_integers(bits: int) -> Codebook:
    """-(2^bits - 1) / 2, ..., -1/2, 1/2, ... in steps of 1: the scale is the step."""
    _check_bits("centred_integers", bits, (1, 2, 3, 4, 8))
    levels = tuple((np.arange(2**bits) - (2**bits - 1) / 2).tolist())
    return Codebook(bits=bits, levels=levels, coefficients=(0.0, 1.0), name=f"c{bits}")


def integer(bits: int, signed: bool = False) -> Codebook:
    """Evenly spaced levels with one at 0, for scale="absmax" (or "signed_absmax" if `signed`).

    absmax: level = (code - 2^(b-1)) / (2^(b-1) - 1), so that +-1 occur and code 0 is never used,
    as in symmetric int8 with a scale of max|x| / 127. signed: level = (code - 2^(b-1) + 1) /
    2^(b-1), so that the extreme takes the one level that has no counterpart, as in the q4_0 format.
    """
    _check_bits("integer", bits, (2, 3, 4, 8))
    half = 2 ** (bits - 1)
    offset, step = (half - 1, 1 / half) if signed else (half, 1 / (half - 1))
    coefficients = (((2**bits - 1) / 2 - offset) * step, step)
    levels = tuple((c - offset) * step for c in range(2**bits))
    name = f"int{bits}" + ("-signed" if signed else "")
    return Codebook(bits=bits, levels=levels, coefficients=coefficients, name=name)


@_made_once
def normal_float(bits: int, offset: float | None = None) -> Codebook:
    """NormalFloat: quantiles of the normal distribution, with levels at -1, 0 and 1; for "absmax".

    Args:   bits: 2, 3 or 4. Below 4 bits these are far from the best (`block_normal`): for
      ablations.
            offset: the outermost quantile; the default is NF4's at every width.
    Source: Dettmers et al. (2023), QLoRA; 4 bits with the default offset is the published table.
    """
    _check_bits("normal_float", bits, (2, 3, 4))
    if offset is not None and not (isinstance(offset, numbers.Real) and 0.5 < offset < 1):
        raise ValueError(
            "codebooks.normal_float: offset must be a quantile between 0.5 and 1, or None for "
            f"NF4's; got {offset!r}"
        )
    if bits == 4 and offset is None:
        return Codebook(bits=4, levels=tuple(NF4_LEVELS.tolist()), name="nf4")
    d, half = NF4_OFFSET if offset is None else offset, 2 ** (bits - 1)
    positive = special.ndtri(np.linspace(d, 0.5, half + 1)[:-1])
    negative = -special.ndtri(np.linspace(d, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative])) / special.ndtri(d)
    name = f"nf{bits}" if offset is None else f"nf{bits}({offset:g})"
    return Codebook(bits=bits, levels=tuple(levels.tolist()), name=name)


@_made_once
def lloyd_max_normal(bits: int) -> Codebook:
    """The quantizer of least mean squared error for N(0, 1); for scale="rms".

    Source: Lloyd (1957), Max (1960); solved here to 1e-12 (distortions .3634, .1175, .03455,
      .00950).
    """
    _check_bits("lloyd_max_normal", bits, (1, 2, 3, 4))

    def moments(thresholds):
        ends = np.concatenate([[-np.inf], thresholds, [np.inf]])
        density = np.exp(-(ends**2) / 2) / np.sqrt(2 * np.pi)
        return np.diff(special.ndtr(ends)), -np.diff(density)

    n = 2**bits
    levels = lloyd(moments, np.sqrt(3) * special.ndtri((np.arange(n) + 0.5) / n))
    levels = (levels - levels[::-1]) / 2  # symmetric to the last bit, as the density is
    coefficients = None
    if bits == 2:  # four levels that are symmetric lie on an odd cubic
        linear, cube = np.linalg.solve([[0.5, 0.125], [1.5, 3.375]], levels[2:])
        coefficients = (0.0, float(linear), 0.0, float(cube))
    return Codebook(
        bits=bits, levels=tuple(levels.tolist()), coefficients=coefficients, name=f"lloyd{bits}"
    )


@_made_once
def uniform_normal(bits: int) -> Codebook:
    """Evenly spaced levels of least mean squared error for N(0, 1); for scale="rms".

    Levels that are codes times a step cost a kernel next to nothing. Against `lloyd_max_normal`
    the error is 1.2 % higher at 2 bits, 8 % at 3 and 21 % at 4.

    Source: Max (1960), table II (steps .9957, .5860, .3352).
    """
    _check_bits("uniform_normal", bits, (2, 3, 4))
    centred = np.arange(2**bits) - (2**bits - 1) / 2

    def error(step):
        ends = np.concatenate([[-np.inf], step * (centred[1:] - 0.5), [np.inf]])
        mass = np.diff(special.ndtr(ends))
        first = -np.diff(np.exp(-(ends**2) / 2) / np.sqrt(2 * np.pi))
        return 1 - 2 * step * np.sum(centred * first) + step**2 * np.sum(centred**2 * mass)

    found = optimize.minimize_scalar(error, bounds=(0.1, 2.0), options=dict(xatol=1e-10))
    step = float(found.x)
    levels = tuple((step * centred).tolist())
    return Codebook(bits=bits, levels=levels, coefficients=(0.0, step), name=f"even{bits}")


@_made_once
def block_normal(bits: int, block_size: int, signed: bool = False) -> Codebook:
    """The codebook of least squared error for Gaussian blocks scaled by their largest element.

    It minimises E |x - s * level|^2 over blocks of `block_size` independent normal elements, s
    being the extreme of the block: its magnitude ("absmax"), or the element itself
    ("signed_absmax").

    Args: bits: 1..6.  block_size: >= 2.  signed: which of the two.
    Source: the observation that NF4 is not optimal after absmax scaling is Yoshida (2023),
            arXiv:2306.06965; the same objective by simulation is BOF4, arXiv:2505.06653.
    """
    _check_bits("block_normal", bits, range(1, 7))
    moments, start = _scaled_block(bits, block_size, signed)
    levels = lloyd(moments, start)
    levels = levels if signed else (levels - levels[::-1]) / 2
    name = f"block{bits}@{block_size}" + ("-signed" if signed else "")
    return Codebook(bits=bits, levels=tuple(levels.tolist()), name=name)


@_made_once
def cubic_normal(bits: int, block_size: int, signed: bool = False) -> Codebook:
    """Like `block_normal`, among codebooks whose levels are a cubic in the centred code.

    Such levels need no table: a decoder computes them with three multiply-adds. Without `signed`
    the cubic is odd, a t + b t^3. At 4 bits and blocks of 64 to 256 the error is 1 to 2 % above the
    optimum's, and below NF4's.

    Args: bits: 2..6.  block_size: >= 2.  signed: as in `block_normal`.
    """
    _check_bits("cubic_normal", bits, range(2, 7))
    moments, start = _scaled_block(bits, block_size, signed)
    t = np.arange(2**bits) - (2**bits - 1) / 2
    powers = np.array([0, 1, 2, 3] if signed else [1, 3])
    basis = t[:, None] ** powers  # [levels, powers]

    def centroids_to_levels(weight, centroid):
        # The error of a cell around its centroid does not depend on the level: what remains is a
        # weighted least-squares fit of the centroids.
        root = np.sqrt(weight)[:, None]
        fit = np.linalg.lstsq(root * basis, root[:, 0] * centroid, rcond=None)[0]
        return basis @ fit

    levels = lloyd(moments, start, centroids_to_levels)
    fit = np.linalg.lstsq(basis, levels, rcond=None)[0]
    coefficients = np.zeros(4)
    coefficients[powers] = fit
    name = f"cubic{bits}@{block_size}" + ("-signed" if signed else "")
    return Codebook(
        bits=bits, levels=tuple((basis @ fit).tolist()), coefficients=tuple(coefficients.tolist()),
        name=name,
    )  # fmt: skip


# Positive levels of `stepped_normal`, in steps.
STEPS = (1, 3, 5, 7, 9, 11, 14, 18)


@_made_once
def stepped_normal(bits: int, block_size: int) -> Codebook:
    """Like `block_normal`, with levels that are +-1, 3, 5, 7, 9, 11, 14 and 18 equal steps.

    With the code's top bit as the sign and u = b2 b1 b0 the rest, counted from zero outwards, the
    magnitude is 2 u + 1 + b2 b1 (1 + 2 b0): few bit operations, on all the codes of a word at once,
    and whole numbers, exact in any dtype. The error is at most 2.5 % above `cubic_normal`'s for
    blocks of 64 to 256, and below NF4's. Only the step depends on the block.

    Args: bits: 4.  block_size: >= 2.
    """
    _check_bits("stepped_normal", bits, (4,))
    moments, start = _scaled_block(bits, block_size, signed=False)
    steps = np.concatenate([-np.array(STEPS[::-1], np.float64), STEPS])

    def centroids_to_levels(weight, centroid):
        return steps * np.sum(weight * steps * centroid) / np.sum(weight * steps**2)

    levels = lloyd(moments, start, centroids_to_levels)
    return Codebook(bits=4, levels=tuple(levels.tolist()), name=f"stepped4@{block_size}")


def fit(samples, bits: int, weights=None, name: str = "fitted") -> Codebook:
    """The codebook of least weighted squared error for `samples`, by Lloyd's algorithm.

    Deterministic: it runs from three fixed starts (companding quantiles, quantiles, quantiles of
    the distinct values, so that far outliers and repeated values do no harm) and keeps the best. A
    histogram can be passed as its bin centres with the counts as weights.

    Args:    samples: array of finite numbers, any shape.  bits: 1..8.
             weights: of the shape of `samples`, not negative; None for equal weights.
    Raises:  ValueError if there are fewer than 2^bits distinct values, or a number is not finite.
    """
    _check_bits("fit", bits, range(1, 9))
    x = np.asarray(samples, np.float64).ravel()
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    valid = x.size == w.size and np.all(np.isfinite(x)) and np.all(np.isfinite(w) & (w >= 0))
    if not valid:
        raise ValueError(
            "codebooks.fit: samples must be finite, with as many finite weights >= 0; got "
            f"{x.size} samples and {w.size} weights"
        )
    x, at = np.unique(x[w > 0], return_inverse=True)
    w = np.bincount(at, w[w > 0])
    if x.size < 2**bits:
        raise ValueError(
            f"codebooks.fit: needs at least 2**bits = {2**bits} distinct samples of positive "
            f"weight; got {x.size}"
        )
    mass_below, first_below, second = (
        np.concatenate([[0.0], np.cumsum(w * x**power)]) for power in (0, 1, 2)
    )

    def moments(thresholds):
        ends = np.concatenate([[0], np.searchsorted(x, thresholds, side="right"), [x.size]])
        return np.diff(mass_below[ends]), np.diff(first_below[ends])

    shares = (np.arange(2**bits) + 0.5) / 2**bits
    middle = (mass_below[1:] + mass_below[:-1]) / 2
    edges = np.unique(np.interp(np.linspace(0, mass_below[-1], 1025), middle, x))
    mass = np.diff(np.interp(edges, x, middle))
    best, least = None, np.inf
    for start in (
        companded_start(edges, mass, 2**bits) if edges.size > 2**bits else x[:0],
        np.interp(shares * mass_below[-1], middle, x),
        x[(shares * x.size).astype(np.int64)],
    ):
        if start.size == 0 or np.any(np.diff(start) <= 0):
            continue
        levels = lloyd(moments, start)
        mass_in, first_in = moments((levels[1:] + levels[:-1]) / 2)
        error = second[-1] - np.sum(levels * (2 * first_in - levels * mass_in))
        if error < least:
            best, least = levels, error
    return Codebook(bits=bits, levels=tuple(best.tolist()), name=name)


def _check_bits(what: str, bits: int, allowed) -> None:
    if not is_whole(bits) or bits not in allowed:
        raise ValueError(f"codebooks.{what}: bits must be one of {tuple(allowed)}; got {bits!r}")


def _scaled_block(bits: int, block_size: int, signed: bool):
    """Moments of the density, weighted by s^2, of an element of a scaled Gaussian block; a start.

    Given the extreme m = max|x| of n elements, one element is it, and the others are independent
    normals cut off at +-m. An error in units of m costs m^2, hence the weight; m is integrated out.
    """
    n, num_bins = block_size, 4096
    if not is_whole(n) or n < 2:
        raise ValueError(f"codebooks: block_size must be at least 2, a whole number; got {n!r}")
    m = np.linspace(1e-3, 9.0, 600)[:, None]
    edges = np.linspace(-1.0, 1.0, num_bins + 1)
    inside = special.erf(m / np.sqrt(2))  # P(|x| < m)
    normal = np.exp(-(m**2) / 2) * np.sqrt(2 / np.pi)  # density of |x| at m
    # Density of m times m^2, per element; the step of the m grid cancels everywhere.
    weight = np.exp((n - 1) * np.log(inside)) * normal * m**2
    y = (edges[1:] + edges[:-1]) / 2
    shape = np.exp(-((m * y) ** 2) / 2) * m / np.sqrt(2 * np.pi)  # cut-off normal, times P(|x| < m)
    mass = ((n - 1) * np.sum(weight / inside * shape, axis=0)) * (edges[1] - edges[0])
    extreme = np.sum(weight)
    atoms = (0.0, extreme) if signed else (extreme / 2, extreme / 2)
    # Only the continuous part makes the start: the outermost levels are near the atoms anyway.
    return histogram_moments(edges, mass, atoms), companded_start(edges, mass, 2**bits)
