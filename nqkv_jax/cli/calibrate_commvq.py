"""`nqkv calibrate commvq`: codebooks of every layer's keys and values."""

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands, "commvq", "codebooks of keys, and codebooks and encoders of values",
        "nqkv calibrate commvq --model smollm2-135m --text README.md --bits 2 --samples 2 "
        "--value-steps 20 --out commvq.safetensors",
        "Layer after layer: expectation maximisation for keys, a small network for values. The\n"
        "layers that are done are kept in FILE.partial: after an interruption the same command\n"
        "goes on from there. Use the result as --scheme commvq:bits=BITS,calibration=FILE.",
    )  # fmt: skip
    options.add_model(parser, required=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument(
        "--bits", type=int, choices=(1, 2), default=2, help="bits per number (default: 2)"
    )
    parser.add_argument(
        "--levels", type=int, metavar="N",
        help="of the keys' codebooks, 12 bits per head each (default: as many as stay within the "
        "bits; for head_dim 128 as in the paper, 11 and 21)",
    )  # fmt: skip

    def number(name, kind, default, text):
        metavar = "N" if kind is int else "X"
        parser.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )

    number("--samples", int, 16, "windows, spread over the text")
    number("--seqlen", int, 512, "tokens per window")
    number("--key-steps", int, 5, "expectation maximisation steps per level; the paper: 100")
    number("--temperature", float, 1e-3, "its first temperature, for tokens of length 1")
    number("--value-steps", int, 300, "training steps; the paper: 100,000 and more")
    number("--batch", int, 512, "tokens per training step; the paper: 8,192")
    number("--learning-rate", float, 3e-4, "the paper: 1e-3")
    number("--weight-decay", float, 0.1, "as in the paper")
    number("--attention", float, 0.0, "weight of the attention output's error; the paper: 1")
    number("--seed", int, 0, "for all that is drawn")
    parser.set_defaults(run=run)


def run(args) -> None:
    import pathlib
    import time

    from nqkv_jax.calibration.commvq import calibrate, check

    options.check_out(args.out, "commvq", "calibration")
    text = options.read_text(args.text)
    names = ("bits", "levels", "samples", "seqlen", "key_steps", "temperature", "value_steps",
             "batch", "learning_rate", "weight_decay", "attention", "seed")  # fmt: skip
    asked = {name: getattr(args, name) for name in names}
    lm = options.load(args, lambda lm: check(lm, text, **asked))
    begin = time.perf_counter()
    found = calibrate(lm, text, out=args.out, progress=args.progress, **asked)
    took = time.perf_counter() - begin
    key_error, value_error = map(float, found["errors"].mean(axis=0))
    size = pathlib.Path(args.out).expanduser().stat().st_size
    scheme = f"commvq:bits={args.bits},calibration={args.out}"
    if args.json:
        terminal.print_json(
            dict(model=lm.name, out=args.out, bytes=size, scheme=scheme, seconds=took,
                 key_error=key_error, value_error=value_error)
        )  # fmt: skip
        return
    print(
        f"{lm.name}: {counted(args.samples, 'window')} of {args.seqlen:,} tokens in "
        f"{terminal.seconds(took)}; wrote {args.out} ({size:,} bytes, "
        f"{size // lm.config.num_layers:,} a layer, which caches hold beside their tokens)\n"
        f"error of this text, relative to its energy: keys {key_error:.4f}, values "
        f"{value_error:.4f}\n\nuse it as --scheme {scheme}"
    )
