"""A jax without the Triton backend of Pallas, which is deprecated."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # as if it were not there

import jax.numpy as jnp
import nqkv_jax as nq
from decode_attention_cases import CASES, arguments
from nqkv_jax.pallas_kernels import (
    append_token, decode_attention, exact_attention, triton_backend,
)

triton_backend.ASKING = ("auto",)
exact_attention.PLATFORMS.add("cpu")
append_token.PLATFORMS.add("cpu")
scheme = nq.schemes.get("nqkv:sinks=4,residual=128")
cache = scheme.init(num_layers=1, batch=1, max_len=256, num_kv_heads=2, head_dim=64)
x = jnp.ones((1, 1, 2, 64), jnp.bfloat16)
out, cache = nq.attend(x, x, x, cache, layer=0)
assert jnp.array_equal(out, x), out
q, key, value, lengths, _ = arguments(CASES["vector2"], (10,))
try:
    decode_attention.decode_attention(q, key, value, lengths, implementation="triton")
except NotImplementedError as error:
    print(error)
"""


def test_a_jax_without_it_leaves_everything_to_xla():
    command = [sys.executable, "-c", PROGRAM]
    folder = __file__.rsplit("/", 1)[0]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton needs the Triton backend of Pallas, which jax" in done.stdout
