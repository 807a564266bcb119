"""Numbers of 64 bits, which are for the whole of a process."""

import os
import subprocess
import sys

PROGRAM = """
import functools

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
import jax.numpy as jnp
import numpy as np

import nqkv_jax as nq

rotary = nq.Rotary(inverse_frequencies=10000.0 ** (-jnp.arange(32) / 32))
attend = jax.jit(functools.partial(nq.attend, rotary=rotary), static_argnames="window")
for scheme, dtype, window in (
    ("nqkv", jnp.float32, None), ("nqkv", jnp.float64, 100), ("kivi", jnp.float32, 100),
    ("nqkv-plus", jnp.float64, None), ("nsnquant:bits=1", jnp.float64, 100),
):
    cache = nq.schemes.get(scheme).init(
        num_layers=1, batch=2, max_len=640, num_kv_heads=2, head_dim=64, windows=[window]
    )
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 200, 2, 64))
    for cut in (slice(0, 199), slice(199, 200)):
        new = (jnp.asarray(a[:, cut], dtype) for a in (q, k, v))
        out, cache = attend(*new, cache, window=window)
    assert out.dtype == dtype and np.isfinite(out).all() and np.abs(out).max() < 1, scheme
    assert cache.positions(1).dtype == jnp.int32
print("64 bits")
"""


def test_caches_work_beside_them():
    command = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "64 bits\n", done.stderr
