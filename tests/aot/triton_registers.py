"""What the GPU's assembler makes of the kernels by Triton: registers, and bytes that it spills.

    python tests/aot/triton_registers.py [GPU] [CASE ...]

Of one of `targets.GPUS` (h100), and of all cases, if none is named.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dump  # first: see there
import exact_attention_cases
import jax
import jax.numpy as jnp
import targets
from append_token_cases import CASES, KEEP, TOKEN, body, tokens
from decode_attention_cases import arguments
from registers import tool
from vector_attention_cases import VECTOR_CASES

from nqkv_jax.pallas_kernels.append_token import append_token
from nqkv_jax.pallas_kernels.decode_attention import decode_attention
from nqkv_jax.pallas_kernels.exact_attention import exact_attention

TARGET, NAMES = targets.of_command_line()


def of_exact_attention(case):
    run = functools.partial(exact_attention, slots=case.slots, soft_cap=case.soft_cap)
    return run, exact_attention_cases.arguments(case)


def of_vectors(case):
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, implementation="triton")
    *arrays, first = arguments(case, (1, 1), num_tiles=9, dtype=jnp.bfloat16)
    return lambda *a: run(*a[:4], first=a[4]), (*arrays, first)


def of_append_token(case):
    one = lambda *a: append_token(*a, **case.options)
    before, place = body(case), jnp.asarray(TOKEN, jnp.int32)
    stored = before.words, before.scale, before.zero
    return jax.vmap(one), (*stored, tokens(case), place, jnp.asarray(KEEP))


KERNELS = {
    "exact_attention": (of_exact_attention, exact_attention_cases.CASES.values()),
    "decode_attention_vectors": (of_vectors, VECTOR_CASES),
    "append_token": (of_append_token, CASES.values()),
}


def measure(kernel: str, run, args) -> dict:
    def dumped(*args):
        return run(*args)

    dump.compile_kernel(TARGET, jax.jit(dumped), *args)
    (file,) = (f for f in dump.FOLDER.glob("*.ptx") if f".entry {kernel}" in f.read_text())
    (gpu,) = re.findall(r"\.target (\w+)", file.read_text())
    command = [tool("ptxas"), "-v", f"-arch={gpu}", str(file), "-o", str(dump.FOLDER / "x.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    of = lambda what: max(map(int, re.findall(rf"(\d+) {what}", text)))
    return dict(registers=of("registers"), spilled_bytes=of("bytes spill stores"))


def main() -> None:
    for kernel, (make, cases) in KERNELS.items():
        for case in cases:
            if NAMES and str(case) not in NAMES:
                continue
            found = measure(kernel, *make(case))
            print(json.dumps(dict(gpu=TARGET, kernel=kernel, case=case.name) | found), flush=True)


if __name__ == "__main__":
    main()
