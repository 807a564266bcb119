"""Singular values of the projections to keys and values, and of the keys and values themselves.

What decides, in the argument of KVQ, who gets the bits: ||K|| is larger than ||V||, as ||W_K|| is
larger than ||W_V||.

Source: Hariri et al. (2025), Quantize What Counts, arXiv 2502.15075, section 3.
"""

import dataclasses
from typing import Any

import numpy as np
import tqdm

from nqkv_jax.calibration.kvq import projections, record


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
        """(frobenius / spectral)^2: how many directions there are, weighted by their size."""
        return (self.frobenius / self.spectral) ** 2


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

    Raises: ValueError if the model cannot read so many tokens, or is built in another way.
    """
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
