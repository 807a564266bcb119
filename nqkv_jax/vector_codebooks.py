"""Codebooks of vectors: 256 words of 8 numbers, for numbers that are independent and N(0, 1).

    1 bit per number    the code of the nearest word
    2 bits              the code of the word nearest to the magnitudes, and 8 signs

The words come with the package (`nqkv codebook` makes the file). Their elements are multiples of
1 / 32 below 4, so that they are exact as int8, bfloat16 and float16, whatever a kernel reads them
as; that costs 1e-4 of the variance at most.
"""

import functools
import importlib.resources
import math

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

WORDS, LENGTH = 256, 8
STEPS = 32  # per unit
FILE = "vector_codebooks.safetensors"  # of the package
BITS = (1, 2)


@functools.lru_cache
def normal(bits: int) -> np.ndarray:
    """The words f32[256, 8] for N(0, I) at 1 bit per number, for its magnitudes at 2.

    Token cosine (`calibration.codebook.cosine`) at 128 numbers: 0.8257 and 0.9523.
    """
    if bits not in BITS:
        raise ValueError(f"vector_codebooks.normal: bits must be 1 or 2; got {bits}")
    content = (importlib.resources.files("nqkv_jax") / FILE).read_bytes()
    return safetensors.numpy.load(content)[f"words{bits}"].astype(np.float32) / STEPS


def nearest(x: jax.Array, words: np.ndarray | jax.Array, *, norm: float) -> jax.Array:
    """Codes u8[...] of the words of least Euclidean distance to `x` f32[..., 8]; ties to the first.

    `x` is rounded to steps so fine, and no finer, that all products and sums are exact in float32:
    the code does not depend on the order of summation, which differs between programs.

    Args: words: f32[256, 8], multiples of 1 / STEPS.  norm: that no |x| exceeds.
    """
    longest = math.sqrt(float(np.max(np.sum(np.square(words, dtype=np.float64), axis=-1))))
    largest = longest * norm + longest**2 / 2  # of |<x, c> - |c|^2 / 2| and of its partial sums
    per_unit = np.float32(2.0 ** math.floor(24 - math.log2(STEPS * largest)))
    x = jnp.round(x * per_unit) / per_unit
    half_squares = np.sum(np.square(words), axis=-1) / 2
    scores = jnp.matmul(x, jnp.asarray(words.T), precision=jax.lax.Precision.HIGHEST)
    scores = scores - half_squares.reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)
