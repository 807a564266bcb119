"""`nqkv codebook`: the codebooks of vectors that come with the package, made again."""

from nqkv_jax.cli import options, terminal


def add(commands) -> None:
    parser = options.subparser(
        commands, "codebook", "make vector codebooks for normal data (nsnquant)",
        "nqkv codebook --out vector_codebooks.safetensors",
        "256 words of 8 numbers, for 1 bit per number and for magnitudes at 2 bits, by k-means\n"
        "and gradients on random samples. The file that comes with the package was made with the\n"
        "defaults, and records them.",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    number = lambda name, kind, default, metavar, text: parser.add_argument(
        name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
    )
    number("--seed", int, 42, "N", "for all samples")
    number("--samples", int, 2**18, "N", "vectors for k-means")
    number("--iterations", int, 50, "N", "rounds of k-means")
    number("--steps", int, 2000, "N", "Adam steps, after k-means")
    number("--batch", int, 2048, "N", "tokens of 128 numbers in a step")
    number("--learning-rate", float, 1e-2, "X", "initial learning rate of Adam")
    options.add_progress(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    import time

    from nqkv_jax.calibration import codebook

    options.check_out(args.out)
    names = ("seed", "samples", "iterations", "steps", "batch", "learning_rate")
    settings = codebook.Settings(**{name: getattr(args, name) for name in names})
    begin = time.perf_counter()
    made = codebook.write(args.out, settings, progress=args.progress)
    took = time.perf_counter() - begin
    if args.json:
        terminal.print_json(dict(made, out=args.out, seconds=took))
        return
    cosines = made["cosine"]
    print(
        f"wrote {args.out} in {terminal.seconds(took)}: token cosine {cosines['1']:.4f} at 1 bit, "
        f"{cosines['2']:.4f} at 2"
    )
