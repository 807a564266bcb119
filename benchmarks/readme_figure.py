"""The picture on the README's first screen, from the table of all schemes in RESULTS.md.

    python benchmarks/readme_figure.py        # writes docs/quality.png

Effective bits against perplexity. Schemes above `HIGHEST` would flatten all others; they are in the
table. `nqkv-plus` without kernels is hollow, and has no label.
"""

import json
import pathlib
import re
import sys

from nqkv_jax.analysis import plots

ROOT = pathlib.Path(__file__).parents[1]
HIGHEST = 37.0
UNFUSED = "fused=False"
_ROW = re.compile(r"\| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
# Where a label would meet another one: offset in points, and which end of it is at the dot.
PLACES = {
    "kvquant:bits=3": ((0, 7), "center"),
    "kvquant:bits=4": ((-6, -3), "right"),
    "int8": ((4, -11), "left"),
    "nsnquant": ((-6, -3), "right"),
    "int4": ((6, -2), "left"),
    "kvq": ((-6, -4), "right"),
    "quarot": ((6, -3), "left"),
    "squat": ((-6, -3), "right"),
    "nqkv-plus:bits=3": ((-7, 1), "right"),
    "nqkv-plus:bits=2": ((-6, -3), "right"),
    "nqkv-plus": ((0, -13), "center"),
    "kivi:bits=3": ((0, 7), "center"),
    "quanto": ((0, 7), "center"),
    "hqq": ((7, -1), "left"),
    "kivi:bits=4": ((4, -12), "left"),
}


def rows(results: str) -> list[tuple[str, float, float]]:
    """(scheme, effective bits, perplexity) of every row of the table."""
    return [(name, float(bits), float(found)) for name, _, bits, found in _ROW.findall(results)]


def label(name: str) -> str:
    """The scheme and its width; a calibration's path says nothing here."""
    return re.sub(r",?calibration=\.\.\.", "", name)


def draw(found: list[tuple[str, float, float]]):
    figure = plots.new_figure(7.6, 4.2)
    axes = figure.subplots()
    full = next(value for name, _, value in found if name == "none")
    kinds = {"nqkv": (plots.VERMILION, "s"), "nqkv-plus": (plots.BLUE, "o")}
    for name, bits, value in found:
        if value > HIGHEST or "outliers" in name or "allocation" in name:
            continue
        family = name.partition(":")[0]
        color, marker = kinds.get(family, ("0.45", "^"))
        if name.endswith(UNFUSED):
            axes.plot(bits, value, marker, color=color, markersize=6, zorder=3, fillstyle="none")
            continue
        axes.plot(bits, value, marker, color=color, markersize=6, zorder=3)
        place, end = PLACES.get(label(name), ((5, 3), "left"))
        weight = "bold" if family in kinds else "normal"
        axes.annotate(
            label(name), (bits, value), xytext=place, textcoords="offset points", ha=end,
            fontsize=8, color=color if family in kinds else "0.25", weight=weight,
        )  # fmt: skip
    axes.axhline(full, color=plots.BLACK, linewidth=0.8, linestyle=":")
    axes.annotate("full precision", (2.15, full), xytext=(0, -10), textcoords="offset points",
                  fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="bits per number, all that is stored counted (at 1,024 tokens)")
    axes.set_ylabel("perplexity on WikiText-2")
    axes.set_xlim(2.1, 20)
    axes.set_ylim(full - 0.7, HIGHEST)
    axes.set_xticks([3, 4, 5, 6, 8, 12, 16], ["3", "4", "5", "6", "8", "12", "16"])
    axes.minorticks_off()
    plots.tidy(axes)
    figure.suptitle("SmolLM2-135M-Instruct: lower and further left is better", fontsize=11)
    return figure


if __name__ == "__main__":
    found = rows((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "quality.png"
    # What it shows goes into the file, so that a test can tell when the table has moved on.
    draw(found).savefig(path, dpi=110, metadata=dict(Description=json.dumps(found)))
    print(f"{len(found)} schemes read, drawn into {path}")
