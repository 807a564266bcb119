"""`nqkv analyze spectra`: norms and singular values of keys, values and their projections."""

import math

from nqkv_jax.cli import analyze_input, options, terminal
from nqkv_jax.words import counted


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands,
        "spectra", "per layer, how large keys and values and their projections are",
        "nqkv analyze spectra --model smollm2-135m --text README.md --plot spectra.png",
        "Frobenius and spectral norms of W_K and W_V, and of the keys (before RoPE) and values of\n"
        "a text, those as root mean square over tokens. K/V are ratios of Frobenius norms.",
    )  # fmt: skip
    analyze_input.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax.analysis.activations import check_tokens
    from nqkv_jax.analysis.spectra import MATRICES, draw, spectra

    lm, tokens = analyze_input.read(args, check_tokens)
    layers = spectra(lm, tokens, progress=args.progress)
    analyze_input.draw(args, lambda: draw(layers, lm.name))
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
    print(
        f"{lm.name}: Frobenius norm (spectral norm) per layer; K and V of {tokens.size:,} tokens\n"
    )
    rows = []
    for i, layer in enumerate(layers):
        found = [getattr(layer, matrix) for matrix in MATRICES]
        w_k, w_v, k, v = (f"{s.frobenius:.3g} ({s.spectral:.3g})" for s in found)
        ratio = lambda a, b: terminal.figure(a.frobenius / b.frobenius if b.frobenius else math.nan)
        rows.append((i, w_k, w_v, ratio(*found[:2]), k, v, ratio(*found[2:])))
    print(terminal.table(("layer", "W_K", "W_V", "K/V", "K", "V", "K/V"), rows))
    more = sum(s.key_weight.frobenius > s.value_weight.frobenius for s in layers)
    larger = sum(s.keys.frobenius > s.values.frobenius for s in layers)
    print(
        f"\n||W_K|| > ||W_V|| in {more} of {counted(len(layers), 'layer')}, "
        f"||K|| > ||V|| in {larger} of {len(layers)}."
    )
