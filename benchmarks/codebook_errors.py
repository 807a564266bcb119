"""The error of every codebook of `nqkv` on normal numbers: the table in docs/kernels.md.

python benchmarks/codebook_errors.py
"""

import numpy as np

from nqkv_jax.schemes.nqkv import CODEBOOKS

SIZES = (32, 64, 128, 256)  # of blocks
SAMPLES = 2**22  # with which errors are known to about 0.1 %


def nmse(name: str, bits: int, size: int, samples: int = SAMPLES) -> float:
    """Mean squared error over mean square of N(0, 1), with scales that are not rounded."""
    make, scale = CODEBOOKS[name]
    levels = np.sort(np.asarray(make(bits, size).levels, np.float64))
    x = np.random.default_rng(0).normal(size=(samples // size, size))
    if scale == "rms":
        by = np.sqrt(np.mean(x * x, axis=1, keepdims=True))
    else:
        at = np.argmax(np.abs(x), axis=1)[:, None]
        by = np.take_along_axis(x, at, axis=1)
        by = by if scale == "signed_absmax" else np.abs(by)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / by)
    return float(np.mean((levels[nearest] * by - x) ** 2) / np.mean(x * x))


def table() -> list[str]:
    """Lines of markdown."""
    heads = "".join(f" {size} |" for size in SIZES)
    lines = [f"| bits | `codebook=` |{heads}", f"| --- | --- |{' --- |' * len(SIZES)}"]
    for bits in (4, 3, 2):
        for name in CODEBOOKS:
            try:
                errors = [nmse(name, bits, size) for size in SIZES]
            except ValueError:  # there is none of these bits
                continue
            cells = "".join(f" {100 * error:.2f} |" for error in errors)
            lines.append(f"| {bits} | `{name}` |{cells}")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
