"""`nqkv analyze report`: all analyses in words and figures."""

from nqkv_jax.cli import analyze_error, analyze_input, options, terminal


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands,
        "report", "all analyses of a model on a text, as Markdown with figures",
        "nqkv analyze report --model smollm2-135m --text README.md --out report",
        "Writes report.md, a PNG per analysis, and its data as .npz. Two minutes for the example.",
    )  # fmt: skip
    analyze_input.add_arguments(parser, plot=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="made if there is none")
    parser.add_argument(
        "--scheme", nargs="+", action=options.Several, default=list(analyze_error.SCHEMES),
        metavar="SCHEME",
        help=f"whose errors are measured (default: {' '.join(analyze_error.SCHEMES)})",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args) -> None:
    import pathlib

    from nqkv_jax import schemes
    from nqkv_jax.analysis import plots, report
    from nqkv_jax.analysis.errors import check as check_errors
    from nqkv_jax.analysis.normality import check as check_normality

    names = [schemes.get(name) for name in args.scheme]
    plots.new_figure(1, 1)  # what fails in the end should have failed at once
    if pathlib.Path(args.out).expanduser().is_file():
        raise ValueError(f"--out must be a folder; {args.out} is a file")

    def check(lm, tokens):
        check_normality(lm, tokens)
        check_errors(lm, tokens, names)

    lm, tokens = analyze_input.read(args, check)
    path = report.write(lm, tokens, args.out, names=names, progress=args.progress)
    if args.json:
        terminal.print_json(
            dict(model=lm.name, tokens=tokens.size, report=str(path),
                 files=sorted(p.name for p in path.parent.iterdir()))
        )  # fmt: skip
        return
    print(f"Wrote {path}, with figures and their data beside it")
