"""Every case of the tests of decode attention, on this device, against the float64 oracle."""

import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from gpu import ROOT
from gpu.journal import Unit

sys.path.insert(0, str(ROOT / "tests"))
import exact_attention_cases
from decode_attention_cases import CASES, arguments, dense, oracle
from vector_attention_cases import VectorCase

from nqkv_jax.pallas_kernels.decode_attention import decode_attention, mosaic_gpu, unsupported

KERNEL, VECTOR_KERNEL = "mosaic_gpu", "triton"
AHEAD = 8  # cases that are compiled at a time
# Of the largest value, and of the largest log-sum. Products of kernels are in float16; those of
# XLA in float32.
TOLERANCE = {KERNEL: 2e-3, VECTOR_KERNEL: 2e-3, "xla": 1e-4}
# Valid tokens and tiles: as in the tests; and long, with all ends odd, in few splits, so that units
# follow each other in the same memory.
SIZES = {"short": ((0, 1, 200, 384), 4), "long": ((8192, 5001, 129), 64)}
LONG_SPLITS = 3


def why_not(implementation: str, key, value, group: int) -> str | None:
    """Why an implementation cannot run here."""
    if implementation == "xla":
        return None
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU; this is {jax.default_backend()}"
    reason = unsupported(implementation, key, value, group)
    return reason and f"needs {reason}"


class _Programs:
    """Inputs and compiled programs of cases, made in the background ahead of their turn."""

    def __init__(self, jobs: list[tuple]):
        self._jobs, self._made = jobs, {}
        self._pool = ThreadPoolExecutor(AHEAD)

    def __call__(self, index: int):
        for i in range(index, min(index + AHEAD, len(self._jobs))):
            if i not in self._made:
                self._made[i] = self._pool.submit(_compile, *self._jobs[i])
        return self._made[index].result()


def _compile(case, implementation: str, size: str):
    """The arguments and the program, or why there is none."""
    lengths, num_tiles = SIZES[size]
    *arrays, first = arguments(case, lengths, num_tiles=num_tiles, dtype=jnp.bfloat16)
    if reason := why_not(implementation, arrays[1], arrays[2], case.group):
        return reason
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation=implementation)
    if (implementation, size) == (KERNEL, "long"):
        first = jnp.zeros_like(arrays[3]) if first is None else first
        run = functools.partial(
            mosaic_gpu.decode_attention, soft_cap=case.soft_cap, splits=LONG_SPLITS
        )
    program = jax.jit(run).lower(*arrays, first=first).compile()
    return (*arrays, first), functools.partial(program, *arrays, first=first)


def errors(given: tuple, found: tuple, soft_cap: float | None) -> dict:
    """The largest errors of outputs and of log-sums, relative to the largest of each.

    Args: given, found: what `decode_attention` takes and returns.
    Raises: ValueError if tokens are seen where there are none, or the other way round.
    """
    expected, total = oracle(*given, soft_cap)
    numerator, denominator, maximum = map(np.asarray, found)
    seen = denominator > 0
    if not np.array_equal(seen, np.isfinite(total)):
        raise ValueError(f"expected sums above 0 where tokens are seen; got {denominator}")
    out = numerator / np.where(seen, denominator, 1)[..., None]
    log_sum = np.log(denominator[seen]) + maximum[seen]
    # The largest of what has a NaN is NaN, which is within no tolerance.
    return dict(
        error=float(np.abs(out - expected).max() / np.abs(dense(given[2])).max()),
        log_sum_error=float(np.abs(log_sum - total[seen]).max() / np.abs(total[seen]).max()),
    )


def units(cases: Sequence[str] = tuple(CASES)) -> list[Unit]:
    """One for each case, implementation and size: all kernels first, as time may be up."""
    chosen = [CASES[name] for name in cases]
    kernel_of = lambda case: VECTOR_KERNEL if isinstance(case, VectorCase) else KERNEL
    jobs = [(case, kernel_of(case), size) for size in SIZES for case in chosen]
    jobs += [(case, "xla", "short") for case in chosen]
    programs = _Programs(jobs)
    return [_unit(i, *job, programs) for i, job in enumerate(jobs)]


def exact_units(names: Sequence[str] = tuple(exact_attention_cases.CASES)) -> list[Unit]:
    """Likewise, of the kernel for sinks and residual."""

    def unit(case) -> Unit:
        slots = case.slots.num_sinks + case.slots.ring
        fields = dict(
            part="check", spec=f"exact-{case.name}", implementation=VECTOR_KERNEL, bits=16,
            num_kv_heads=exact_attention_cases.HEADS, context=slots,
            batch=len(exact_attention_cases.FIRST),
        )  # fmt: skip

        def run(note, fatal) -> list[dict]:
            if jax.default_backend() != "gpu":
                skipped = f"needs a GPU; this is {jax.default_backend()}"
                return [dict(**fields, passed=None, skipped=skipped)]
            exact_attention_cases.check(case)
            return [dict(**fields, passed=True)]

        failed = lambda reason: [dict(**fields, passed=False, failure=reason)]
        return Unit(f"check/exact-{case.name}", run, failed)

    return [unit(exact_attention_cases.CASES[name]) for name in names]


def _unit(index: int, case, implementation: str, size: str, programs: _Programs) -> Unit:
    fields = dict(
        part="check", spec=f"{case.name}/{size}", implementation=implementation,
        bits=case.bits, num_kv_heads=case.heads, context=max(SIZES[size][0]),
        batch=len(SIZES[size][0]),
    )  # fmt: skip

    def run(note, fatal) -> list[dict]:
        made = programs(index)
        if isinstance(made, str):
            return [dict(**fields, passed=None, skipped=made)]
        given, program = made
        found = errors(given, jax.device_get(program()), case.soft_cap)
        limit = TOLERANCE[implementation]
        good = all(error <= limit for error in found.values())
        return [dict(**fields, **found, passed=good, tolerance=limit)]

    def failed(reason: str) -> list[dict]:
        return [dict(**fields, passed=False, failure=reason)]

    return Unit(f"check/{case.name}/{implementation}/{size}", run, failed)
