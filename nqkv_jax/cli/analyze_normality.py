"""`nqkv analyze normality`: which blocks of keys and values are normally distributed."""

from nqkv_jax.cli import analyze_input, options, terminal


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands,
        "normality", "per layer, how many blocks of keys and values pass for normal",
        "nqkv analyze normality --model smollm2-135m --text README.md --plot normality.png",
        "D'Agostino and Pearson's test at 5 %, on blocks of neighbouring channels of a token\n"
        "(what NQKV gives one scale), on the same after every channel was standardised over the\n"
        "text, on neighbouring tokens of a channel, and on what NSNQuant makes of the first:\n"
        "tokens normalised, shifted and normalised (NSN), and then rotated. Of normal blocks 95 %\n"
        "would pass.",
    )  # fmt: skip
    analyze_input.add_arguments(parser)
    parser.add_argument(
        "--block-size", type=int, metavar="CHANNELS",
        help="of a token (default: what nqkv takes, the largest divisor up to 256)",
    )  # fmt: skip
    parser.add_argument(
        "--stretch", type=int, default=64, metavar="TOKENS",
        help="of a channel, and of a window of NSNQuant (default: 64)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args) -> None:
    import dataclasses

    from nqkv_jax.analysis.normality import VIEWS, check, draw, normality

    sizes = dict(block_size=args.block_size, stretch=args.stretch)
    lm, tokens = analyze_input.read(args, lambda lm, tokens: check(lm, tokens, **sizes))
    layers = normality(lm, tokens, progress=args.progress, **sizes)
    analyze_input.draw(args, lambda: draw(layers, lm.name))
    if args.json:
        entries = [
            {
                side: {
                    view: dataclasses.asdict(s) | dict(ordered=s.ordered.tolist())
                    for view, s in found.items()
                }
                for side, found in layer.items()
            }
            for layer in layers
        ]
        terminal.print_json(dict(model=lm.name, tokens=tokens.size, layers=entries))
        return
    first, show = layers[0]["keys"], terminal.figure
    for side in layers[0]:
        name = {"keys": "keys before RoPE", "rotated_keys": "keys after RoPE"}.get(side, side)
        if "rotated_keys" not in layers[0]:
            name = side
        print(
            f"{name}, {tokens.size:,} tokens: % of blocks that pass (skewness, excess kurtosis)\n"
        )
        rows = [
            [i, *(f"{100 * s.passing:.1f} ({show(s.skewness)}, {show(s.excess_kurtosis)})"
                  for s in (layer[side][view] for view in VIEWS))]
            for i, layer in enumerate(layers)
        ]  # fmt: skip
        header = (
            "layer",
            f"{first['tokens'].block_size} channels of a token",
            "standardised",
            f"{first['channels'].block_size} tokens of a channel",
            "NSN",
            "NSN, Hadamard",
        )
        print(terminal.table(header, rows) + "\n")
    print("Skewness and kurtosis are medians over blocks. Of normal blocks 95 % would pass.")
