"""How large keys and values are, by token and channel: outlier channels and attention sinks.

Keys have a few channels that are large for every token, and that is why KIVI and KVQuant scale them
per channel; the first token draws attention whatever it says, and its keys and values are unlike
all others.

Source: Liu et al. (2024), KIVI, arXiv 2402.02750, section 3.2 (the channels); Xiao et al. (2023),
Efficient streaming language models with attention sinks, arXiv 2309.17453.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nqkv_jax.analysis import plots
from nqkv_jax.analysis.activations import record
from nqkv_jax.evaluation.protocol import LanguageModel

# A channel is an outlier if its root mean square is so many times that of the median channel.
OUTLIER = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Of one side of one layer.

    Attributes:
      absolute: f32[tokens, channels], absolute values; channels of all heads in a row.
    """

    absolute: np.ndarray = dataclasses.field(repr=False)

    @property
    def channel_rms(self) -> np.ndarray:
        """f64[channels]: root mean square over tokens."""
        return np.sqrt(np.mean(np.square(self.absolute, dtype=np.float64), axis=0))

    @property
    def outlier_channels(self) -> np.ndarray:
        """The channels whose root mean square is more than `OUTLIER` medians, largest first."""
        rms = self.channel_rms
        found = np.flatnonzero(rms > OUTLIER * np.median(rms))
        return found[np.argsort(-rms[found])]

    @property
    def outlier_energy(self) -> float:
        """Share of the sum of squares that the outlier channels hold."""
        energy = np.square(self.channel_rms)
        return float(energy[self.outlier_channels].sum() / max(energy.sum(), np.finfo(float).tiny))

    @property
    def norms(self) -> np.ndarray:
        """f64[tokens]: the norm of every token."""
        return np.sqrt(np.sum(np.square(self.absolute, dtype=np.float64), axis=1))

    @property
    def first_over_median(self) -> float:
        """The norm of the first token over that of the median token; NaN if that one is 0."""
        norms = self.norms
        return float(norms[0] / np.median(norms)) if np.median(norms) else float("nan")


def magnitudes(lm: LanguageModel, tokens: np.ndarray) -> list[dict[str, Magnitudes]]:
    """Per layer, {"keys", "rotated_keys", "values"} -> magnitudes, on a text i32[tokens].

    "keys" are before RoPE; a model without RoPE has no "rotated_keys".

    Raises: ValueError if the text is too short or too long for the model.
    """
    return [
        {side: Magnitudes(absolute=np.abs(x).astype(np.float32)) for side, x in layer.sides.items()}
        for layer in record(lm, tokens)
    ]


def check_layers(chosen: Sequence[int] | None, num_layers: int) -> list[int]:
    """`chosen`, or else the first, the middle and the last layer.

    Raises: ValueError if there is no such layer.
    """
    if chosen is None:
        return sorted({0, num_layers // 2, num_layers - 1})
    if not chosen or not all(0 <= i < num_layers for i in chosen):
        raise ValueError(f"layers must be in 0..{num_layers - 1}; got {list(chosen)}")
    return list(chosen)


def draw(
    layers: list[dict[str, Magnitudes]], title: str, chosen: Sequence[int] | None = None
) -> tuple[Any, dict]:
    """(figure, what it shows): a row per chosen layer, see `check_layers`: maps, and norms.

    Arrays are named side.layer.what: absolute f32[tokens, channels] and norms f64[tokens].
    """
    chosen = check_layers(chosen, len(layers))
    maps = [side for side in layers[0] if side != "rotated_keys"]  # RoPE keeps norms
    figure = plots.new_figure(11, 0.6 + 2.7 * len(chosen))
    from matplotlib import ticker
    from matplotlib.colors import LogNorm

    grid = figure.subplots(
        len(chosen), 3, squeeze=False, gridspec_kw=dict(width_ratios=(1, 1, 0.9))
    )
    data: dict[str, np.ndarray] = {}
    for row, layer in zip(grid, chosen, strict=True):
        for axes, side in zip(row, maps, strict=False):
            found = layers[layer][side]
            low, high = np.quantile(found.absolute, [0.05, 0.999])
            scale = None  # of zeros
            if high > 0:
                scale = LogNorm(max(low, high * 1e-4, np.finfo(np.float32).tiny), max(high, 1e-30))
            # A pixel shows the mean of what it covers; neighbours are not blended into each other.
            image = axes.imshow(
                found.absolute, aspect="auto", cmap=plots.MAP, norm=scale,
                interpolation="antialiased", interpolation_stage="data",
            )  # fmt: skip
            bar = figure.colorbar(image, ax=axes, pad=0.02)
            bar.ax.tick_params(labelsize=8)
            axes.set_title(f"layer {layer}: |{plots.side_label(side, layers[0])}|", fontsize=10)
            axes.set_xlabel("channel")
            axes.set_ylabel("token")
            row[2].plot(
                1 + np.arange(len(found.norms)), found.norms, color=plots.SIDES[side][1],
                linewidth=1, label=side, marker="o", markevery=[0], markersize=5,
            )  # fmt: skip
            data[f"{side}.{layer}.absolute"] = found.absolute
            data[f"{side}.{layer}.norms"] = found.norms
        row[2].set_xscale("log")
        row[2].xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        if plots.logarithmic(row[2]):
            row[2].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            row[2].yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            row[2].yaxis.set_minor_formatter(ticker.NullFormatter())
        row[2].set_title(f"layer {layer}: norm of every token", fontsize=10)
        row[2].set_xlabel("position (the first is 1)")
        row[2].legend(fontsize=8, frameon=False)
        plots.tidy(row[2])
    figure.suptitle(f"{title}: magnitudes of keys and values", fontsize=11)
    return figure, data
