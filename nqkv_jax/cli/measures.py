"""What the measures of `nqkv eval` share: arguments, and one run for each scheme."""

import argparse
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(measures, name: str, summary: str, example: str, notes: str) -> argparse.ArgumentParser:
    """The parser of a measure, with the model, the schemes and the record."""
    parser = options.subparser(measures, name, summary, example, notes)
    options.add_model(parser, required=True)
    options.add_cache_dtype(parser)
    parser.add_argument(
        "--scheme", nargs="+", action=options.Several, default=["none"], metavar="SCHEME",
        help="one or several (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", metavar="FILE",
        help="save finished parts there, and resume from it; with several schemes one file each, "
        "with the scheme in its name",
    )  # fmt: skip
    return parser


def add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument(
        "--window", type=int, default=1024, metavar="TOKENS",
        help="tokens that the model reads at once (default: 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS",
        help="from one window to the next (default: the window)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, metavar="TOKENS", help="of the text that are used"
    )


def check_windows(what: str, text: str, args: argparse.Namespace) -> Callable[[Any], Any]:
    """What `measure` calls for a measure over the windows of a text."""
    from nqkv_jax.evaluation.windows import windows

    sizes = dict(size=args.window, stride=args.stride, max_tokens=args.max_tokens)
    return lambda lm: windows(what, lm, text, **sizes)


def measure(
    args: argparse.Namespace, one: Callable[..., Any], check: Callable[[Any], Any]
) -> list[Any]:
    """Runs `one(lm, scheme=..., cache_dtype=..., progress=..., resume=...)` for every scheme.

    `check` is called with the model before its weights are read. With --json, prints each result as
    it comes.

    Returns: the results, which are dataclasses.
    """
    import dataclasses

    from nqkv_jax import schemes

    found = [schemes.get(name) for name in args.scheme]
    paths = [_resume_path(args.resume, str(scheme), len(found)) for scheme in found]
    lm = options.load(args, lambda lm: (options.check_fit(lm, found, args.cache_dtype), check(lm)))
    results = []
    for scheme, path in zip(found, paths, strict=True):
        result = one(
            lm, scheme=str(scheme), cache_dtype=args.cache_dtype, progress=args.progress,
            resume=path,
        )  # fmt: skip
        results.append(result)
        if args.json:
            terminal.print_json(dataclasses.asdict(result))
    return results


def _resume_path(path: str | None, scheme: str, count: int) -> pathlib.Path | None:
    if path is None:
        return None
    path = pathlib.Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--resume must be a file, in a folder that exists; got {path}")
    if count == 1:
        return path
    return path.with_name(f"{path.stem}.{file_name(scheme)}{path.suffix}")


def file_name(scheme: str) -> str:
    """The string form of a scheme without what a file's name should not have."""
    return re.sub("[^A-Za-z0-9._=-]", "_", scheme)


def describe_windows(result: Any, text: str) -> str:
    """What a result over the windows of a text is about."""
    stride = f", stride {result.stride:,}" if result.stride != result.window else ""
    return (
        f"{result.model} ({result.dtype}, cache {result.cache_dtype}): "
        f"{counted(result.tokens, 'token')} of {pathlib.Path(text).name} scored in "
        f"{counted(result.windows, 'window')} of {result.window:,}{stride}\n"
    )


def with_error(value: float, error: float, digits: int = 4) -> str:
    """0.012345, 0.00056 -> "0.01235 ± 0.00056": two figures of the error decide.

    `digits` after the point where there is no error, which is NaN for one window or item.
    """
    if not math.isfinite(error) or error <= 0:
        return f"{value:.{digits}f}"
    mark = "±" if terminal.unicode_output() else "+-"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:.{digits}f} {mark} {error:.{digits}f}"


def percent(share: float, error: float) -> str:
    return with_error(100 * share, 100 * error, 1)


def interval(shares: tuple[float, float]) -> str:
    """(0.123, 0.345) -> "12.3 to 34.5"."""
    return f"{100 * shares[0]:.1f} to {100 * shares[1]:.1f}"


def columns(results: Sequence[Any], **cells: Callable[[Any], str]) -> str:
    """A table with a row per result and the scheme in front; keywords are the other columns."""
    header = ["scheme", *(name.replace("_", " ") for name in cells)]
    return terminal.table(header, [[r.scheme, *(c(r) for c in cells.values())] for r in results])
