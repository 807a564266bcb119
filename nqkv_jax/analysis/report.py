"""All analyses of one model on one text, in words: Markdown with figures.

What is said is chosen by what was measured: each `describe_...` turns the results of one analysis
into sentences, and says where a paper's claim does not hold.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nqkv_jax.analysis import plots
from nqkv_jax.analysis.errors import SchemeErrors, scheme_errors
from nqkv_jax.analysis.errors import draw as draw_errors
from nqkv_jax.analysis.magnitudes import OUTLIER, Magnitudes, magnitudes
from nqkv_jax.analysis.magnitudes import draw as draw_magnitudes
from nqkv_jax.analysis.normality import BlockStatistics, normality
from nqkv_jax.analysis.normality import draw as draw_normality
from nqkv_jax.analysis.spectra import LayerSpectra, spectra
from nqkv_jax.analysis.spectra import draw as draw_spectra
from nqkv_jax.words import counted

# Of normal blocks 95 % pass; below HOLDS something else is among them, below MOST it is the rule.
HOLDS, MOST = 0.9, 0.5
# Shares that differ by less are called alike.
APART = 0.1


def write(
    lm: Any,
    tokens: np.ndarray,
    folder: str | os.PathLike,
    *,
    names: Sequence[str],
    progress: bool | None = None,
) -> pathlib.Path:
    """Writes report.md, and its figures with their data, into `folder`; returns its path.

    Args:
      lm: a model of `nqkv_jax.models`.
      tokens: i32[tokens], a text that it can read at once.
      names: schemes whose errors are measured.

    Raises: ValueError if the text is too short or too long, or a scheme does not fit, before
      anything is written; OSError if the folder cannot be made.
    """
    folder = pathlib.Path(folder).expanduser()
    blocks = normality(lm, tokens, progress=progress)
    sizes = magnitudes(lm, tokens)
    norms = spectra(lm, tokens, progress=progress)
    found = scheme_errors(lm, tokens, names, progress=progress)
    sections = (
        ("normality", "Are they normal?", blocks, describe_normality, draw_normality),
        ("heatmap", "Channels and tokens that stand out", sizes, describe_magnitudes,
         draw_magnitudes),
        ("spectra", "Keys against values", norms, describe_spectra, draw_spectra),
        ("error", "What schemes do to them", found, describe_errors, draw_errors),
    )  # fmt: skip
    config = lm.config
    lines = [
        f"# Keys and values of {lm.name}",
        "",
        f"{counted(config.num_layers, 'layer')} with {counted(config.num_kv_heads, 'KV head')} of "
        f"{config.head_dim} channels, on {len(tokens):,} tokens of one text. A figure for a model "
        "is the median of its layers, and behind it is their range.",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, title, results, describe, draw in sections:
        figure, data = draw(results, lm.name)
        plots.save(figure, folder / f"{name}.png", data)
        lines += ["", f"## {title}", ""]
        lines += [f"- {sentence}" for sentence in describe(results)]
        lines += ["", f"![{title}]({name}.png)", "", f"The figure's data: `{name}.npz`."]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _spread(values: Sequence[float], form) -> str:
    """The median, and the range unless all are equal."""
    low, middle, high = (form(v) for v in (np.min(values), np.median(values), np.max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _share(number: int, layers: int) -> str:
    whole = {0: "in no layer", layers: "in all layers" if layers > 1 else "in the one layer"}
    return whole.get(number, f"in {number} of {layers} layers")


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def describe_normality(layers: list[dict[str, dict[str, BlockStatistics]]]) -> list[str]:
    """Whether the normality that NQKV supposes is there, side by side and view by view."""
    sides = list(layers[0])
    said = [
        "95 % of normal blocks would pass the test; the longer a block, the smaller the deviations "
        "that it finds."
    ]
    for side in sides:
        view = lambda name, side=side: [layer[side][name] for layer in layers]
        share = lambda name, view=view: float(np.median([s.passing for s in view(name)]))
        shown = lambda name, view=view: _spread([s.passing for s in view(name)], percent)
        size, stretch = view("tokens")[0].block_size, view("channels")[0].block_size
        name = plots.side_label(side, sides)
        name = f"**{name[0].upper()}{name[1:]}**"
        kurtoses = [k for s in view("tokens") if not np.isnan(k := s.excess_kurtosis)]
        if not kurtoses:
            said.append(f"{name}: all blocks of {size} channels of one token are constant.")
            continue
        within, standardised = share("tokens"), share("standardised")
        if within >= HOLDS:
            verdict = "so within a token they may be taken for normal"
        elif within >= MOST:
            verdict = "so within a token most blocks may be taken for normal, and many may not"
        elif within > 1 - HOLDS:
            verdict = "so within a token most blocks are not normal: NQKV's premise fails for them"
        else:
            verdict = "so within a token hardly any is normal: NQKV's premise fails"
        said.append(
            f"{name}: of blocks of {size} channels of one token "
            f"{shown('tokens')} pass the test for normality, {verdict}."
        )
        kurtosis = float(np.median(kurtoses))
        if kurtosis > 3:
            tails = "a few channels are much larger than a normal distribution allows"
        elif kurtosis > 0.5:
            tails = "tails are heavier than those of a normal distribution"
        elif kurtosis < -0.5:
            tails = "large elements are rarer than in a normal distribution"
        else:
            tails = "tails are about as heavy as those of a normal distribution"
        said.append(f"Their excess kurtosis within a token is {kurtosis:.1f}: {tails}.")
        if standardised > within + APART:
            reason = (
                "what breaks normality within a token is mostly that channels have means and "
                "scales of their own"
            )
        elif standardised < within - APART:
            reason = "channels are less normal by themselves than side by side"
        else:
            reason = "means and scales of the channels make no difference"
        said.append(
            f"Once every channel has been standardised, {shown('standardised')} of the same blocks "
            f"pass: {reason}."
        )
        said.append(
            f"Along {stretch} tokens of one channel {shown('channels')} pass"
            + (
                ", so a scale per channel meets nearly normal numbers."
                if share("channels") >= MOST
                else ", so channels are not normal over time either."
            )
        )
        said.append(
            f"Normalised, shifted and normalised as NSNQuant does it, {shown('nsn')} of the blocks "
            f"within a token pass, and {shown('nsn_hadamard')} after its Hadamard transform"
            + (
                ": one codebook for normal numbers fits."
                if share("nsn_hadamard") >= HOLDS
                else ": not what its codebook supposes."
            )
        )
    return said


def describe_magnitudes(layers: list[dict[str, Magnitudes]]) -> list[str]:
    """Outlier channels, and what is special about the first token."""
    sides = [side for side in layers[0] if side != "rotated_keys"]
    said, energy = [], {}
    for side in sides:
        found = [layer[side] for layer in layers]
        counts = [len(m.outlier_channels) for m in found]
        energy[side] = float(np.median([m.outlier_energy for m in found]))
        said.append(
            f"Outliers among the {found[0].absolute.shape[1]} channels of the "
            f"{plots.side_label(side, layers[0])}, with more than {OUTLIER:g} times the root mean "
            f"square of the median channel: {_spread(counts, lambda n: f'{n:.0f}')}; they hold "
            f"{_spread([m.outlier_energy for m in found], percent)} of the energy."
        )
    if energy["keys"] > energy["values"] + APART:
        said.append("Outlier channels are a matter of the keys.")
    elif energy["values"] > energy["keys"] + APART:
        said.append(
            "Outlier channels are a matter of the values, unlike in the papers on KV caches."
        )
    else:
        said.append("Keys and values do not differ in their outlier channels.")
    for side in sides:
        ratios = [r for layer in layers if not np.isnan(r := layer[side].first_over_median)]
        if not ratios:
            said.append(f"The {side} of the median token are zero.")
            continue
        small = sum(r < 0.5 for r in ratios)
        large = sum(r > 2 for r in ratios)
        if small > len(ratios) / 2:
            verdict = f"{_share(small, len(ratios))} less than half, as is known of attention sinks"
        elif large > len(ratios) / 2:
            verdict = f"{_share(large, len(ratios))} more than twice as much: an outlier token"
        else:
            verdict = "in most layers a token like others, by its norm"
        said.append(
            f"The {side} of the first token have {_spread(ratios, lambda r: f'{r:.2f}')} times the "
            f"norm of the median token's: {verdict}."
        )
    return said


def describe_spectra(layers: list[LayerSpectra]) -> list[str]:
    """Whether KVQ's two inequalities hold."""
    count = len(layers)
    weights = sum(s.key_weight.frobenius > s.value_weight.frobenius for s in layers)
    activations = sum(s.keys.frobenius > s.values.frobenius for s in layers)
    ratios = [s.keys.frobenius / s.values.frobenius for s in layers if s.values.spectral]
    times = (
        f"K is {_spread(ratios, lambda r: f'{r:.1f}')} times as large" if ratios else "V is zero"
    )
    agree = sum(
        (s.key_weight.frobenius > s.value_weight.frobenius)
        == (s.keys.frobenius > s.values.frobenius)
        for s in layers
    )
    share = lambda n: _share(n, count)
    return [
        f"||K|| > ||V|| {share(activations)}; {times}."
        + ("" if activations > count / 2 else " That more bits are for keys does not follow here."),
        f"||W_K|| > ||W_V|| {share(weights)}: the weights say {share(agree)} which side is the "
        "larger one"
        + (
            ", so their norms can stand for those of keys and values."
            if agree >= HOLDS * count
            else ", so their norms cannot stand for those of keys and values."
        ),
    ]


def describe_errors(results: Sequence[SchemeErrors]) -> list[str]:
    """Who is best at the error that counts, and whether the other errors say so too."""
    ranked = sorted(results, key=lambda r: r.median("output"))
    said = [
        f"`{r.scheme}` ({r.stored_bits:.2f} stored bits): relative squared error of keys "
        f"{r.median('keys'):.1e}, of values {r.median('values'):.1e}, of attention outputs "
        f"{_spread([layer.output for layer in r.layers], lambda e: f'{e:.1e}')}."
        for r in ranked
    ]
    if len(ranked) > 1:
        said.append(f"Attention is closest to the exact one with `{ranked[0].scheme}`.")
    misled = [
        (a, b)
        for i, a in enumerate(ranked)
        for b in ranked[i + 1 :]
        if a.median("keys") > b.median("keys") and a.median("values") > b.median("values")
    ]
    if misled:
        a, b = max(misled, key=lambda pair: pair[1].median("output") / pair[0].median("output"))
        said.append(
            f"Errors of keys and values do not tell: both are larger with `{a.scheme}` than with "
            f"`{b.scheme}`, and attention is closer all the same. What counts is the error where "
            "queries look, and which tokens are kept exactly."
        )
    elif len(ranked) > 1:
        said.append("No scheme is better at attention and worse at both keys and values.")
    return said
