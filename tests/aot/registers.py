"""What the GPU's assembler makes of decode attention.

    python tests/aot/registers.py [GPU] [CASE ...]
    for gpu in h100 b200 a100 l4; do python tests/aot/registers.py $gpu; done > registers.jsonl

The second is what is recorded beside this file. Of one of `targets.GPUS` (h100), and of all cases,
if none is named. Registers and spilled bytes per thread; programs that these and shared memory let
run on a multiprocessor at a time; instructions per element of the cache: those of the loop over it,
times 128 threads, by the elements of keys and values that it reads. And, by a model of a
multiprocessor (`sass`), which part of the memory's bandwidth that is, and how much faster than a
bfloat16 cache that is given all of it; but not of a B200, whose rate of `mma.sync` is not known.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dump  # first: see there
import jax
import jax.numpy as jnp
import nvidia
import sass
import targets
from decode_attention_cases import CASES, arguments

from nqkv_jax.pallas_kernels.decode_attention import (
    decode_attention,
    mosaic_gpu_machine,
    unsupported,
)
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import THREADS, make_plan
from nqkv_jax.tiles import TOKENS

KERNEL = "decode_attention"
TARGET, NAMES = targets.of_command_line()
MACHINE = targets.GPUS[TARGET].machine
MODELS = {"h100": sass.H100, "a100": sass.A100, "l4": sass.L4}


def tool(name: str) -> str:
    """Of the CUDA compiler that is installed as Python packages."""
    for folder in nvidia.__path__:
        for path in pathlib.Path(folder).rglob(name):
            if path.parent.name == "bin":
                return str(path)
    raise RuntimeError(f"expected {name} in the packages nvidia-cuda-nvcc and -nvdisasm")


def listing() -> str:
    """Of the kernel that was compiled, by the assembler that made it."""
    (ptx,), cubin = dump.FOLDER.glob(f"{KERNEL}*.ptx"), dump.FOLDER / "kernel.cubin"
    (target,) = re.findall(r"\.target (\w+)", ptx.read_text())
    subprocess.run([tool("ptxas"), f"-arch={target}", str(ptx), "-o", str(cubin)], check=True)
    command = [tool("nvdisasm"), "-c", "-hex", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def programs(registers: int) -> int:
    """Of 128 threads, whose registers, in eights, are in the 65,536 of a multiprocessor."""
    return 65536 // (128 * -(-registers // 8) * 8)


def measure(case) -> dict:
    *arrays, first = arguments(case, (1, 1), num_tiles=32, dtype=jnp.bfloat16)
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation="mosaic_gpu")
    dump.compile_kernel(TARGET, jax.jit(lambda *a: run(*a[:4], first=a[4])), *arrays, first)
    text = dump.text(".ptxas", KERNEL)
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    plan = make_plan(case.group, *arrays[1:3], case.soft_cap, None)
    layouts = dump.text(".after_layout_inference.txt", KERNEL)
    shared = int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", layouts)[1])
    if shared != plan.shared_bytes:
        raise RuntimeError(f"{case}: the plan has {plan.shared_bytes} bytes, the program {shared}")
    if plan.slots > plan.machine.multiprocessors * programs(registers):
        raise RuntimeError(f"{case}: the plan has {plan.slots} slots; got {registers} registers")
    count = min(plan.programs, programs(registers))
    unit, unit_bytes = sass.unit(listing(), plan.parts), sum(plan.arriving)
    elements = 2 * plan.tiles * TOKENS * plan.head_dim
    found = dict(
        gpu=TARGET,
        case=case.name,
        registers=registers,
        spilled_bytes=max(map(int, spilled)),
        programs=count,
        instructions_per_element=round(len(unit) * THREADS / elements, 2),
    )
    if TARGET in MODELS:
        gpu = MODELS[TARGET]
        # Of a multiprocessor, for a unit of each program, and of those with other query heads.
        cycles = plan.chunks * sass.cycles(unit, count, unit_bytes, plan.stages, gpu)
        memory = lambda size: count * gpu.memory_cycles(size)
        found |= dict(
            of_bandwidth=round(min(1, memory(unit_bytes) / cycles), 2),
            over_bfloat16=round(min(memory(2 * elements) / cycles, 2 * elements / unit_bytes), 1),
        )
    return found


def main() -> None:
    mosaic_gpu_machine.H100 = MACHINE  # what is planned for without a GPU
    for case in CASES.values():
        if case.window is not None or (NAMES and case.name not in NAMES):
            continue  # with a window it is the same kernel, and not compiled again
        _, key, value, *_ = arguments(case, (1,), num_tiles=4)
        if unsupported("mosaic_gpu", key, value, case.group) is None:
            print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
