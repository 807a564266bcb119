"""Lengths of the schedules that the TPU compiler makes of decode attention, in bundles (cycles).

    python tests/aot/bundles.py v5e v6e > tests/aot/bundles.jsonl

Of each case: `head`, the body of the loop over heads for one grid step of 1,024 tokens, and `step`,
what comes once per grid step beside it. A count is static: loads and products that take longer than
scheduled are not in it.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

DUMP = pathlib.Path(tempfile.mkdtemp())
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# libtpu reads it when it is loaded.
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

import functools

import jax
import jax.numpy as jnp
from decode_attention_cases import TPU_CASES, arguments
from targets import compile_for

from nqkv_jax.pallas_kernels.decode_attention import decode_attention


def measure(target: str, case) -> dict:
    for file in DUMP.iterdir():
        file.unlink()
    *arrays, first = arguments(case, (1, 1), num_tiles=32, dtype=jnp.bfloat16)
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation="mosaic_tpu")
    compiled = compile_for(target, jax.jit(lambda *a: run(*a[:4], first=a[4])), *arrays, first)
    schedules = [f for f in DUMP.glob("*decode_attention*-final_bundles.txt")]
    schedules = [f for f in schedules if "schedule-analysis" not in f.name]
    if len(schedules) != 1:
        raise RuntimeError(f"expected one schedule of the kernel; got {schedules}")
    # "0x1e9   : >> { ...": an address, and how deep in loops.
    depths = re.findall(r"^\s*0x[0-9a-f]+\s*:\s*(>*)", schedules[0].read_text(), re.MULTILINE)
    memory = compiled.memory_analysis()
    return dict(
        target=target,
        case=case.name,
        head=sum(len(d) == 2 for d in depths),
        step=sum(len(d) == 1 for d in depths),
        temporary_bytes=memory.temp_size_in_bytes,
    )


def main() -> None:
    for target in sys.argv[1:]:
        for case in TPU_CASES.values():
            print(json.dumps(measure(target, case)), flush=True)


if __name__ == "__main__":
    main()
