"""Every scheme on one model, through the real cache: stored bits, perplexity, decode tokens/s.

    python benchmarks/scheme_table.py --text wiki.test.nonblank.txt --calibration-text moby_dick.txt

Calibrations (KVQuant's ranges and codebooks, KVQ's bits per layer) are made from the calibration
text first and kept in --folder, with a line of JSON for every perplexity that is done: after an
interruption the same command goes on from there. Times are taken at the end, of the first listed
variant of every scheme, in turn. Prints the table in Markdown.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics

import jax
import jax.numpy as jnp

from nqkv_jax import schemes
from nqkv_jax.calibration import kvq, kvquant
from nqkv_jax.evaluation import cache_timings, perplexity
from nqkv_jax.models import from_pretrained
from nqkv_jax.plan import AbstractCaches

# By nominal width. {kvquant} and {kvq3} are calibration files.
SCHEMES = (
    "none",
    "int8",
    "fp8",
    "nqkv-plus",
    "nqkv",
    "nqkv:block_size=64",
    "int4",
    "kivi:bits=4",
    "quanto",
    "hqq",
    "quarot",
    "turboquant",
    "kvquant:bits=4,calibration={kvquant}",
    "nqkv-plus:bits=3",
    "nqkv:bits=3,block_size=64",
    "kivi:bits=3",
    "quanto:bits=3",
    "hqq:bits=3",
    "turboquant:bits=3",
    "kvquant:bits=3,calibration={kvquant}",
    "kvquant:bits=3,outliers=0.0,calibration={kvquant}",
    "kvquant:bits=3,outliers=0.0,datatype=uniform,calibration={kvquant}",
    "kvq",
    "kvq:k_bits=2,v_bits=4",
    "kvq:allocation={kvq3}",
    "nqkv-plus:bits=2",
    "int2",
    "kivi",
    "squat",
    "ott",
    "quanto:bits=2",
    "hqq:bits=2",
    "turboquant:bits=2",
    "kvquant:bits=2,calibration={kvquant}",
)


class Records:
    """What is done, as JSON lines."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {row["scheme"]: row for row in map(json.loads, lines)}

    def add(self, row: dict) -> None:
        self.rows[row["scheme"]] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def calibrations(lm, text: str, folder: pathlib.Path, samples: int, seqlen: int) -> dict[str, str]:
    """Makes the files that are not there yet."""
    files = dict(kvquant=folder / "kvquant.safetensors", kvq3=folder / "kvq3.json")
    if not files["kvquant"].exists():
        kvquant.calibrate(lm, text, out=files["kvquant"], samples=samples, seqlen=seqlen)
    if not files["kvq3"].exists():
        tokens = lm.tokenizer.encode(text, add_special_tokens=False)[: 2 * seqlen]
        kvq.calibrate(lm, tokens, budget=3, score="activation").save(files["kvq3"])
    return {name: str(path) for name, path in files.items()}


def quality(lm, spec: str, text: str, args) -> dict:
    """Perplexity over windows, and what a cache for a window takes with bfloat16 beside codes."""
    result = perplexity(lm, text, scheme=spec, window=args.window, max_tokens=args.max_tokens)
    caches = AbstractCaches(lm.config, schemes.get(spec), jnp.bfloat16)
    return dict(
        stored_bits=caches.stored_bits,
        effective_bits=caches(batch=1, max_len=args.window).effective_bits,
        perplexity=result.perplexity,
        tokens=result.tokens,
    )


def seconds(lm, specs: list[str], args) -> list[float]:
    """Of one token after a window less the timed tokens: medians."""
    timings = cache_timings(
        lm,
        [(spec, lm.dtype) for spec in specs],
        lengths=[args.window - 8],
        repeats=args.repeats,
        no_cache=False,
    )
    return [statistics.median(timing.seconds) for timing in timings]


def table(rows: dict[str, dict]) -> str:
    full = rows["none"]["perplexity"]
    lines = [
        "| scheme | stored bits | effective | perplexity | over full | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        speed = f"{1 / row['seconds']:.0f}" if "seconds" in row else ""
        over = "" if name == "none" else f"{100 * (row['perplexity'] / full - 1):+.1f} %"
        lines.append(
            f"| `{name}` | {row['stored_bits']:.2f} | {row['effective_bits']:.2f} | "
            f"{row['perplexity']:.2f} | {over} | {speed} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python benchmarks/scheme_table.py --text README.md "
        "--calibration-text README.md --max-tokens 2048 --samples 2 --seqlen 512 "
        "--schemes none nqkv nqkv-plus",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="UTF-8; perplexity is measured on it")
    parser.add_argument("--calibration-text", required=True, help="UTF-8; another text")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help="(default: all)")
    parser.add_argument("--window", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="(default: 16384)")
    parser.add_argument("--samples", type=int, default=16, help="for KVQuant (default: 16)")
    parser.add_argument("--seqlen", type=int, default=1024, help="for KVQuant (default: 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="of 8 timed tokens (default: 5)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/scheme_table"))
    args = parser.parse_args()
    read = lambda path: pathlib.Path(path).read_text(encoding="utf-8")
    text, calibration_text = read(args.text), read(args.calibration_text)
    lm = from_pretrained(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    files = calibrations(lm, calibration_text, args.folder, args.samples, args.seqlen)
    records = Records(args.folder / f"{args.window}x{args.max_tokens}.jsonl")
    for name in args.schemes:
        if name not in records.rows:
            records.add(dict(scheme=name, **quality(lm, name.format(**files), text, args)))
            print(json.dumps(records.rows[name]), flush=True)
    timed = list({name.partition(":")[0]: name for name in reversed(args.schemes)}.values())[::-1]
    times = seconds(lm, [name.format(**files) for name in timed], args)
    rows = {name: dict(records.rows[name]) for name in args.schemes}
    for name, median in zip(timed, times, strict=True):
        rows[name]["seconds"] = median
    print(
        f"\n{args.model} ({jnp.dtype(lm.dtype).name}), {args.max_tokens:,} tokens of "
        f"{pathlib.Path(args.text).name} in windows of {args.window:,}; {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, jax {jax.__version__}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
