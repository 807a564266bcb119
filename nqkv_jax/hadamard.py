"""Hadamard matrices: entries of ±1, rows that are orthogonal to each other.

Those of powers of two are Sylvester's. The others are Sylvester's times a core by Paley (1933), of
order q + 1 or 2 (q + 1) for a prime q: 80 is 4 * 20, 96 is 8 * 12, 112 is 4 * 28. QuaRot (arXiv
2404.00456) rotates such sizes likewise, with cores from tables. All multiples of 16 up to 512 are
served.
"""

import functools

import numpy as np
from scipy import linalg


@functools.lru_cache
def core_size(size: int) -> int | None:
    """The order of the smallest core whose product with a power of two is `size`.

    1 for powers of two; None if no core is known here, as for odd sizes but 1.
    """
    if size < 1:
        return None
    order = size // (size & -size)  # the odd part
    while order <= size:
        if order in (1, 2):
            return 1
        if _paley_one(order) or _paley_two(order):
            return order
        order *= 2
    return None


@functools.lru_cache
def core(order: int) -> np.ndarray:
    """f32[order, order], the Hadamard matrix of an `order` that `core_size` returns."""
    if order == 1:
        return np.ones((1, 1), np.float32)
    if _paley_one(order):
        # I + S, of a conference matrix S that is skew.
        return np.eye(order, dtype=np.float32) + _conference(order, skew=True)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    symmetric = _conference(order // 2, skew=False)
    return np.float32(np.kron(symmetric, plus) + np.kron(np.eye(order // 2), minus))


def matrix(size: int) -> np.ndarray:
    """f64[size, size], Sylvester's matrix times the core: what `Hadamard` multiplies by."""
    order = core_size(size)
    return np.kron(linalg.hadamard(size // order), core(order))


def largest_hadamard(number: int) -> int:
    """The largest divisor of `number` that is the size of a Hadamard matrix here."""
    return next(size for size in range(number, 0, -1) if number % size == 0 and core_size(size))


def _paley_one(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _paley_two(order: int) -> bool:
    return order % 8 == 4 and _is_prime(order // 2 - 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _conference(order: int, skew: bool) -> np.ndarray:
    """f32[order, order] with zeros on the diagonal, from the quadratic residues of order - 1."""
    q = order - 1
    character = np.full(q, -1.0)
    character[np.square(np.arange(q)) % q] = 1
    character[0] = 0
    matrix = np.ones((order, order), np.float32)
    matrix[0, 0] = 0
    matrix[1:, 0] = -1 if skew else 1
    matrix[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    return matrix
