"""What all analyses ask for, and what they do with a figure."""

import argparse

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


def read(args: argparse.Namespace):
    """(language model, i32[tokens]); what is wrong with the arguments is said before it loads."""
    import numpy as np

    if getattr(args, "plot", None):
        from nqkv_jax.analysis import plots

        plots.check_path(args.plot)
    if args.max_tokens < 2:
        raise ValueError(f"--max-tokens must be at least 2; got {args.max_tokens}")
    text = options.read_text(args.text)
    lm = options.load(args)
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} came without a tokenizer, which the text needs")
    limit = min(args.max_tokens, lm.config.max_positions)
    return lm, np.asarray(lm.tokenizer.encode(text, add_special_tokens=False)[:limit], np.int32)


def draw(args: argparse.Namespace, drawing) -> None:
    """Saves what `drawing()` returns, (figure, data), if --plot asks for it."""
    import sys

    from nqkv_jax.analysis import plots

    if args.plot:
        figure, data = drawing()
        beside = plots.save(figure, args.plot, data)
        print(f"nqkv: drew {args.plot}, data in {beside}", file=sys.stderr)
