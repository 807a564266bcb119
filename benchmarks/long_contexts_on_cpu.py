"""Milliseconds of one token's attention over long caches on this CPU, for each scheme.

One sequence, and one layer with the heads of Llama-3-8B (32 of 128 channels, 8 of keys and values),
queries in float32: a token is rotated, appended and attended to, in one jitted program with the
cache donated. Beside the schemes a cache in full precision, in float32 and in bfloat16. All take
turns, because shared machines drift; medians are printed, as a table in Markdown.

    python benchmarks/long_contexts_on_cpu.py --contexts 2048 32768 --schemes nqkv nqkv-plus
"""

import argparse
import functools
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

import nqkv_jax as nq
from nqkv_jax import schemes

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CHUNK = 1024  # tokens that are appended at a time
SCHEMES = [
    "nqkv", "nqkv:codebook=cubic", "nqkv-plus", "nqkv-plus:bits=2", "int8", "fp8", "int4", "kivi",
    "quanto", "hqq", "squat", "turboquant", "quarot", "nsnquant",
]  # fmt: skip
FULL = {"none, float32": jnp.float32, "none, bfloat16": jnp.bfloat16}


def normal(key, tokens: int, heads: int) -> jax.Array:
    return jax.random.normal(key, (1, tokens, heads, HEAD_DIM), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def extended(cache, key, rotary):
    """With `CHUNK` random tokens more."""
    q, k, v = (
        normal(key, CHUNK, heads)
        for key, heads in zip(jax.random.split(key, 3), (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )
    k, v = (a.astype(cache.layers[0].dtype) for a in (k, v))
    queries = q.reshape(1, CHUNK, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    return cache.append(0, k, v, jnp.full(1, CHUNK, jnp.int32), rotary, queries)


class Decoding:
    """One scheme, with `context` tokens in its cache; each call decodes one more."""

    def __init__(self, scheme: str, dtype, context: int, calls: int):
        # Whole tiles, beyond what is decoded here.
        max_len = context + (calls // 128 + 2) * 128
        self.rotary = nq.Rotary(
            inverse_frequencies=5e5 ** (-jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        )
        self.cache = schemes.get(scheme).init(
            num_layers=1, batch=1, max_len=max_len, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
            dtype=dtype,
        )  # fmt: skip
        key = jax.random.key(0)
        for i in range(context // CHUNK):
            self.cache = extended(self.cache, jax.random.fold_in(key, i), self.rotary)
        self.new = [normal(key, 1, heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]

        def step(q, k, v, cache, rotary):
            return nq.attend(q, k, v, cache, layer=0, rotary=rotary)

        self.step = jax.jit(step, donate_argnums=3)
        self()  # compiles

    def __call__(self) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        out, self.cache = self.step(*self.new, self.cache, self.rotary)
        jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start)


def measure(context: int, names: list[str], repeats: int) -> dict[str, float]:
    """Medians, by name."""
    building = tqdm(names, desc=f"{context:,} tokens", unit="cache", disable=None, leave=False)
    decoding = {
        name: Decoding("none" if name in FULL else name, FULL.get(name, jnp.float32), context,
                       repeats + 1)
        for name in building
    }  # fmt: skip
    times = {name: [] for name in names}
    for _ in range(repeats):
        for name, one in decoding.items():
            times[name].append(one())
    return {name: statistics.median(t) for name, t in times.items()}


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text}")
    return number


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python benchmarks/long_contexts_on_cpu.py --contexts 2048 --schemes nqkv",
    )
    parser.add_argument(
        "--contexts", nargs="+", type=positive, default=[2048, 8192, 32768],
        help=f"tokens in the cache, in multiples of {CHUNK}",
    )  # fmt: skip
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--repeats", type=positive, default=20)
    args = parser.parse_args()
    if odd := [n for n in args.contexts if n % CHUNK]:
        parser.error(f"--contexts: expected multiples of {CHUNK}; got {odd}")
    try:
        names = [*FULL, *(str(schemes.get(scheme)) for scheme in args.schemes)]
    except ValueError as error:
        parser.error(str(error))
    found = {context: measure(context, names, args.repeats) for context in args.contexts}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads, jax "
        f"{jax.__version__}; median of {args.repeats}, in ms (and how many times as fast as a "
        "bfloat16 cache)\n"
    )
    print(f"| tokens before | {' | '.join(f'{context:,}' for context in args.contexts)} |")
    print("| --- " * (1 + len(args.contexts)) + "|")
    for name in names:
        cells = [
            f"{times[name]:.1f} ({times['none, bfloat16'] / times[name]:.1f}x)"
            for times in found.values()
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
