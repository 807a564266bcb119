"""Lloyd's algorithm on a line, for densities that are described by the moments of their cells."""

import numpy as np


def companded_start(edges: np.ndarray, mass: np.ndarray, levels: int) -> np.ndarray:
    """Quantiles of density^(1/3), near the optimum for many levels (Panter and Dite, 1951)."""
    widths = np.diff(edges)
    cumulative = np.concatenate([[0.0], np.cumsum(np.cbrt(mass / widths) * widths)])
    at = (np.arange(levels) + 0.5) / levels * cumulative[-1]
    return np.interp(at, cumulative, edges)


def histogram_moments(edges: np.ndarray, mass: np.ndarray, atoms=(0.0, 0.0)):
    """thresholds -> (mass, first moment) of the cells between them, with atoms at the two ends.

    The density is constant inside a bin, so that the centroid of a cell lies inside the cell
    however narrow it is, and levels cannot collide.
    """
    density = mass / np.diff(edges)
    mass_below = np.concatenate([[0.0], np.cumsum(mass)])
    first_below = np.concatenate([[0.0], np.cumsum(mass * (edges[1:] + edges[:-1]) / 2)])

    def moments(thresholds):
        ends = np.concatenate([edges[:1], thresholds, edges[-1:]])
        bins = np.clip(np.searchsorted(edges, ends, side="right") - 1, 0, mass.size - 1)
        above = ends - edges[bins]
        cell_mass = np.diff(mass_below[bins] + density[bins] * above)
        cell_first = np.diff(first_below[bins] + density[bins] * above * (ends + edges[bins]) / 2)
        for end, atom in zip((0, -1), atoms, strict=True):
            cell_mass[end] += atom
            cell_first[end] += atom * edges[end]
        return cell_mass, cell_first

    return moments


def lloyd(moments, levels: np.ndarray, to_levels=None, tolerance=1e-12) -> np.ndarray:
    """Cells between midpoints, levels at centroids, in turns until nothing moves.

    Args:    moments: thresholds f64[n - 1] -> (mass f64[n], first moment f64[n]) of the n cells.
             levels: f64[n], increasing: the start.
             to_levels: (mass, centroid) -> levels, where these are not free; None for the
               centroids.
             tolerance: of the largest move, relative to the largest level.
    Returns: f64[n], a local optimum.
    """
    for _ in range(20000):
        mass, first = moments((levels[1:] + levels[:-1]) / 2)
        # An empty cell (possible on a histogram) leaves its level where it is.
        filled = mass > 0
        centroid = np.where(filled, first / np.where(filled, mass, 1.0), levels)
        new = centroid if to_levels is None else to_levels(mass, centroid)
        moved, levels = np.max(np.abs(new - levels)), new
        if moved < tolerance * np.max(np.abs(levels)):
            break
    return levels
