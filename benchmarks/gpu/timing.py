"""Times on a device: many launches in one program, programs in turn, medians."""

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.journal import DeviceLost

L2_BYTES = 50 * 2**20  # of an H100


def chained(run: Callable, steps: int) -> Callable:
    """(q, caches) -> (q, out): `run(q, cache) -> out`, for every cache in turn, `steps` times.

    `out` has the shape of `q`, and goes into the next query, so that no launch can be left out or
    overlap with another.
    """
    run = jax.jit(run)  # traced and lowered once for all caches

    def many(q, caches):
        def step(_, carry):
            x, _ = carry
            for cache in caches:
                # Else what depends on the cache alone, such as its decoding, could be done once.
                x, cache = jax.lax.optimization_barrier((x, cache))
                out = run(x, cache).astype(q.dtype)
                x = q + out * jnp.asarray(1e-6, q.dtype)
            return x, out

        return jax.lax.fori_loop(0, steps, step, (q, jnp.zeros_like(q)))

    return jax.jit(many)


def examine(error: Exception) -> None:
    """Raises DeviceLost if an error has left the device unusable: an illegal access does."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:
        raise DeviceLost(str(error)) from error


def copies_for(nbytes: int, most: int) -> int:
    """How many caches to go through in turn, so that none is still in the L2 when it comes again.

    At most `most`, as each is a call in the program: the smallest caches would need more.
    """
    return min(most, -(-2 * L2_BYTES // nbytes))


def side_by_side(makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """{name: what its function returns, or the exception}; for compiling, which takes one core."""

    def one(make):
        try:
            return make()
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(makers, pool.map(one, makers.values()), strict=True))


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turn(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, in rounds: what else the machine does meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    return times


def summary(times: list[float]) -> dict:
    """The fields of a record that describe its times, of one launch each."""
    median = float(np.median(times))
    return dict(median_us=1e6 * median, spread=float(np.ptp(times)) / median, n=len(times))


def bandwidth(nbytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a pass over an array, that reads and writes it ("copy") or reads it ("read")."""
    steps = 8
    x = jnp.zeros(nbytes // 4, jnp.uint32)

    @functools.partial(jax.jit, donate_argnums=0)
    def copy(x):
        def step(i, x):
            return jax.lax.optimization_barrier(x) + i.astype(jnp.uint32)

        return jax.lax.fori_loop(0, steps, step, x)

    @jax.jit
    def read(x):
        def step(_, total):
            same, total = jax.lax.optimization_barrier((x, total))
            return total + jnp.sum(same)

        return jax.lax.fori_loop(0, steps, step, jnp.uint32(0))

    times: dict[str, list[float]] = {"copy": [], "read": []}
    for i in range(repeats + 1):
        began = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        copied = time.perf_counter()
        jax.block_until_ready(read(x))
        if i:  # the first round compiles
            times["copy"].append((copied - began) / steps)
            times["read"].append((time.perf_counter() - copied) / steps)
    return times
