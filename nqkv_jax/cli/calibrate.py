"""`nqkv calibrate`: what some schemes must learn about a model first."""

from nqkv_jax.cli import calibrate_commvq, calibrate_kvq, options, terminal
from nqkv_jax.words import counted

WEIGHTS = ("scaled_fisher", "fisher", "none")


def add(commands) -> None:
    group = commands.add_parser(
        "calibrate",
        help="calibrate a scheme to a model",
        description="make the calibration that a scheme needs",
        epilog="example:\n  nqkv calibrate kvquant --help",
    )
    subcommands = group.add_subparsers(title="schemes", metavar="SCHEME", required=True)
    add_kvquant(subcommands)
    calibrate_kvq.add(subcommands)
    calibrate_commvq.add(subcommands)


def add_kvquant(subcommands) -> None:
    parser = options.subparser(
        subcommands, "kvquant", "ranges of key channels and codebooks of every layer",
        "nqkv calibrate kvquant --model smollm2-135m --text README.md --samples 2 --seqlen 512 "
        "--out kvquant.safetensors",
        "Two passes over windows of a text, the second with gradients. What it has learned so far\n"
        "is kept in FILE.partial: after an interruption the same command goes on from there. Use\n"
        "the result as --scheme kvquant:calibration=FILE.",
    )  # fmt: skip
    options.add_model(parser, required=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    whole = lambda name, default, text: parser.add_argument(
        name, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
    )
    whole("--samples", 16, "windows, spread over the text")
    whole("--seqlen", 2048, "tokens per window")
    whole("--sinks", 1, "first tokens of a window that are left out")
    parser.add_argument(
        "--outliers", type=float, default=0.01, metavar="SHARE",
        help="of all elements that get a slot (default: 0.01); the scheme can also do without",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=WEIGHTS[0],
        help="of the elements in the codebooks' objective: F s^2 as in the paper, F, or none, "
        f"which needs no gradients (default: {WEIGHTS[0]})",
    )  # fmt: skip
    parser.set_defaults(run=run_kvquant)


def run_kvquant(args) -> None:
    import pathlib
    import time

    from nqkv_jax import schemes
    from nqkv_jax.calibration.kvquant import calibrate, check

    options.check_out(args.out, "kvquant", "calibration")
    text = options.read_text(args.text)
    names = ("samples", "seqlen", "outliers", "sinks", "weights")
    asked = {name: getattr(args, name) for name in names}
    lm = options.load(args, lambda lm: check(lm, text, **asked))
    begin = time.perf_counter()
    calibrate(lm, text, out=args.out, progress=args.progress, **asked)
    took = time.perf_counter() - begin
    size = pathlib.Path(args.out).expanduser().stat().st_size
    # What the scheme must know of this calibration, too.
    scheme = str(
        schemes.get("kvquant", outliers=args.outliers, sinks=args.sinks, calibration=args.out)
    )
    if args.json:
        terminal.print_json(
            dict(model=lm.name, out=args.out, bytes=size, scheme=scheme, seconds=took)
        )
        return
    print(
        f"{lm.name}: {counted(args.samples, 'window')} of {args.seqlen:,} tokens in "
        f"{terminal.seconds(took)}; wrote {args.out} ({size:,} bytes)\n\n"
        f"use it as --scheme {scheme}"
    )
