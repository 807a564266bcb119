"""`nqkv analyze heatmap`: how large keys and values are, by token and channel."""

from nqkv_jax.cli import analyze_input, options, terminal


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands,
        "heatmap", "outlier channels, attention sinks, and maps of |K| and |V|",
        "nqkv analyze heatmap --model smollm2-135m --text README.md --plot heatmap.png",
        "An outlier channel has a root mean square of more than 4 times the median channel's.",
    )  # fmt: skip
    analyze_input.add_arguments(parser)
    parser.add_argument(
        "--layers", type=int, nargs="+", action=options.Several, metavar="N",
        help="to draw (default: the first, the middle and the last)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax.analysis.activations import check_tokens
    from nqkv_jax.analysis.magnitudes import check_layers, draw, magnitudes

    def check(lm, tokens):
        check_layers(args.layers, lm.config.num_layers)
        check_tokens(lm, tokens)

    lm, tokens = analyze_input.read(args, check)
    layers = magnitudes(lm, tokens)
    analyze_input.draw(args, lambda: draw(layers, lm.name, args.layers))
    if args.json:
        entries = [
            {
                side: dict(
                    outlier_channels=found.outlier_channels.tolist(),
                    outlier_energy=found.outlier_energy,
                    first_over_median=found.first_over_median,
                    channel_rms=found.channel_rms.tolist(),
                    norms=found.norms.tolist(),
                )
                for side, found in layer.items()
            }
            for layer in layers
        ]
        terminal.print_json(dict(model=lm.name, tokens=tokens.size, layers=entries))
        return
    rows = []
    for i, layer in enumerate(layers):
        cells = []
        for side in ("keys", "values"):
            found = layer[side]
            cells += [len(found.outlier_channels), f"{100 * found.outlier_energy:.0f} %",
                      terminal.figure(found.first_over_median)]  # fmt: skip
        rows.append((i, *cells))
    channels = layers[0]["keys"].absolute.shape[1]
    print(f"{lm.name}: {channels} channels, {tokens.size:,} tokens; keys before RoPE\n")
    columns = ("outliers", "energy", "first")
    print(terminal.table(
        ("layer", *(f"{side}: {c}" for side in ("K", "V") for c in columns)), rows
    ))  # fmt: skip
    print(
        "\noutliers: channels of more than 4 times the root mean square of the median channel.\n"
        "energy: their share of the sum of squares.  first: the norm of the first token over that\n"
        "of the median token."
    )
