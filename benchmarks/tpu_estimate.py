"""A static estimate of decode attention on TPUs, from the schedules that the compiler makes.

    python tests/aot/bundles.py v5e v6e > tests/aot/bundles.jsonl   # environment of test-aot
    python benchmarks/tpu_estimate.py

No TPU is involved, and nothing is measured: a bundle is taken as a cycle, memory as fast as its
data sheet says, and the two as perfectly overlapped. A bfloat16 cache is given the memory's
bandwidth, so that no kernel for it could be faster.
"""

import argparse
import json
import pathlib

TOKENS, HEADS = 1024, 8  # of a grid step
# Bytes per second, and cycles per second (v6e's is assumed).
CHIPS = {"v5e": (819e9, 1.5e9), "v6e": (1640e9, 1.75e9)}
# Case, and bits per element of codes and of all that is read beside them, at head_dim 128. With
# vectors that is float32: a scale per token; of keys a number per query and token; of values a
# weight per token, and the means.
CASES = {
    "integer4": (4, 16 / 128),
    "uniform4-minmax": (4, 32 / 128),
    "stepped4": (4, 16 / 128),
    "cubic4": (4, 16 / 128),
    "cubic4-signed": (4, 16 / 128),
    "plus4": (4, 16 / 128),
    "nf4-across-heads": (4, 16 / 256),
    "cubic3": (3, 16 / 128),
    "uniform3-minmax": (3, 32 / 128),
    "lloyd2": (2, 16 / 128),
    "nf2": (2, 16 / 128),
    "channels2-minmax": (2, 32 / 128),
    "plus2": (2, 16 / 128),
    "kivi4": (4, 32 / 32),
    "kivi2": (2, 32 / 32),
    "vector2": (2, (32 * 2 + 32 * 2 + 32 * 2) / 128 / 2),
    "vector1": (1, (32 * 4 + 32 * 2 + 32 * 2) / 128 / 2),
    "vector1-decoded": (1, (32 * 9 + 32 * 2 + 32) / 128 / 2),
    "integer8": (8, 16 / 128),
    "float8": (8, 16 / 128),
}


def estimate(row: dict) -> dict:
    """Cycles per 1,024 elements: of the schedule, and of memory for the codes and for bfloat16."""
    bandwidth, clock = CHIPS[row["target"]]
    codes, scales = CASES[row["case"]]
    units = 2 * TOKENS * 128 / 1024  # of one head in one step
    schedule = (row["head"] + row["step"] / HEADS) / units
    memory, bfloat16 = (1024 * bits / 8 / bandwidth * clock for bits in (codes + scales, 16))
    return dict(
        schedule=schedule,
        memory=memory,
        speedup=bfloat16 / max(schedule, memory),
        most=bfloat16 / memory,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: python benchmarks/tpu_estimate.py"
    )
    here = pathlib.Path(__file__).resolve().parents[1]
    parser.add_argument("--bundles", default=here / "tests/aot/bundles.jsonl", type=pathlib.Path)
    rows = map(json.loads, parser.parse_args().bundles.read_text().splitlines())
    rows = {(row["target"], row["case"]): row for row in rows}
    print("Estimates, head_dim 128, steps of 1,024 tokens and 8 heads; cycles per 1,024 elements\n")
    print("| | case | schedule | over int4 | memory | over a bfloat16 cache | at most |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for target in CHIPS:
        base = estimate(rows[target, "integer4"])["schedule"]
        for case in CASES:
            e = estimate(rows[target, case])
            print(
                f"| {target} | {case} | {e['schedule']:.2f} | {e['schedule'] / base:.2f}x "
                f"| {e['memory']:.2f} | {e['speedup']:.1f}x | {e['most']:.1f}x |"
            )


if __name__ == "__main__":
    main()
