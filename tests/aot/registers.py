"""What the GPU's assembler makes of decode attention.

    python tests/aot/registers.py > tests/aot/registers.jsonl

Registers and spilled bytes per thread; programs that these and shared memory let run on a
multiprocessor at a time; and instructions per element of the cache: those of the loop over it,
times 128 threads, by the elements of keys and values that it reads. A count is static: what
instructions wait for is not in it.
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
from decode_attention_cases import CASES, arguments

from nqkv_jax.pallas_kernels.decode_attention import decode_attention, unsupported
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import (
    MULTIPROCESSORS,
    Plan,
    make_plan,
)
from nqkv_jax.tiles import TOKENS

KERNEL = "decode_attention"


def tool(name: str) -> str:
    """Of the CUDA compiler that is installed as Python packages."""
    for folder in nvidia.__path__:
        for path in pathlib.Path(folder).rglob(name):
            if path.parent.name == "bin":
                return str(path)
    raise RuntimeError(f"expected {name} in the packages nvidia-cuda-nvcc and -nvdisasm")


def loops(sass: str) -> list[int]:
    """Instructions of the innermost loop that has a product on the tensor core, and of those around
    it."""
    labels, products, count, found = {}, [], 0, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            products += [count] * ("HMMA" in line)
            target = re.search(r"BRA.*`\((\.L\w+)\)", line)
            begin = labels.get(target[1]) if target else None  # known if it jumps back
            if begin is not None and any(begin <= p <= count for p in products):
                found.append((count - begin + 1, begin, count))
            count += 1
    _, first, last = min(found)
    return sorted(length for length, begin, end in found if begin <= first and last <= end)


def instructions_per_element(plan: Plan) -> float:
    (ptx,), cubin = dump.FOLDER.glob(f"{KERNEL}*.ptx"), dump.FOLDER / "kernel.cubin"
    subprocess.run([tool("ptxas"), "-arch=sm_90a", str(ptx), "-o", str(cubin)], check=True)
    command = [tool("nvdisasm"), "-c", str(cubin)]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    part, *around = loops(sass)
    # Where a unit is one part, its loop is gone.
    unit = around[0] + (plan.parts - 1) * part if plan.parts > 1 else part
    elements = 2 * plan.tiles * TOKENS * plan.head_dim
    return 128 * unit / elements


def programs(registers: int) -> int:
    """Of 128 threads, whose registers, in eights, are in the 65,536 of a multiprocessor."""
    return 65536 // (128 * -(-registers // 8) * 8)


def measure(case) -> dict:
    *arrays, first = arguments(case, (1, 1), num_tiles=32, dtype=jnp.bfloat16)
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation="mosaic_gpu")
    dump.compile_for_h100(jax.jit(lambda *a: run(*a[:4], first=a[4])), *arrays, first)
    text = dump.text(".ptxas", KERNEL)
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    plan = make_plan(case.group, *arrays[1:3], case.soft_cap, None)
    layouts = dump.text(".after_layout_inference.txt", KERNEL)
    shared = int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", layouts)[1])
    if shared != plan.shared_bytes:
        raise RuntimeError(f"{case}: the plan has {plan.shared_bytes} bytes, the program {shared}")
    if plan.slots > MULTIPROCESSORS * programs(registers):
        raise RuntimeError(f"{case}: the plan has {plan.slots} slots; got {registers} registers")
    return dict(
        case=case.name,
        registers=registers,
        spilled_bytes=max(map(int, spilled)),
        programs=min(plan.programs, programs(registers)),
        instructions_per_element=round(instructions_per_element(plan), 2),
    )


def main() -> None:
    for case in CASES.values():
        if case.window is not None:
            continue  # the same kernel as without, and not compiled again
        _, key, value, *_ = arguments(case, (1,), num_tiles=4)
        if unsupported("mosaic_gpu", key, value, case.group) is None:
            print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
