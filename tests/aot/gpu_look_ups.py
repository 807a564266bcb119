"""What levels cost in the GPU kernel: in tables of bytes, and the same levels by polynomials.

    python tests/aot/gpu_look_ups.py [GPU]

Rows are those of `registers.py`.
"""

import json

import jax
import registers
from decode_attention_cases import CASES

from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_levels, mosaic_gpu_machine


def main() -> None:
    mosaic_gpu_machine.H100 = registers.MACHINE
    ways = {"polynomial": mosaic_gpu_levels.approximation, "table": lambda codebook: None}
    for name in ("nf4-across-heads", "lloyd4", "nf4-d64"):
        for way, approximation in ways.items():
            mosaic_gpu_levels.approximation = approximation
            jax.clear_caches()
            print(json.dumps(registers.measure(CASES[name]) | dict(levels=way)), flush=True)


if __name__ == "__main__":
    main()
