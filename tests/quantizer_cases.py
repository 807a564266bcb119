"""Quantizers and data that their tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax import codebooks
from nqkv_jax.quantizers import BlockQuantizer, Context, FullPrecision

NF4 = codebooks.normal_float(4)
EMPTY = Context()
SCALE_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


def block(book, block_size, **kwargs):
    return BlockQuantizer(book, block_size=block_size, **kwargs)


def minmax(bits, block_size, **kwargs):
    return block(codebooks.uniform(bits), block_size, scale="minmax", **kwargs)


QUANTIZERS = {
    "nf4": block(NF4, 256),
    "signed": block(codebooks.block_normal(4, 64, True), 64, scale="signed_absmax"),
    "cubic3": block(codebooks.cubic_normal(3, 128), 128),
    "rms": block(codebooks.lloyd_max_normal(2), 64, scale="rms"),
    "rms-tokens": block(codebooks.lloyd_max_normal(1), 24, scale="rms", axis="tokens"),
    "kivi-value": minmax(2, 32),
    "kivi-key": minmax(2, 32, axis="tokens"),
    "int8": block(codebooks.integer(8), 64),
    "q4_0": block(codebooks.integer(4, True), 32, scale="signed_absmax", scale_dtype=jnp.bfloat16),
    "fp8": block(codebooks.Float8(), 64),
    "fp8-e5m2": block(codebooks.Float8("e5m2"), 128, scale_dtype=jnp.float32),
    "none": FullPrecision(),
}
every = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


@jax.jit
def encode(quantizer, x):
    return quantizer.quantize(x, EMPTY)


@functools.partial(jax.jit, static_argnames="dtype")
def decode(quantizer, payload, dtype=jnp.float32):
    return quantizer.dequantize(payload, EMPTY, dtype)


@jax.jit
def jitted_round_trip(quantizer, x):
    return quantizer.dequantize(quantizer.quantize(x, EMPTY), EMPTY)


def round_trip(quantizer, x):
    return np.asarray(jitted_round_trip(quantizer, jnp.asarray(x)))


def sample(quantizer, heads=4, head_dim=64, seed=0, groups=None):
    shape = (quantizer.group, heads, head_dim)
    shape = shape if groups is None else (groups, *shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
