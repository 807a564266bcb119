"""What KVQuant learns about a model: ranges of key channels, and codebooks of every layer.

Two passes over a few windows of text, one window at a time. The first finds the range of every
channel of the keys: exact percentiles over all tokens, for which only the largest and smallest
percent of each channel has to be kept. Only with these ranges can values be normalised, so the
second pass collects the normalised keys and values x_n in a histogram per layer, each weighted by
how much the loss depends on it:

    objective = sum F * s^2 * (x_n - Q(x_n))^2,    F = (d loss / d x)^2

s being the scale that x_n was divided by. Lloyd's algorithm then places the levels. Without the
outliers' slots the ranges are others, and so are the codebooks: both variants are made.

Source: Hooper et al. (2024), KVQuant, arXiv 2401.18079, section 3.3 and appendices; Q-Norm from its
first version. The released code leaves out s^2 ("fisher"), and takes percentiles over sinks too.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import codebooks
from nqkv_jax.calibration import artifact
from nqkv_jax.calibration.recorder import Recorder, loss_and_gradients, windows
from nqkv_jax.checks import one_of, whole_numbers
from nqkv_jax.quantizers.dense_sparse import slots_per_side, token_range

KIND = "kvquant 1"
_PARTIAL = "kvquant partial 1"
BITS = (2, 3, 4)
SIDES = ("key", "value")
VARIANTS = ("sparse", "full")  # ranges without the outliers, and of everything
WEIGHTS = ("scaled_fisher", "fisher", "none")
_LEAST = 32  # tokens: of fewer, nearly every number is the end of its channel's range
BINS = 4096  # of the histograms; against all values the objective changes by 3e-5 of itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the windows so far; `done` of 2 * samples passes over a window.

    Attributes:
      upper, lower: f32[layers, kept, hidden], the largest and smallest keys of each channel.
      histograms: f64[layers, 2 sides, 2 variants, 3, BINS], over x_n in [-1, 1]: how many, the sum
        of their weights w, and of w * x_n.
    """

    upper: np.ndarray
    lower: np.ndarray
    histograms: np.ndarray
    done: int = 0


def calibrate(
    lm: Any,
    text: str | Sequence[int],
    *,
    out: str | os.PathLike,
    samples: int = 16,
    seqlen: int = 2048,
    outliers: float = 0.01,
    sinks: int = 1,
    weights: str = "scaled_fisher",
    progress: bool | None = None,
) -> Statistics:
    """Calibrates a model and writes the file that `kvquant:calibration=FILE` reads.

    Beside it, while it works, there is a file FILE.partial with what was collected so far: the same
    call goes on from there.

    Args:
      lm: with the protocol of `nqkv_jax.evaluation`.
      text: a string, or token ids.
      out: the file.
      samples, seqlen: windows, spread evenly over the text, and tokens of each.
      outliers: share of all keys, and of all values, that will have a slot.
      sinks: first tokens of a window that are left out, as the cache keeps them exactly.
      weights: of the values in the objective: "scaled_fisher" F * s^2, "fisher" F, or "none".
      progress: a bar on stderr; None: if that is a terminal.

    Returns:
      What the codebooks were fitted to.

    Raises:
      ValueError: an argument is wrong, the text is too short, or FILE.partial is of another call.
    """
    config = lm.config
    texts = check(
        lm, text, samples=samples, seqlen=seqlen, outliers=outliers, sinks=sinks, weights=weights
    )
    setting = dict(
        model=lm.name, fingerprint=artifact.fingerprint(lm.params), num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, outliers=outliers, sinks=sinks,
        weights=weights, samples=samples, seqlen=seqlen,
        text_sha256=hashlib.sha256(texts.astype("<i4").tobytes()).hexdigest(),
    )  # fmt: skip
    partial = pathlib.Path(f"{pathlib.Path(out).expanduser()}.partial")
    statistics = _begin(partial, setting)
    collect = _Collector(lm, setting)
    bar = tqdm.tqdm(
        total=2 * samples, initial=statistics.done, desc="kvquant", unit="window",
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar:
        while statistics.done < 2 * samples:
            statistics = collect(statistics, texts[statistics.done % samples])
            arrays = {key: getattr(statistics, key) for key in ("upper", "lower", "histograms")}
            artifact.save(partial, _PARTIAL, arrays, dict(done=statistics.done, setting=setting))
            bar.update()
    artifact.save(out, KIND, _results(statistics, setting), setting)
    partial.unlink()
    return statistics


def check(
    lm: Any,
    text: str | Sequence[int],
    *,
    samples: int,
    seqlen: int,
    outliers: float = 0.01,
    sinks: int = 1,
    weights: str = "scaled_fisher",
) -> np.ndarray:
    """The windows i32[samples, seqlen] that `calibrate` reads; takes and raises what that does."""
    one_of("calibrate: weights", weights, WEIGHTS)
    whole_numbers("calibrate", samples=samples, seqlen=seqlen, sinks=sinks)
    if not 0 < outliers < 0.5 or not 0 <= sinks < seqlen - 1:
        raise ValueError(
            "calibrate: expected 0 < outliers < 0.5 and 0 <= sinks < seqlen - 1; got "
            f"outliers={outliers}, sinks={sinks}, seqlen={seqlen}"
        )
    texts = windows(lm, text, samples, seqlen)
    if samples * (seqlen - sinks) < _LEAST:
        raise ValueError(
            f"calibrate: expected at least {_LEAST} tokens in all windows, without their sinks; "
            f"got {samples * (seqlen - sinks)}"
        )
    return texts


def _begin(partial: pathlib.Path, setting: Mapping) -> Statistics:
    """What an interrupted call has left, or nothing yet."""
    if not partial.exists():
        layers, hidden = setting["num_layers"], setting["num_kv_heads"] * setting["head_dim"]
        kept = int(_tail(setting)) + 2
        return Statistics(
            upper=np.full((layers, kept, hidden), -np.inf, np.float32),
            lower=np.full((layers, kept, hidden), np.inf, np.float32),
            histograms=np.zeros((layers, len(SIDES), len(VARIANTS), 3, BINS)),
        )
    arrays, header = artifact.load_partial(partial, _PARTIAL, setting)
    return Statistics(done=header["done"], **{k: a.copy() for k, a in arrays.items()})


def _tail(setting: Mapping) -> float:
    """How far the percentiles are from the ends, in sorted values of a channel."""
    tokens = setting["samples"] * (setting["seqlen"] - setting["sinks"])
    return setting["outliers"] / 2 * (tokens - 1)


def key_ranges(statistics: Statistics, setting: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """zero and scale of every channel, f32[2 variants, layers, hidden], after the first pass."""
    tail = _tail(setting)
    near, share = int(tail), np.float32(tail - int(tail))
    upper = np.sort(statistics.upper, axis=1)[:, ::-1]
    lower = np.sort(statistics.lower, axis=1)
    percentile = lambda a: a[:, near] + share * (a[:, near + 1] - a[:, near])
    upper = np.stack([percentile(upper), upper[:, 0]])
    lower = np.stack([percentile(lower), lower[:, 0]])
    zero = upper / 2 + lower / 2
    # A channel that never moves has no width to divide by.
    least = np.float32(1e-6) * np.maximum(np.abs(zero), np.float32(1))
    return zero, np.maximum(upper / 2 - lower / 2, least)


class _Collector:
    """Adds one window to the statistics."""

    def __init__(self, lm: Any, setting: Mapping):
        self._setting, self._params = setting, lm.params
        weigh = setting["weights"] != "none"

        @jax.jit
        def record(params, tokens):
            layers = lm.apply(params, tokens[None], Recorder(), last_only=True)[1].layers
            return jax.tree.map(lambda a: a[0], layers)

        @jax.jit
        def record_gradients(params, tokens):
            return loss_and_gradients(lm, params, tokens)[1:]

        self._record = record
        self._record_gradients = record_gradients if weigh else lambda p, t: (record(p, t), None)

    def __call__(self, statistics: Statistics, tokens: np.ndarray) -> Statistics:
        first = statistics.done < self._setting["samples"]
        statistics = (self._add_ranges if first else self._add_histograms)(statistics, tokens)
        return dataclasses.replace(statistics, done=statistics.done + 1)

    def _add_ranges(self, statistics: Statistics, tokens: np.ndarray) -> Statistics:
        kept = statistics.upper.shape[1]
        for layer, (k, _) in enumerate(self._record(self._params, tokens)):
            k = np.asarray(k, np.float32)[self._setting["sinks"] :].reshape(-1, k[0].size)
            for own, sign in ((statistics.upper[layer], -1), (statistics.lower[layer], 1)):
                both = sign * np.concatenate([own, k])
                own[:] = sign * np.partition(both, kept - 1, axis=0)[:kept]
        return statistics

    def _add_histograms(self, statistics: Statistics, tokens: np.ndarray) -> Statistics:
        setting = self._setting
        hidden = statistics.upper.shape[2]
        zeros, scales = key_ranges(statistics, setting)
        recorded, gradients = self._record_gradients(self._params, tokens)
        flat = lambda a: a[setting["sinks"] :].reshape(-1, hidden).astype(jnp.float32)
        for layer, sides in enumerate(recorded):
            k, v = map(flat, sides)
            for i, variant in enumerate(VARIANTS):
                m = slots_per_side(setting["outliers"], hidden) if variant == "sparse" else 0
                pairs = (
                    _normalised_keys(k, zeros[i, layer], scales[i, layer]),
                    _normalised_values(v, m),
                )
                for side, (x, scale) in enumerate(pairs):
                    root = np.ones((), np.float32)
                    if gradients is not None:
                        root = np.asarray(flat(gradients[layer][side]))
                        root = root * np.asarray(scale) if "scaled" in setting["weights"] else root
                    _add(statistics.histograms[layer, side, i], np.asarray(x), root)
        return statistics


@jax.jit
def _normalised_keys(k, zero, scale):
    """x_n [tokens, hidden], NaN for outliers; and the scales [1, hidden]."""
    x = (k - zero[None]) / scale[None]
    # The scale is half the difference of two rounded numbers: the ends may be beyond 1 by as much.
    return jnp.where(jnp.abs(x) <= 1 + 1e-5, x, jnp.nan), scale[None]


@functools.partial(jax.jit, static_argnames="outliers")
def _normalised_values(v, outliers):
    """x_n [tokens, hidden], NaN for outliers; and the scales [tokens, 1]."""

    def token(v):
        zero, scale, index = token_range(v, outliers)
        scale = scale.astype(jnp.float32)
        # A token whose values are all alike says nothing about the levels.
        x = (v - zero.astype(jnp.float32)) / jnp.where(scale > 0, scale, jnp.nan)
        return x.at[index].set(jnp.nan), scale[None]

    return jax.vmap(token)(v)


def _add(histogram: np.ndarray, x: np.ndarray, root: np.ndarray) -> None:
    """Adds x_n, weighted by root^2, to f64[3, BINS]."""
    root = np.broadcast_to(root, x.shape)
    chosen = np.isfinite(x)
    x, weight = x[chosen], np.square(root[chosen].astype(np.float64))
    bins = np.clip(((x + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
    for row, w in zip(histogram, (None, weight, weight * x), strict=True):
        row += np.bincount(bins, w, BINS)


def fit_levels(histogram: np.ndarray, bits: int) -> np.ndarray:
    """f64[2^bits], of least weighted squared error for a histogram f64[3, BINS]."""
    _, weight, first = histogram
    chosen = weight > 0
    centres = first[chosen] / weight[chosen]
    return np.asarray(codebooks.fit(centres, bits, weight[chosen]).levels)


def normalised_levels(histogram: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Q-Norm: `levels` moved so that coding keeps mean and deviation, f64[2^bits]."""
    count = histogram[0]
    x = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    quantized = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    before, after = np.average([x, quantized], axis=1, weights=count)
    ratio = np.sqrt(
        np.average((x - before) ** 2, weights=count)
        / np.average((quantized - after) ** 2, weights=count)
    )
    return (levels - after) * ratio + before


def _results(statistics: Statistics, setting: Mapping) -> dict[str, np.ndarray]:
    """The arrays of the file, all f32: see `nqkv_jax.schemes.kvquant`."""
    shape = (setting["num_layers"], setting["num_kv_heads"], setting["head_dim"])
    arrays = {}
    for i, variant in enumerate(VARIANTS):
        for name, found in zip(("zero", "scale"), key_ranges(statistics, setting), strict=True):
            arrays[f"key.{name}.{variant}"] = found[i].reshape(shape)
        for side, where in enumerate(SIDES):
            histograms = statistics.histograms[:, side, i]
            for bits in BITS:
                levels = [fit_levels(h, bits) for h in histograms]
                moved = map(normalised_levels, histograms, levels)
                arrays[f"{where}.levels{bits}.{variant}"] = np.stack(levels).astype(np.float32)
                arrays[f"{where}.q_norm{bits}.{variant}"] = np.stack(list(moved)).astype(np.float32)
    return arrays
