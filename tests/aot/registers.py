"""What the GPU's assembler makes of decode attention: registers and spilled bytes per thread.

python tests/aot/registers.py > tests/aot/registers.jsonl
"""

import json
import os
import pathlib
import re
import sys
import tempfile

DUMP = pathlib.Path(tempfile.mkdtemp())
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Read when a kernel is compiled.
os.environ.update(MOSAIC_GPU_DUMP_TO=str(DUMP), MOSAIC_GPU_DUMP_PTXAS="1")

import functools

import jax
import jax.numpy as jnp
from decode_attention_cases import CASES, arguments
from targets import compile_for

from nqkv_jax.pallas_kernels.decode_attention import decode_attention, unsupported


def measure(case) -> dict:
    for file in DUMP.iterdir():
        file.unlink()
    *arrays, first = arguments(case, (1, 1), num_tiles=32, dtype=jnp.bfloat16)
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation="mosaic_gpu")
    compile_for("h100", jax.jit(lambda *a: run(*a[:4], first=a[4])), *arrays, first)
    (report,) = DUMP.glob("decode_attention*.ptxas")
    text = report.read_text()
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    return dict(
        case=case.name,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spilled_bytes=max(map(int, spilled)),
    )


def main() -> None:
    for case in CASES.values():
        if case.window is not None:
            continue  # the same kernel as without, and not compiled again
        _, key, value, *_ = arguments(case, (1,), num_tiles=4)
        if unsupported("mosaic_gpu", key, value) is None:
            print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
