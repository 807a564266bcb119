"""What all analyses ask for, and what they do with a figure."""

import argparse
from collections.abc import Callable
from typing import Any

from nqkv_jax.cli import options

MAX_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    options.add_model(parser, required=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="TOKENS",
        help=f"use so much of the text (default: {MAX_TOKENS})",
    )  # fmt: skip
    if plot:
        parser.add_argument(
            "--plot", metavar="FILE",
            help="draw a PNG, PDF or SVG too, with its data beside it as .npz",
        )  # fmt: skip


def read(args: argparse.Namespace, check: Callable[[Any, Any], Any]):
    """(language model, i32[tokens]); `check` gets both before the weights are read."""
    if getattr(args, "plot", None):
        from nqkv_jax.analysis import plots

        plots.check_path(args.plot)
    text = options.read_text(args.text)
    tokens = lambda lm: options.first_tokens(lm, text, args.max_tokens)
    lm = options.load(args, lambda lm: check(lm, tokens(lm)))
    return lm, tokens(lm)


def draw(args: argparse.Namespace, drawing) -> None:
    """Saves what `drawing()` returns, (figure, data), if --plot asks for it."""
    import sys

    from nqkv_jax.analysis import plots

    if args.plot:
        figure, data = drawing()
        beside = plots.save(figure, args.plot, data)
        print(f"nqkv: drew {args.plot}, data in {beside}", file=sys.stderr)
