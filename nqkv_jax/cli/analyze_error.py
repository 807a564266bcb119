"""`nqkv analyze error`: what schemes do to keys, values and attention, layer by layer."""

from nqkv_jax.cli import analyze_input, options, terminal

SCHEMES = ("int8", "nqkv", "int4", "kivi", "nqkv-plus:bits=2")


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands,
        "error", "per scheme and layer, the error of keys, values and attention outputs",
        "nqkv analyze error --model smollm2-135m --text README.md --scheme nqkv kivi "
        "--plot error.png",
        "Relative squared errors. Every layer gets exact activations; attention sees what\n"
        "decoding would see, with the sinks and the latest tokens that a scheme keeps exactly.",
    )  # fmt: skip
    analyze_input.add_arguments(parser)
    parser.add_argument(
        "--scheme", nargs="+", action=options.Several, default=list(SCHEMES), metavar="SCHEME",
        help=f"default: {' '.join(SCHEMES)}",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args) -> None:
    import dataclasses

    from nqkv_jax import schemes
    from nqkv_jax.analysis.errors import check, draw, scheme_errors

    names = [schemes.get(name) for name in args.scheme]
    lm, tokens = analyze_input.read(args, lambda lm, tokens: check(lm, tokens, names))
    results = scheme_errors(lm, tokens, names, progress=args.progress)
    analyze_input.draw(args, lambda: draw(results, lm.name))
    if args.json:
        entries = [dataclasses.asdict(result) for result in results]
        terminal.print_json(dict(model=lm.name, tokens=tokens.size, schemes=entries))
        return
    print(f"{lm.name}, {tokens.size:,} tokens: relative squared errors, median (largest layer)\n")
    rows = []
    for result in results:
        cells = []
        for what in ("keys", "values", "output"):
            errors = [getattr(layer, what) for layer in result.layers]
            cells.append(f"{result.median(what):.2e} ({max(errors):.2e})")
        rows.append((result.scheme, f"{result.stored_bits:.2f}", *cells))
    print(terminal.table(("scheme", "stored bits", "keys", "values", "attention"), rows))
