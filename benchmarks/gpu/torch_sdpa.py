"""torch's attention on the same arrays, as another bfloat16 baseline."""

import os
import subprocess
import sys

PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp
from gpu import torch_sdpa
q = jnp.ones((1, 4, 64), jnp.bfloat16)
k = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
print(torch_sdpa.Program(q, [(k, k)], steps=2).seconds())
"""


def probe(folder: str) -> subprocess.Popen:
    """Tries torch beside jax in a process of its own: their libraries may not get along."""
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )  # fmt: skip


def why_not(trial: subprocess.Popen) -> str | None:
    """Why torch cannot be measured here, if it cannot."""
    try:
        _, log = trial.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        trial.kill()
        return "torch beside jax did not end in 90 s"
    last = log.strip().splitlines()[-1:] or ["no message"]
    return f"torch beside jax: {last[0][:300]}" if trial.returncode else None


class Program:
    """One query per sequence over caches in turn, recorded as a CUDA graph.

    Args:
      q: bf16[B, Hq, D], a jax array, as all.
      caches: (k, v) of bf16[B, T, Hkv, D]; not copied.
      steps: how often to go through the caches.

    Raises: ImportError without torch, RuntimeError without CUDA.
    """

    def __init__(self, q, caches, steps: int):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("this torch has no CUDA")
        self._torch = torch
        to_torch = lambda a: torch.from_dlpack(a)
        self._query = to_torch(q)[:, :, None].clone()
        self._caches = [[to_torch(a).transpose(1, 2) for a in cache] for cache in caches]
        self._launches = steps * len(caches)
        self._steps = steps
        self._many()  # picks and loads what a recording may not
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = self._many()

    def _many(self):
        torch, x = self._torch, self._query
        for _ in range(self._steps):
            for k, v in self._caches:
                x = torch.nn.functional.scaled_dot_product_attention(x, k, v, enable_gqa=True)
        return x

    def seconds(self) -> float:
        """Of one launch."""
        cuda = self._torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self._launches
