"""The GPU kernel as it was compiled, executed on the CPU, against the float64 oracle.

    python tests/aot/execute.py [CASE ...]

Every instruction, of every thread (see `ptx`), twice: what is asynchronous happens at once, with
the first warp ahead; or when it is waited for, with the last one ahead. Results must be the same
bits, and those of the oracle.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dump  # first: see there
import jax
import jax.numpy as jnp
import numpy as np
from decode_attention_cases import CASES, LENGTHS, arguments, check
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx import host, machine
from ptx.memory import Global
from ptx.program import parse
from tqdm import tqdm

from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu, unsupported
from nqkv_jax.tiles import TOKENS

SCHEDULES = machine.Schedule(), machine.Schedule(warps=(3, 1, 2, 0), late=True)
TOLERANCE = 2e-3  # of products in float16


def executed(kernel):
    """The same kernel, for an H100 that is not there."""

    def call(*operands):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
        dump.compile_for_h100(jax.jit(kernel), *shapes)
        results = jax.eval_shape(kernel, *shapes)
        run = functools.partial(_run, parse(dump.text(".ptx")), dump.text(".ll"), results)
        return jax.pure_callback(run, results, *operands)

    return call


def _run(program, host_code: str, results, *operands) -> tuple[np.ndarray, ...]:
    inputs = [aligned(np.asarray(a)) for a in operands]
    before = [a.tobytes() for a in inputs]
    found = []
    for schedule in SCHEDULES:
        outputs = [aligned(np.full(a.shape, np.nan, a.dtype)) for a in results]
        launch = host.launch(host_code, program, inputs + outputs)
        machine.run(program, launch, Global(inputs + outputs), schedule)
        found.append(outputs)
    if [a.tobytes() for a in inputs] != before:
        raise RuntimeError("the kernel wrote to its operands")
    first, second = ([a.tobytes() for a in outputs] for outputs in found)
    if first != second:
        raise RuntimeError("results depend on what happens first, of what no instruction orders")
    return tuple(found[0])


def aligned(a: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 256 bytes, as buffers of a GPU are."""
    data = np.empty(a.nbytes + 256, np.uint8)
    first = -data.ctypes.data % 256
    copy = data[first : first + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def served(case) -> bool:
    _, key, value, *_ = arguments(case, (1,), num_tiles=4)
    return unsupported("mosaic_gpu", key, value, case.group) is None


def runs(names: list[str]):
    """(case, tiles, lengths)"""
    for name in names:
        # With a window the kernel is the same as without, and a process compiles a kernel once.
        yield CASES[name], 4 if CASES[name].window is None else 5, LENGTHS
    for name in set(names) & {"cubic4", "uniform3-minmax", "plus2"}:
        # Several splits, of units that follow each other in the same memory; the last is moved.
        yield CASES[name], 17, (0, 1, 1153, 17 * TOKENS)


def main() -> None:
    cases = [name for name, case in CASES.items() if served(case)]
    names = sys.argv[1:] or cases
    if unknown := set(names) - set(cases):
        sys.exit(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(cases)}")
    kernel = plgpu.kernel
    mosaic_gpu.plgpu.kernel = lambda *args, **options: executed(kernel(*args, **options))
    planned, failed = list(runs(names)), 0
    for case, num_tiles, lengths in tqdm(planned, unit="case", disable=None):
        try:
            check(case, jnp.bfloat16, TOLERANCE, num_tiles, lengths, implementation="mosaic_gpu")
        except Exception as error:
            failed += 1
            message = f"{case} of {num_tiles} tiles: {type(error).__name__}: {error}"
            tqdm.write(message, file=sys.stderr)
    print(f"{len(planned) - failed} of {len(planned)} as the oracle has them")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
