"""Cases of the kernel that merges splits, for tests and for the execution of its instructions."""

import jax
import numpy as np

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_merge import merge

# Splits, head_dim, query heads.
CASES = [(2, 64, 8), (8, 128, 8), (11, 80, 16), (24, 256, 32)]


def check(splits: int, head_dim: int, group: int, interpret=None) -> None:
    """
    Raises: AssertionError if it is not what NumPy gives in float64.
    """
    rng = np.random.default_rng(splits)
    size = (2, 3, splits)
    draw = lambda *more: rng.normal(size=(*size, *more)).astype(np.float32)
    numerator, denominator = draw(head_dim, group), np.abs(draw(group))
    maximum = 30 * draw(group)
    # A split without tokens, a head without any, and a number that is not finite.
    for arrays, value in ((numerator, 0), (denominator, 0), (maximum, -1e29)):
        arrays[0, 0, 1], arrays[1, 2] = value, value
    numerator[0, 1, -1, 5, 2] = np.inf
    given = numerator, denominator, maximum
    found = jax.jit(lambda *a: merge(*a, interpret=interpret))(*given)
    top = maximum.max(2)
    weight = np.exp((maximum - top[:, :, None]).astype(np.float64))
    expected = (numerator * weight[:, :, :, None]).sum(2), (denominator * weight).sum(2), top
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
