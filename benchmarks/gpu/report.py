"""Tables and the roofline of a run's records."""

import functools
import json
import math
import pathlib
from collections.abc import Iterable

from gpu.append import BY_KERNEL
from gpu.check import KERNEL
from gpu.sweep import BFLOAT16
from nqkv_jax.analysis import plots
from nqkv_jax.plan import format_size

# bfloat16 operations per second, dense, by what names of devices have; NVIDIA's data sheets.
FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L4": 121e12}


def write(folder: pathlib.Path, machine: dict, records: list[dict], left: dict[str, int]) -> None:
    """gpu_decode.json, .md and, if shapes were timed, .png.

    Args: left: units of each part that were not reached.
    """
    out = dict(machine=machine, not_reached=left, records=[machine | r for r in records])
    (folder / "gpu_decode.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    text = markdown(machine, records, left)
    (folder / "gpu_decode.md").write_text(text, encoding="utf-8")
    print(text)
    if not any(r["part"] == "sweep" and r["median_us"] for r in records):
        return
    try:
        figure = roofline(machine, records)
    except ImportError as error:
        print(f"no figure: {error}")
        return
    figure.savefig(folder / "gpu_decode.png", dpi=110)


def markdown(machine: dict, records: list[dict], left: dict[str, int]) -> str:
    of = lambda part: [r for r in records if r["part"] == part]
    lines = [f"{machine['device']}, jax {machine['jax']}, {machine['date']}", ""]
    missing = [f"{count} of {part}" for part, count in left.items() if count]
    if missing:
        lines += [f"Not reached in the time that was given: {', '.join(missing)}.", ""]
    sections = {
        "check": _check, "bandwidth": _bandwidth,
        "append": functools.partial(_append, whole=of("end-to-end")),
        "sweep": _sweep, "end-to-end": _end_to_end, "splits": _splits,
    }  # fmt: skip
    for part, section in sections.items():
        if of(part):
            lines += [*section(of(part)), ""]
    return "\n".join(lines)


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _check(records: list[dict]) -> list[str]:
    rows = []
    for r in records:
        verdict = {True: "yes", False: "**NO**", None: "not run"}[r["passed"]]
        error = f"{r['error']:.1e}" if "error" in r else ""
        if "wrong_bytes" in r:
            error = f"{r['wrong_bytes']} bytes"
        log_sum = f"{r['log_sum_error']:.1e}" if "error" in r else ""
        why = r.get("failure") or r.get("skipped") or ""
        rows.append([r["spec"], r["implementation"], verdict, error, log_sum, why])
    header = ["case", "implementation", "within tolerance", "largest error", "of log-sums", ""]
    return [
        "### Against the float64 oracle; what is appended against XLA",
        "",
        *_table(header, rows),
    ]


def _bandwidth(records: list[dict]) -> list[str]:
    rows = [
        [r["implementation"], "", "", r["failure"]]
        if "failure" in r
        else [r["implementation"], f"{r['bytes_per_s'] / 1e12:.3f} TB/s", f"{r['spread']:.1%}", ""]
        for r in records
    ]
    header = ["a pass over a large array", "bytes per second", "spread", ""]
    return ["### Bandwidth", "", *_table(header, rows)]


def _append(records: list[dict], whole: list[dict]) -> list[str]:
    """`whole`: records of decoders, of whose steps this is a part."""
    steps = {
        (r["spec"], r["implementation"], r["codebook"]): r["median_us"]
        for r in whole if r["median_us"] and r["spec"].endswith("/equal batch")
    }  # fmt: skip
    batches = {r["spec"]: r["batch"] for r in whole}
    rows = []
    for r in records:
        fixed = [r["spec"], r["implementation"], r["codebook"]]
        if r["median_us"] is None:
            rows.append([*fixed, "", "", r.get("failure") or r.get("skipped")])
            continue
        spec = f"{r['spec'].split('/')[0]}/equal batch"
        # Decoders are named by how they attend: those with the kernel for it append by one, too.
        by = KERNEL if r["implementation"] == BY_KERNEL else r["implementation"]
        step = steps.get((spec, by, r["codebook"])) if batches.get(spec) == r["batch"] else None
        own = "" if r["own_us"] is None else f"{r['own_us']:.2f}"
        share = f"{r['own_us'] * r['num_layers'] / step:.1%} of a step" if step and own else ""
        rows.append([*fixed, f"{r['median_us']:.2f}", own, share])
    header = ["layer of", "implementation", "cache", "microseconds", "above nothing", ""]
    return [
        "### Appending one token to the keys and values of a layer", "",
        "In all layers, as a part of the step of a decoder that appends so, in the same batch.", "",
        *_table(header, rows),
    ]  # fmt: skip


def _sweep(records: list[dict]) -> list[str]:
    """A row per shape: the best bfloat16, and each implementation's speed-up over it."""
    columns = list(dict.fromkeys(
        (r["implementation"], r["codebook"]) for r in records if r["implementation"] not in BFLOAT16
    ))  # fmt: skip
    rows = []
    for spec in dict.fromkeys(r["spec"] for r in records):
        here = [r for r in records if r["spec"] == spec]
        timed = [r for r in here if r["implementation"] in BFLOAT16 and r["median_us"]]
        best = min(timed, key=lambda r: r["median_us"], default=None)
        row = [spec, _cell(best) + f" {best['implementation']}" if best else ""]
        for column in columns:
            found = [r for r in here if (r["implementation"], r["codebook"]) == column]
            row.append(_cell(found[0]) if found else "")
        rows.append(row)
    header = ["shape", "best bfloat16", *(f"{name} {codebook}" for name, codebook in columns)]
    skipped = dict.fromkeys(
        f"{r['implementation']} {r['codebook']}: {r.get('failure') or r.get('skipped')}"
        for r in records if not r["median_us"]
    )  # fmt: skip
    notes = ["", "Not timed:", "", *(f"- {line}" for line in skipped)] if skipped else []
    return [
        "### One token's attention",
        "",
        "Microseconds; the speed-up over the best bfloat16 of the same run; the bytes that must be "
        "read per second, as a part of what a copy moves. Losses are below 1x.",
        "",
        *_table(header, rows),
        *notes,
    ]


def _cell(record: dict) -> str:
    if not record["median_us"]:
        return ""
    ratio = record["ratio_to_best_bf16"]
    parts = [f"{record['median_us']:.1f} us"]
    if record["copy_fraction"] is not None:
        parts.append(f"{record['copy_fraction']:.0%}")
    if ratio is not None and record["implementation"] not in BFLOAT16:
        parts.insert(1, f"**{ratio:.2f}x**")
    return ", ".join(parts)


def _end_to_end(records: list[dict]) -> list[str]:
    rows = []
    for r in records:
        fixed = [r["spec"], f"{r['implementation']} {r['codebook']}", str(r["batch"]),
                 f"{r['context']:,}"]  # fmt: skip
        if not r["median_us"]:
            rows.append([*fixed, "", "", "", r.get("failure") or r.get("skipped")])
            continue
        peak = r.get("peak_bytes")
        speedup = r.get("speedup_over_no_cache")
        rows.append([
            *fixed, f"{r['tokens_per_second']:,.0f}", format_size(r["cache_bytes"]),
            format_size(peak) if peak else "",
            f"{speedup:.1f}x no cache" if speedup else f"spread {r['spread']:.1%}",
        ])  # fmt: skip
    header = ["model", "cache", "batch", "context", "tokens/s", "cache bytes",
              "peak memory", ""]  # fmt: skip
    return ["### Whole decoders, random weights in bfloat16", "", *_table(header, rows)]


def _splits(records: list[dict]) -> list[str]:
    """A row for each cache: the number that is taken, and each one's time."""
    rows = {}
    for r in records:
        row = rows.setdefault((r["spec"], r["codebook"]), [r["spec"], r["codebook"], "", []])
        if "splits" in r:
            row[2] = str(r["splits"]) if r["taken"] else row[2]
            why = r.get("failure") or r.get("skipped")
            found = f"{r['median_us']:.1f} us" if r["median_us"] else why
            row[3].append((r["splits"], f"{r['splits']}: {found}"))
        else:
            row[3].append((0, r["failure"]))
    texts = [
        [*fixed, ", ".join(text for _, text in sorted(each))] for *fixed, each in rows.values()
    ]
    header = ["shape", "codes", "splits", "microseconds by splits"]
    return ["### Splits of the tokens", "", *_table(header, texts)]


def roofline(machine: dict, records: list[dict]):
    """Operations per second over operations per byte read, of every timed row of the sweep."""
    figure = plots.new_figure(7.6, 4.6)
    axes = figure.subplots()
    kinds = {
        "bfloat16": ([r for r in records if r["implementation"] in BFLOAT16], plots.BLUE, "o"),
        "codes, plain XLA": ([r for r in records if r["implementation"] == "xla"], "0.6", "v"),
        f"codes, {KERNEL}": (
            [r for r in records if r["implementation"] == KERNEL], plots.VERMILION, "s"
        ),
    }  # fmt: skip
    intensities = [1.0]
    for label, (rows, color, marker) in kinds.items():
        rows = [r for r in rows if r["part"] == "sweep" and r["median_us"]]
        x = [r["flops"] / r["bytes_read"] for r in rows]
        y = [r["flops"] / r["median_us"] * 1e6 for r in rows]
        intensities += x
        axes.plot(x, y, marker, color=color, label=f"{label} ({len(rows)})", markersize=5)
    ends = [min(intensities) / 2, max(intensities) * 2]
    most = next((n for name, n in FLOPS.items() if name in machine["device"]), math.inf)
    for r in records:
        if r["part"] == "bandwidth" and "failure" not in r:
            roof = [min(end * r["bytes_per_s"], most) for end in ends]
            style = "-" if r["implementation"] == "copy" else ":"
            axes.plot(ends, roof, style, color=plots.BLACK, label=f"memory, {r['implementation']}")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of the cache",
             ylabel="operations per second")  # fmt: skip
    axes.legend(fontsize=8)
    plots.tidy(axes)
    figure.suptitle(f"One token's attention on {machine['device']}", fontsize=11)
    return figure
