"""Seconds to trace and compile one decode step of a 32-layer model, for each scheme.

The program has the shapes of Llama-3-8B, but no weights: they are arguments, and compiling reads
only their shapes.

    python benchmarks/compile_time.py --schemes none nqkv kivi
"""

import argparse
import json
import os
import platform
import time

import jax
import jax.numpy as jnp
from flax import nnx

from nqkv_jax import schemes
from nqkv_jax.models import families
from nqkv_jax.models.loading import apply


def seconds(config, scheme: str, max_len: int) -> dict:
    """Tracing, compiling and temporary bytes of one step with the cache donated."""
    cache = schemes.get(scheme).abstract(
        num_layers=config.num_layers,
        batch=1,
        max_len=max_len,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.bfloat16,
    )
    graphdef, params = nnx.split(families.abstract(config, dtype=jnp.bfloat16))

    def step(params, tokens, cache):
        return apply(graphdef, params, tokens, cache, last_only=True)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=2).lower(params, tokens, cache)
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return dict(
        scheme=scheme,
        trace_seconds=traced - start,
        compile_seconds=time.perf_counter() - traced,
        temporary_bytes=memory.temp_size_in_bytes,
        cache_bytes=cache.nbytes,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: python benchmarks/compile_time.py"
    )
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(families.presets))
    parser.add_argument("--schemes", nargs="+", default=["none", "nqkv", "kivi"])
    parser.add_argument("--max-len", type=int, default=4096)
    args = parser.parse_args()
    config = families.presets[args.model]
    print(
        f"{args.model}, {config.num_layers} layers, {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    for scheme in args.schemes:
        row = seconds(config, scheme, args.max_len)
        print(
            f"{scheme:12s} trace {row['trace_seconds']:5.1f} s   "
            f"compile {row['compile_seconds']:5.1f} s"
        )
        print(json.dumps(row))


if __name__ == "__main__":
    main()
