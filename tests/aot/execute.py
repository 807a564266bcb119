"""The GPU kernels as they were compiled, executed on the CPU, against the float64 oracle.

    python tests/aot/execute.py [GPU] [CASE ...]

For one of `targets.GPUS` (h100). Every instruction, of every thread (see `ptx`), twice: what is
asynchronous happens at once, with the first warp ahead; or when it is waited for, with the last one
ahead. Results must be the same bits, and those of the oracle. In shared memory, threads of a warp
must not wait for each other: those of attention over codes do not, but for waves that meet more
than 8 query heads.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Collection
from typing import NoReturn
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dump  # first: see there
import exact_attention_cases
import jax
import jax.numpy as jnp
import merge_splits_cases
import numpy as np
import targets
from decode_attention_cases import CASES, LENGTHS, arguments, check
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx import host, machine
from ptx.memory import Global
from ptx.program import parse
from tqdm import tqdm
from vector_attention_cases import VectorCase

from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu, mosaic_gpu_machine, unsupported
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import make_plan
from nqkv_jax.tiles import TOKENS

TARGET, NAMES = targets.of_command_line()
MACHINE = targets.GPUS[TARGET].machine
SCHEDULES = machine.Schedule(), machine.Schedule(warps=(3, 1, 2, 0), late=True)
TOLERANCE = 2e-3  # of products in float16
CONFLICTS = []  # cycles that they took, of each execution
PROGRAMS = {}  # of Mosaic, by name and operands; and the code of their host


def executed(kernel, compiled):
    """The same kernel, for a GPU that is not there.

    `compiled(kernel, *shapes)` is its program, and the function of buffers that is its launch.
    """

    def call(*operands):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
        results = jax.eval_shape(kernel, *shapes)
        run = functools.partial(_run, *compiled(kernel, *shapes), results)
        return jax.pure_callback(run, results, *operands)

    return call


def by_mosaic(name: str, kernel, *shapes):
    dump.compile_kernel(TARGET, jax.jit(kernel), *shapes)
    key = name, *((a.shape, a.dtype) for a in shapes)
    if any(dump.FOLDER.glob("*.ptx")):  # A process compiles a kernel once.
        PROGRAMS[key] = parse(dump.text(".ptx")), dump.text(".ll")
    program, host_code = PROGRAMS[key]
    return program, functools.partial(host.launch, host_code, program)


def by_triton(name: str, kernel, *shapes):
    program, options = dump.triton_kernel(TARGET, name, kernel, *shapes)
    return program, functools.partial(started, options)


def started(options: dict, arrays: list[np.ndarray]) -> machine.Launch:
    """The launch of a kernel whose parameters are pointers, with the rest as `options`."""
    pointers = [a.ctypes.data.to_bytes(8, "little") for a in arrays]
    return machine.Launch(parameters=tuple(pointers), tensor_maps={}, **options)


def _run(program, launch, results, *operands) -> tuple[np.ndarray, ...]:
    inputs = [aligned(np.asarray(a)) for a in operands]
    before = [a.tobytes() for a in inputs]
    found = []
    for schedule in SCHEDULES:
        outputs = [aligned(np.full(a.shape, np.nan, a.dtype)) for a in results]
        arrays = inputs + outputs
        CONFLICTS.append(machine.run(program, launch(arrays), Global(arrays), schedule))
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


def kernel_of(case) -> str | None:
    """Which one serves the case on a GPU."""
    _, key, value, *_ = arguments(case, (1,), num_tiles=4)
    name = "triton" if isinstance(case, VectorCase) else "mosaic_gpu"
    return name if unsupported(name, key, value, case.group) is None else None


def runs(kernels: dict[str, str]):
    """Names, and functions that check, for the kernels of cases by name."""
    # With a window the kernel is the same as without: in another size it is compiled again.
    sizes = [(name, 4 if CASES[name].window is None else 5, LENGTHS) for name in kernels]
    for name in set(kernels) & {"cubic4", "uniform3-minmax", "plus2"}:
        sizes.append((name, 17, (0, 1, 1153, 17 * TOKENS)))  # several splits
    for name, *size in sizes:
        run = functools.partial(check, CASES[name], jnp.bfloat16, TOLERANCE, *size)
        run = functools.partial(run, implementation=kernels[name])
        if kernels[name] == "mosaic_gpu" and not (CASES[name].waves and CASES[name].group > 8):
            run = functools.partial(without_conflicts, run)
        yield f"{name} of {size[0]} tiles", run
    for name in (name for name in FOLLOWING if name in kernels):
        yield f"{name}, units in turn", functools.partial(units_in_turn, name)


def without_conflicts(run: Callable[[], None]) -> None:
    """Runs, and raises RuntimeError if threads of a warp waited for each other."""
    CONFLICTS.clear()
    run()
    if any(CONFLICTS):
        raise RuntimeError(f"expected no conflicts in shared memory; got {max(CONFLICTS)} cycles")


# Of each kind of what takes turns in shared memory; with room for one unit and for two.
FOLLOWING = (
    "cubic4", "plus2", "plus3", "kivi2", "kivi3", "cubic3", "cubic4-d256", "channels4-d256",
    "keys4-values2-minmax-parts",
)  # fmt: skip


def units_in_turn(name: str) -> None:
    """One split of 9 tiles: more units than have room, in the same memory; the last is moved."""
    case, num_tiles = CASES[name], 9
    _, key, value, *_ = arguments(case, (1,), num_tiles=num_tiles)
    plan = make_plan(case.group, key, value, case.soft_cap, None)
    if num_tiles <= plan.stages * plan.tiles:
        raise RuntimeError(f"expected more than {plan.stages} units of {plan.tiles} tiles")
    run = functools.partial(mosaic_gpu.decode_attention, splits=1)
    with mock.patch.object(mosaic_gpu, "decode_attention", run):
        check(
            case, jnp.bfloat16, TOLERANCE, num_tiles, (300, num_tiles * TOKENS),
            implementation="mosaic_gpu",
        )  # fmt: skip


def others():
    """Likewise, of the kernels that merge splits, and attend to sinks and residual."""
    for case in merge_splits_cases.CASES:
        yield f"merge_splits {case}", functools.partial(merge_splits_cases.check, *case)
    if MACHINE.capability >= (10, 0):
        return  # instructions of its tensor cores, which Triton takes, are not known to `ptx`
    for name, case in exact_attention_cases.CASES.items():
        yield f"exact_attention {name}", functools.partial(exact_attention_cases.check, case)


def chosen(known: Collection[str]) -> list[str]:
    """Cases, as the command line has them: all, if it names none."""
    names = NAMES or list(known)
    if unknown := set(names) - set(known):
        sys.exit(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return names


def finish(planned: Collection[tuple[str, Callable[[], None]]], how: str) -> NoReturn:
    """Runs what was planned, and exits; `how` is what those that raise nothing are."""
    failed = 0
    for name, run in tqdm(planned, unit="case", disable=None):
        try:
            run()
        except Exception as error:
            failed += 1
            tqdm.write(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(planned) - failed} of {len(planned)} {how}")
    sys.exit(failed > 0)


def main() -> None:
    kernels = {name: kernel for name, case in CASES.items() if (kernel := kernel_of(case))}
    names = chosen(kernels)
    mosaic_gpu_machine.H100 = MACHINE  # what is planned for without a GPU
    mosaic, triton = plgpu.kernel, pl.pallas_call
    plgpu.kernel = lambda *args, **options: executed(
        mosaic(*args, **options), functools.partial(by_mosaic, options["kernel_name"])
    )
    pl.pallas_call = lambda *args, **options: executed(
        triton(*args, **options), functools.partial(by_triton, options["name"])
    )
    planned = [*runs({name: kernels[name] for name in names}), *others()]
    finish(planned, "as the oracle has them")


if __name__ == "__main__":
    main()
