"""A cache whose sequences are on several devices, in a process that has two."""

import os
import subprocess
import sys

PROGRAM = """
import functools

import chex
import jax
import numpy as np
from cases import ROTARY, make_cache, make_qkv
from jax.sharding import NamedSharding, PartitionSpec

import nqkv_jax as nq

mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
by_sequence = PartitionSpec("batch")
attend = functools.partial(nq.attend, rotary=ROTARY)
in_parts = jax.shard_map(
    attend, mesh=mesh, in_specs=by_sequence, out_specs=by_sequence, check_vma=False
)
for spec in ("nqkv", "kivi"):
    new, cache = make_qkv(151), make_cache(spec, max_len=256)
    prompt, token = ([a[:, cut] for a in new] for cut in (slice(150), slice(150, None)))
    _, cache = jax.jit(attend)(*prompt, cache)
    expected = jax.jit(attend)(*token, cache)
    for run in (attend, in_parts):
        there = jax.device_put((token, cache), NamedSharding(mesh, by_sequence))
        found = jax.jit(run)(*there[0], there[1])
        assert len(jax.tree.leaves(found)[0].sharding.device_set) == 2
        np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
        chex.assert_trees_all_equal(found[1], expected[1])
print("two devices")
"""


def test_sequences_on_two_devices():
    """By `jit`, which partitions what it finds, and in parts, which is how kernels are used."""
    folder = os.path.dirname(__file__)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout == "two devices\n", done.stderr
