"""The command line: `nqkv generate | eval | calibrate | analyze | bench | demo | ...`.

One module per command: `add(commands)` declares its arguments, `run(args)` does the work and
imports what it needs only then, so that `--help` is quick and `nqkv schemes` loads no model.
"""

import _thread
import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Sequence

from nqkv_jax.cli import (
    analyze,
    bench,
    calibrate,
    codebook,
    demo,
    evaluate,
    generate,
    leaderboard,
    plan,
    schemes,
)

COMMANDS = (
    generate, evaluate, leaderboard, calibrate, codebook, analyze, bench, demo, plan, schemes,
)  # fmt: skip

# What a user can mend. Anything else is a fault of ours, and is reported as such.
_EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, MemoryError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Prints what is installed; looks it up only then."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib import metadata

        # Of the packages: `jax.__version__` would import all of it.
        print(f"nqkv-jax {metadata.version('nqkv-jax')} (jax {metadata.version('jax')})")
        parser.exit()


@contextlib.contextmanager
def _interrupts():
    """Ctrl-C ends what runs in here wherever it comes.

    Python drops an exception in a callback of the garbage collector, as JAX has one, and the
    command would run on.
    """
    usual = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Once this function, where it would be dropped again, is over.
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    top = _Parser(
        prog="nqkv",
        description="KV-cache quantization for JAX: generate, measure and plan with any scheme.",
        epilog="example:\n  nqkv demo\n\nEvery command has --help with an example, and --json.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for an error, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Anywhere on the line: it is remembered only when something has failed already.
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # Text of a model must not fail on a terminal that cannot show all of it.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    try:
        args = parser().parse_args(argv)
        with _interrupts():
            args.run(args)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse has shown the help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\nnqkv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as `head` does. What Python would still flush goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, _EXPECTED)
        kind = "" if expected and str(error) else f"{type(error).__name__}: "
        hint = "" if expected else " (not expected to happen; --debug shows where it comes from)"
        print(f"nqkv: error: {kind}{error}{hint}", file=sys.stderr)
        return 2
