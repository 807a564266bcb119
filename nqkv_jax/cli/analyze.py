"""`nqkv analyze spectra`: norms and singular values of keys, values and their projections."""

from nqkv_jax.cli import options, terminal

MAX_TOKENS = 1024
MATRICES = {"key_weight": "W_K", "value_weight": "W_V", "keys": "K", "values": "V"}
# Okabe and Ito's, safe for colour-blind readers: keys blue, values orange.
COLORS = {"key_weight": "#0072B2", "value_weight": "#E69F00", "keys": "#0072B2",
          "values": "#E69F00"}  # fmt: skip


def add(commands) -> None:
    group = commands.add_parser(
        "analyze",
        help="look at a model's keys and values",
        description="look at a model's keys and values",
        epilog="example:\n  nqkv analyze spectra --help",
    )
    parser = options.subparser(
        group.add_subparsers(title="analyses", metavar="ANALYSIS", required=True),
        "spectra", "per layer, how large keys and values and their projections are",
        "nqkv analyze spectra --model smollm2-135m --text README.md --plot spectra.png",
        "Frobenius and spectral norms of W_K and W_V, and of the keys (before RoPE) and values of\n"
        "a text, those as root mean square over tokens. K/V are ratios of Frobenius norms.",
    )  # fmt: skip
    options.add_model(parser, required=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="TOKENS",
        help=f"use so much of the text (default: {MAX_TOKENS})",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="draw a PNG, PDF or SVG too")
    parser.set_defaults(run=run)


def run(args) -> None:
    import numpy as np

    from nqkv_jax.analysis import spectra

    if args.plot:
        _figure()  # what fails in the end should have failed at once
    text = options.read_text(args.text)
    lm = options.load(args)
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} came without a tokenizer, which the text needs")
    limit = min(args.max_tokens, lm.config.max_positions)
    tokens = np.asarray(lm.tokenizer.encode(text, add_special_tokens=False)[:limit], np.int32)
    layers = spectra(lm, tokens, progress=args.progress)
    if args.plot:
        _plot(layers, args.plot, lm.name)
    if args.json:
        entries = [
            {
                name: dict(
                    frobenius=getattr(layer, name).frobenius,
                    spectral=getattr(layer, name).spectral,
                    stable_rank=getattr(layer, name).stable_rank,
                    singular_values=getattr(layer, name).values.tolist(),
                )
                for name in MATRICES
            }
            for layer in layers
        ]
        terminal.print_json(dict(model=lm.name, tokens=tokens.size, layers=entries))
        return
    _show(layers, lm.name, tokens.size)


def _show(layers, name: str, tokens: int) -> None:
    print(f"{name}: Frobenius norm (spectral norm) per layer; K and V of {tokens:,} tokens\n")
    rows = []
    for i, layer in enumerate(layers):
        found = [getattr(layer, matrix) for matrix in MATRICES]
        w_k, w_v, k, v = (f"{s.frobenius:.3g} ({s.spectral:.3g})" for s in found)
        ratio = lambda a, b: f"{a.frobenius / b.frobenius:.2f}"
        rows.append((i, w_k, w_v, ratio(*found[:2]), k, v, ratio(*found[2:])))
    print(terminal.table(("layer", "W_K", "W_V", "K/V", "K", "V", "K/V"), rows))
    more = sum(s.key_weight.frobenius > s.value_weight.frobenius for s in layers)
    larger = sum(s.keys.frobenius > s.values.frobenius for s in layers)
    print(
        f"\n||W_K|| > ||W_V|| in {more} of {len(layers)} layers, "
        f"||K|| > ||V|| in {larger} of {len(layers)}."
    )


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            '--plot needs matplotlib, which is not installed: pip install "nqkv-jax[plots]"'
        ) from error
    return Figure


def _plot(layers, path: str, name: str) -> None:
    """Norms by layer, of the projections and of the text; and how singular values fall off."""
    import numpy as np

    figure = _figure()(figsize=(11, 4), layout="constrained")
    projections, activations, decay = figure.subplots(1, 3)
    for axes, pair in ((projections, ("key_weight", "value_weight")),
                       (activations, ("keys", "values"))):  # fmt: skip
        for matrix in pair:
            for norm, style in (("frobenius", "-"), ("spectral", ":")):
                norms = [getattr(getattr(layer, matrix), norm) for layer in layers]
                label = f"{MATRICES[matrix]}, {norm}"
                axes.plot(norms, style, color=COLORS[matrix], label=label)
        axes.set_xlabel("layer")
    projections.set_title("norms of the projections", fontsize=10)
    activations.set_title("norms of keys and values\n(root mean square over tokens)", fontsize=10)
    for matrix, label in MATRICES.items():
        values = np.stack([getattr(layer, matrix).values for layer in layers])
        # The geometric mean over layers, as each falls by factors.
        relative = np.maximum(values / values[:, :1], np.finfo(np.float32).tiny)
        style = "--" if matrix.endswith("weight") else "-"
        mean = np.exp(np.log(relative).mean(axis=0))
        decay.plot(mean, style, color=COLORS[matrix], label=label)
    decay.set_title("singular values / the largest\n(geometric mean over layers)", fontsize=10)
    decay.set_xlabel("index")
    for axes in (projections, activations, decay):
        axes.set_yscale("log")
        # Below the axes: inside, there is no place that is free for every model.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name, fontsize=11)
    figure.savefig(path, dpi=150)
