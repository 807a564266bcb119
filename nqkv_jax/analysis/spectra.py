"""Singular values of the projections to keys and values, and of the keys and values themselves.

What decides, in the argument of KVQ, who gets the bits: ||K|| is larger than ||V||, as ||W_K|| is
larger than ||W_V||.

Source: Hariri et al. (2025), Quantize What Counts, arXiv 2502.15075, section 3.
"""

import dataclasses
from typing import Any

import numpy as np
import tqdm

from nqkv_jax.analysis import plots
from nqkv_jax.analysis.activations import check_tokens
from nqkv_jax.calibration.kvq import projections, record

# field of LayerSpectra -> (how it is called, its colour)
MATRICES = {
    "key_weight": ("W_K", plots.BLUE),
    "value_weight": ("W_V", plots.ORANGE),
    "keys": ("K", plots.BLUE),
    "values": ("V", plots.ORANGE),
}


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, largest first."""

    values: np.ndarray

    @property
    def spectral(self) -> float:
        """The largest."""
        return float(self.values[0])

    @property
    def frobenius(self) -> float:
        """The root of the sum of squares."""
        return float(np.sqrt(np.sum(np.square(self.values, dtype=np.float64))))

    @property
    def stable_rank(self) -> float:
        """(frobenius / spectral)^2: how many directions there are, weighted by their size.

        0 for a matrix of zeros, as its rank; of any other matrix it is between 1 and the rank.
        """
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpectra:
    """Of one layer.

    Attributes:
      key_weight, value_weight: W_K and W_V [model width, num_kv_heads * head_dim].
      keys, values: of a text, [tokens, num_kv_heads * head_dim], divided by sqrt(tokens): the
        Frobenius norm is the root of the mean squared norm of a token. RoPE changes the singular
        values of keys, but not this norm: they are taken before it.
    """

    key_weight: Spectrum
    value_weight: Spectrum
    keys: Spectrum
    values: Spectrum


def spectra(lm: Any, tokens: np.ndarray, *, progress: bool | None = None) -> list[LayerSpectra]:
    """The spectra of every layer of a model of `nqkv_jax.models`, on a text i32[tokens].

    Raises: ValueError if the model cannot read these tokens, or is built in another way.
    """
    tokens = check_tokens(lm, tokens)
    weights, (keys, values) = projections(lm), record(lm, tokens)

    def spectrum(matrix: np.ndarray) -> Spectrum:
        return Spectrum(np.linalg.svd(matrix, compute_uv=False))

    def of_tokens(x: np.ndarray) -> Spectrum:
        return spectrum(x.reshape(len(x), -1) / np.float32(np.sqrt(len(x))))

    disable = None if progress is None else not progress
    return [
        LayerSpectra(
            key_weight=spectrum(w_k),
            value_weight=spectrum(w_v),
            keys=of_tokens(k),
            values=of_tokens(v),
        )
        for (w_k, w_v), k, v in tqdm.tqdm(
            zip(weights, keys, values, strict=True),
            total=len(weights),
            desc="spectra",
            disable=disable,
        )
    ]


def draw(layers: list[LayerSpectra], title: str) -> tuple[Any, dict]:
    """(figure, what it shows): norms by layer, and how singular values fall off.

    Arrays are named matrix.what, such as "keys.frobenius" f64[layers]. Layers whose matrix is zero
    have no part in how singular values fall off; a "decay" of zeros says that all are.
    """
    figure = plots.new_figure(11, 4)
    weights, activations, decay = figure.subplots(1, 3)
    data: dict[str, np.ndarray] = {}
    marker = "o" if len(layers) == 1 else None  # a line needs two
    for matrix, (label, color) in MATRICES.items():
        found = [getattr(layer, matrix) for layer in layers]
        axes = weights if matrix.endswith("weight") else activations
        for norm, style in (("frobenius", "-"), ("spectral", ":")):
            norms = np.array([getattr(s, norm) for s in found])
            axes.plot(norms, style, marker=marker, color=color, label=f"{label}, {norm}")
            data[f"{matrix}.{norm}"] = norms
        values = np.stack([s.values for s in found])
        values = values[values[:, 0] > 0]
        mean = np.zeros(found[0].values.size)
        if len(values):
            # The geometric mean over layers, as each falls by factors.
            relative = np.maximum(values / values[:, :1], np.finfo(np.float32).tiny)
            mean = np.exp(np.log(relative).mean(axis=0))
        style = "--" if matrix.endswith("weight") else "-"
        decay.plot(mean, style, color=color, label=label)
        data[f"{matrix}.decay"] = mean
    weights.set_title("norms of the projections", fontsize=10)
    activations.set_title("norms of keys and values\n(root mean square over tokens)", fontsize=10)
    decay.set_title("singular values / the largest\n(geometric mean over layers)", fontsize=10)
    decay.set_xlabel("index")
    for axes in (weights, activations):
        plots.by_layer(axes)
    for axes in (weights, activations, decay):
        plots.logarithmic(axes)
        # Below the axes: inside, there is no place that is free for every model.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False
        )
        plots.tidy(axes)
    figure.suptitle(title, fontsize=11)
    return figure, data
