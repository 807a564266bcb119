"""Fragments of matrices in the registers of a warp (PTX ISA, "Matrix multiply-accumulate")."""

import numpy as np

from .memory import Shared, swizzle

LANE = np.arange(32)


def load_matrices(shared: Shared, rows: np.ndarray, count: int, transposed: bool) -> np.ndarray:
    """`ldmatrix`: uint32[count, 32], of 8 x 8 matrices of 16 bits, whose rows' addresses lanes have
    in turn."""
    matrices = shared.load(rows[: 8 * count], 16).view(np.uint16).reshape(count, 8, 8)
    if transposed:
        matrices = np.swapaxes(matrices, 1, 2)
    # Lane l has columns 2 (l mod 4) and the next of row l / 4.
    return np.ascontiguousarray(matrices).reshape(count, 64).view(np.uint32)


def store_matrices(
    shared: Shared, rows: np.ndarray, fragments: np.ndarray, transposed: bool, warp: int
) -> None:
    """`stmatrix`, the same the other way."""
    count = len(fragments)
    matrices = np.ascontiguousarray(fragments).view(np.uint16).reshape(count, 8, 8)
    if transposed:
        matrices = np.swapaxes(matrices, 1, 2)
    data = np.ascontiguousarray(matrices).reshape(8 * count, 8).view(np.uint8)
    shared.store(rows[: 8 * count], data, warp)


def transposed(fragment: np.ndarray) -> np.ndarray:
    """`movmatrix`: uint32[32], of one such matrix."""
    matrix = np.ascontiguousarray(fragment).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(matrix.T).reshape(64).view(np.uint32)


def left_operand(fragments: np.ndarray, kind=np.float16) -> np.ndarray:
    """kind[16, 16] of uint32[4, 32]: a warp's rows of the left operand of `wgmma` and `mma`."""
    matrix = np.empty((16, 16), kind)
    for n, registers in enumerate(fragments):
        row, column = 8 * (n % 2) + LANE // 4, 8 * (n // 2) + 2 * (LANE % 4)
        pairs = registers.view(kind).reshape(32, 2)
        matrix[row, column], matrix[row, column + 1] = pairs[:, 0], pairs[:, 1]
    return matrix


def right_fragments(fragments: np.ndarray, kind) -> np.ndarray:
    """kind[16, 8] of uint32[2, 32]: the right operand of `mma`."""
    matrix = np.empty((16, 8), kind)
    for n, registers in enumerate(fragments):
        pairs, row = registers.view(kind).reshape(32, 2), 8 * n + 2 * (LANE % 4)
        matrix[row, LANE // 4], matrix[row + 1, LANE // 4] = pairs[:, 0], pairs[:, 1]
    return matrix


def multiply_add(a: np.ndarray, b: np.ndarray, sums: np.ndarray | None) -> np.ndarray:
    """f32[m, n]: sums + a [m, 16] @ b [n, 16]^T, as coarse as a tensor core may be.

    What is added is cut off at the last bit that the largest of it has in float32, and so is the
    sum.
    """
    terms = a.astype(np.float64)[:, None] * b.astype(np.float64)[None]
    if sums is not None:
        terms = np.concatenate([terms, sums.astype(np.float64)[..., None]], axis=2)
    _, exponent = np.frexp(np.abs(terms).max(axis=2, keepdims=True))
    last = np.ldexp(1.0, exponent - 24)
    total = np.sum(np.trunc(terms / last), axis=2, keepdims=True) * last
    _, exponent = np.frexp(total)
    last = np.ldexp(1.0, exponent - 24)
    return (np.trunc(total / last) * last)[..., 0].astype(np.float32)


def shared_operand(shared: Shared, descriptor: int, columns: int, kind=np.float16) -> np.ndarray:
    """kind[columns, 16] of shared memory: the 16 elements that are summed over, for each column of
    the right operand (or row of the left one).

    Raises:
      NotImplementedError: the descriptor has an offset.
    """
    field = lambda first, bits: descriptor >> first & (2**bits - 1)
    span = {0: 16, 1: 128, 2: 64, 3: 32}[field(62, 2)]
    if field(49, 3):
        raise NotImplementedError("a base offset")
    start, leading, stride = (16 * field(first, 14) for first in (0, 16, 32))
    column, chunk = np.arange(columns)[:, None], np.arange(2)[None, :]  # of 8 elements
    along = 16 * chunk if span > 16 else leading * chunk
    addresses = start + (column // 8) * stride + (column % 8) * span + along
    data = shared.asynchronous_load(swizzle(addresses, span).reshape(-1), 16)
    return data.view(kind).reshape(columns, 16)


def accumulator(matrix: np.ndarray) -> np.ndarray:
    """f32[columns / 2, 32] registers of f32[16, columns]: a warp's rows of an accumulator."""
    registers = []
    for first in range(0, matrix.shape[1], 8):
        for row in (LANE // 4, LANE // 4 + 8):
            column = first + 2 * (LANE % 4)
            registers += [matrix[row, column], matrix[row, column + 1]]
    return np.stack(registers)


def from_accumulator(registers: np.ndarray) -> np.ndarray:
    """The inverse."""
    matrix = np.empty((16, 2 * len(registers)), np.float32)
    at = iter(registers)
    for first in range(0, matrix.shape[1], 8):
        for row in (LANE // 4, LANE // 4 + 8):
            column = first + 2 * (LANE % 4)
            matrix[row, column], matrix[row, column + 1] = next(at), next(at)
    return matrix
