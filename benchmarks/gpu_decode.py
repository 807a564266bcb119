"""Checks and measures decoding from packed caches on a GPU, from a bare checkout, in one command.

Parts: `check` runs every case of the kernels' tests on the device, against a float64 oracle, and
what is appended against XLA, byte by byte; `bandwidth` is what the memory can do; `append` times
how a token gets into a layer; `sweep` one token's attention over caches of many shapes, against
bfloat16 in the same run; `end-to-end` decodes with whole models of random weights; `splits` tries
other numbers of splits than the kernel's own.

What is found is written as it comes. The same command goes on where it was interrupted, or where
its time was up.
"""

import argparse
import datetime
import functools
import os
import pathlib
import sys
import time

from gpu.journal import LOST, DeviceLost, Journal, Unit, supervise, work

PARTS = ("check", "bandwidth", "append", "sweep", "end-to-end", "splits")
# By when a part must have begun its last unit, as a share of the time. What is left is the next's.
SHARES = {
    "check": 0.25, "bandwidth": 0.3, "append": 0.35, "sweep": 0.6, "end-to-end": 0.88,
    "splits": 0.95,
}  # fmt: skip
LAST = 0.97  # when what still runs is ended, so that there is time for the report
# Of the device's memory. torch, in the process of the sweep, needs some of its own.
MEMORY = {"sweep": "0.85", "end-to-end": "0.93"}
# Seconds without a line in the journal, before a process is taken to hang: compiling takes time.
PATIENCE = {
    "check": 90, "bandwidth": 90, "append": 90, "sweep": 120, "end-to-end": 240, "splits": 90,
}  # fmt: skip
TRIES = 8  # processes for a part, each of which ended before it was done
HERE = pathlib.Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """0 if all that ran was right, 1 if something failed or an error was too large."""
    args = _parser().parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu_decode.jsonl"
    if args.worker:
        return _work(args, path)
    if args.fresh:
        path.unlink(missing_ok=True)
    began, status = time.time(), 0
    for part in args.parts:
        command = [
            sys.executable, __file__, "--worker", "--out", str(args.out), "--parts", part,
            "--deadline", str(began + 60 * args.minutes * SHARES[part]),
            *["--dry-run"] * args.dry_run,
        ]  # fmt: skip
        # Taken at once, so that what is freed is one piece again.
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY[part]} if part in MEMORY else {}
        status |= supervise(
            command, path, patience=PATIENCE[part], tries=TRIES,
            until=began + 60 * args.minutes * LAST, environment=memory | dict(os.environ),
        )  # fmt: skip
    return 1 if status else report(args.out)


def report(folder: pathlib.Path) -> int:
    """Writes tables and figure of what is in the journal; 1 if a record says that it failed."""
    from gpu import report

    journal = Journal(folder / "gpu_decode.jsonl")
    report.write(folder, journal.machine, journal.records, journal.left)
    wrong = [r for r in journal.records if r.get("failure") or r.get("passed") is False]
    for r in wrong:
        why = r.get("failure", "the error is too large")
        print(f"FAILED: {r['spec']} {r['implementation']}: {why}")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/gpu_decode.py --minutes 8 --parts check sweep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"of {', '.join(PARTS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--minutes", type=_positive, default=8.0, help="for all (default: 8)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE / "results", metavar="FOLDER",
        help="for gpu_decode.jsonl, .json, .md and .png (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, to try the script; on any machine"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes > 0; got {text}")
    return value


def _work(args: argparse.Namespace, path: pathlib.Path) -> int:
    """Runs parts in this process."""
    import jax
    from gpu import timing

    journal = Journal(path)
    journal.measured_on(
        device=jax.devices()[0].device_kind, jax=jax.__version__, dry_run=args.dry_run,
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    for part in args.parts:
        units = _units(part, journal, args.dry_run)
        journal.reached(part, sum(not journal.is_done(unit.name) for unit in units))
        try:
            journal.reached(part, work(journal, units, args.deadline, timing.examine))
        except DeviceLost as error:
            journal.ended(f"the device failed: {str(error)[:500]}")
            return LOST
    return 0


def _units(part: str, journal: Journal, dry_run: bool) -> list[Unit]:
    import jax

    device = jax.devices()[0]
    # Where the allocator says nothing, a CPU's, nothing large is tried.
    memory = (device.memory_stats() or {}).get("bytes_limit", 2**30)
    if part == "check":
        from gpu import append, check

        # What takes least first: whole decoders leave out what is found to be wrong.
        if dry_run:
            few = check.units(["cubic4", "integer8-d64"])
            return [*append.checks(["nf4"]), *check.exact_units(["residual"]), *few]
        return [*append.checks(), *check.exact_units(), *check.units()]
    bandwidth = _bandwidth(2**20 if dry_run else min(2**32, memory // 4))
    if part == "bandwidth":
        return [bandwidth]
    if part == "append":
        from gpu import append, end_to_end

        if dry_run:
            return append.units(end_to_end.tiny(), steps=2, repeats=2)
        return append.units(end_to_end.settings(), steps=512, repeats=15)
    if part == "sweep":
        from gpu import shapes, sweep

        # None if that failed.
        copied = lambda: next(
            r.get("bytes_per_s")
            for r in journal.records
            if (r["part"], r["implementation"]) == ("bandwidth", "copy")
        )
        formats = shapes.formats()[:2] if dry_run else shapes.formats()
        return [bandwidth, *sweep.units(
            shapes.TINY if dry_run else shapes.shapes(), formats, repeats=2 if dry_run else 7,
            most_copies=1 if dry_run else 16, room=int(sweep.MEMORY * memory),
            no_torch=_no_torch, copy_bytes_per_s=copied,
        )]  # fmt: skip
    if part == "splits":
        from gpu import shapes, splits

        # The codes that the kernel is best at, and those of which a unit is twice as many tokens.
        formats = [form for form in shapes.formats() if form.key_codebook is None]
        formats = [next(f for f in formats if f.bits == bits) for bits in (4, 2)]
        grid = shapes.TINY if dry_run else splits.SHAPES
        return splits.units(grid, formats, repeats=2 if dry_run else 7)
    from gpu import end_to_end

    chosen = end_to_end.tiny() if dry_run else end_to_end.settings()
    steps, repeats = (2, 1) if dry_run else (16, 5)
    memory = 2**22 if dry_run else memory
    # What is wrong on this device is left to XLA.
    wrong = {r["spec"].split("-")[0] for r in journal.records if r.get("passed") is False}
    return end_to_end.units(
        chosen, steps=steps, repeats=repeats, memory=memory, left_out=wrong & set(end_to_end.OTHERS)
    )


def _bandwidth(nbytes: int) -> Unit:
    from gpu import timing

    def run(note, fatal) -> list[dict]:
        records = []
        for name, times in timing.bandwidth(nbytes, repeats=15).items():
            summary = timing.summary(times)
            moved = nbytes * (2 if name == "copy" else 1)
            records.append(dict(
                part="bandwidth", spec=f"{nbytes} bytes", implementation=name, **summary,
                bytes_per_s=moved / summary["median_us"] * 1e6,
            ))  # fmt: skip
        return records

    failed = lambda reason: [
        dict(part="bandwidth", spec=f"{nbytes} bytes", implementation="copy", failure=reason)
    ]
    return Unit("bandwidth", run, failed)


@functools.cache
def _no_torch() -> str | None:
    """Why torch is left out, or None."""
    import jax
    from gpu import torch_sdpa

    if jax.default_backend() != "gpu":
        return f"needs a GPU; this is {jax.default_backend()}"
    return torch_sdpa.why_not(torch_sdpa.probe(str(HERE)))


if __name__ == "__main__":
    sys.exit(main())
