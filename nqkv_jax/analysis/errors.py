"""What schemes do to the keys, the values and the attention of every layer of a model on a text.

Every layer gets the exact activations, so that a figure is this layer's own and not the sum of what
happened below it. Errors are relative, sum |x - x'|^2 / sum |x|^2 (NMSE).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.analysis import plots
from nqkv_jax.analysis.activations import LayerActivations, check_tokens, record
from nqkv_jax.body import decode_groups
from nqkv_jax.decoded import DecodedView
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.partial import attend_new
from nqkv_jax.plan import AbstractCaches
from nqkv_jax.schemes.base import LayerScheme, LayerShape, Scheme
from nqkv_jax.side import Side, body_capacity

ROUNDING = 1e-12  # relative squared errors of float32 arithmetic are below it


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """Of one scheme in one layer, relative squared errors.

    Attributes:
      keys: of the encoded keys, after RoPE.
      values: of the encoded values.
      output: of what attention returns, all queries, each seeing what decoding would show it:
        sinks and the latest tokens exactly, where the scheme keeps them.
    """

    keys: float
    values: float
    output: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchemeErrors:
    """Attributes:
    scheme: its string form.
    stored_bits: per element of the body of a long cache.
    layers: one entry each.
    """

    scheme: str
    stored_bits: float
    layers: tuple[LayerError, ...]

    def median(self, what: str) -> float:
        """Over layers, of "keys", "values" or "output"."""
        return float(np.median([getattr(layer, what) for layer in self.layers]))


def scheme_errors(
    lm: LanguageModel,
    tokens: np.ndarray,
    names: Sequence[str | Scheme],
    *,
    progress: bool | None = None,
) -> list[SchemeErrors]:
    """The errors of each scheme in every layer, on a text i32[tokens].

    Raises: ValueError if a scheme does not exist or does not fit the model, or would encode no
      token of so short a text.
    """
    found, dtype = [schemes.get(name) for name in names], jnp.dtype(lm.dtype)
    bits = check(lm, tokens, found)
    for scheme in found:
        scheme.check_model(lm)
    layers = record(lm, tokens)
    disable = None if progress is None else not progress
    results = []
    with tqdm.tqdm(total=len(found) * len(layers), desc="errors", disable=disable) as bar:
        for scheme, stored in zip(found, bits, strict=True):
            measure, errors = _Measure(scheme, len(layers), dtype), []
            for i, activations in enumerate(layers):
                errors.append(measure(activations, i))
                bar.update()
            results.append(
                SchemeErrors(scheme=str(scheme), stored_bits=stored, layers=tuple(errors))
            )
    return results


def check(lm: LanguageModel, tokens: np.ndarray, found: Sequence[Scheme]) -> list[float]:
    """The stored bits of schemes; raises what `scheme_errors` does, and reads no weights."""
    if not found:
        raise ValueError("errors: expected at least one scheme; got none")
    bits = [AbstractCaches(lm.config, scheme, lm.dtype).stored_bits for scheme in found]
    for scheme in found:
        _check_length(lm, scheme, len(check_tokens(lm, tokens)))
    return bits


def _layer_shape(config: Any, layer: int) -> LayerShape:
    return LayerShape(
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, layer=layer,
        num_layers=config.num_layers,
    )  # fmt: skip


def _check_length(lm: LanguageModel, scheme: Scheme, tokens: int) -> None:
    for layer in range(lm.config.num_layers):
        cached = scheme.layer(_layer_shape(lm.config, layer))
        for side, window in (("keys", cached.key_window), ("values", cached.value_window)):
            if not body_capacity(window, cached.sinks, tokens):
                raise ValueError(
                    f"errors: {scheme} encodes no {side} of a text of {tokens} tokens, so there is "
                    f"nothing to measure (sinks={cached.sinks}, {window}). Give a longer text"
                )


class _Measure:
    """(activations, layer) -> LayerError for one scheme.

    One compiled program for all layers that are cached alike: of 30 layers one, for most schemes.
    """

    def __init__(self, scheme: Scheme, num_layers: int, dtype: Any):
        self._scheme, self._num_layers, self._dtype = scheme, num_layers, dtype
        self._programs: list[tuple[LayerScheme, Any]] = []

    def __call__(self, activations: LayerActivations, layer: int) -> LayerError:
        num_kv_heads, head_dim = activations.keys.shape[1:]
        shape = LayerShape(num_kv_heads=num_kv_heads, head_dim=head_dim, layer=layer,
                           num_layers=self._num_layers)  # fmt: skip
        cached = self._scheme.layer(shape)
        # Calibrated quantizers hold arrays: every layer has its own, and they do not compare.
        plain = not jax.tree.leaves((cached.key, cached.value))
        program = next((p for s, p in self._programs if plain and s == cached), None)
        if program is None:
            view = DecodedView(scheme=self._scheme, num_layers=self._num_layers, dtype=self._dtype)
            program = jax.jit(functools.partial(_measure, cached, shape, view))
            if plain:
                self._programs.append((cached, program))
        return LayerError(**{name: float(x) for name, x in program(activations).items()})


def _measure(
    cached: LayerScheme, shape: LayerShape, view: DecodedView, x: LayerActivations
) -> dict[str, jax.Array]:
    size = len(x.keys)
    positions = jnp.arange(size)[None]
    rotate = lambda a: a if x.rotary is None else x.rotary(a, positions)
    cache = cached.init(shape, batch=1, max_len=size, dtype=view.dtype)
    keys = rotate(x.keys[None]) if cached.rotated else x.keys[None]
    queries = None
    if cache.wants_queries:
        queries = x.queries[None]
        if cached.rotated:
            heads = x.queries.reshape(1, size, -1, shape.head_dim)
            queries = rotate(heads).reshape(queries.shape)
    new = jnp.full(1, size, jnp.int32)
    cache = cache.append(
        keys.astype(view.dtype), x.values[None].astype(view.dtype), new, x.rotary, queries
    )
    exact = attend_new(
        x.rotated_queries, rotate(x.keys[None]), x.values[None], positions,
        jnp.ones((1, size), jnp.bool_), x.window, x.soft_cap,
    )  # fmt: skip
    seen, _ = view.attend(
        x.rotated_queries, x.keys[None], x.values[None], x.queries[None],
        layer=shape.layer, rotary=x.rotary, window=x.window, soft_cap=x.soft_cap,
    )  # fmt: skip
    return dict(
        keys=_body_error(cache.key, rotate(x.keys[None]), x.rotary),
        values=_body_error(cache.value, x.values[None], None),
        output=_relative(exact.output(), seen.output()),
    )


def _body_error(side: Side, exact: jax.Array, rotary: Any) -> jax.Array:
    """Of what is encoded of `exact` [1, S, Hkv, D], f32[]."""
    encoded = body_capacity(side.window, side.num_sinks, exact.shape[1])
    first = jnp.zeros((), jnp.int32)
    decoded = decode_groups(side, side.body, first, rotary=rotary, dtype=jnp.float32, folded=False)
    exact = exact[:, side.num_sinks : side.num_sinks + encoded]
    return _relative(exact, decoded[:, :encoded])


def _relative(exact: jax.Array, found: jax.Array) -> jax.Array:
    exact = exact.astype(jnp.float32)
    energy = jnp.sum(jnp.square(exact))
    # No energy, no error: 0 / 0 is what an all-zero layer would give.
    return jnp.sum(jnp.square(exact - found)) / jnp.where(energy > 0, energy, 1)


def draw(results: Sequence[SchemeErrors], title: str) -> tuple[Any, dict]:
    """(figure, what it shows): the errors of keys, values and attention outputs, by layer.

    Arrays are named what.scheme, such as "output.nqkv" f64[layers]. A scheme whose errors are those
    of float32 arithmetic, as `none`, is in the data only: it would flatten all others.
    """
    colors = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.SKY,
              plots.BLACK)  # fmt: skip
    markers = "os^Dv<>"
    figure = plots.new_figure(11, 4.6)
    data: dict[str, np.ndarray] = {}
    titles = dict(keys="keys, as encoded", values="values, as encoded", output="attention output")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (what, label) in zip(grid, titles.items(), strict=True):
        for i, result in enumerate(results):
            errors = np.array([getattr(layer, what) for layer in result.layers])
            data[f"{what}.{result.scheme}"] = errors
            if np.any(errors > ROUNDING):
                axes.plot(
                    errors, color=colors[i % 7], marker=markers[i % 7], markersize=3.5,
                    linestyle=("-", "--", ":")[i // 7 % 3], linewidth=1.2,
                    label=f"{result.scheme} ({result.stored_bits:.2f} bits)",
                )  # fmt: skip
        plots.logarithmic(axes)
        axes.set_title(label, fontsize=10)
        plots.by_layer(axes)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        plots.tidy(axes)
    grid[0].set_ylabel("relative squared error")
    # An error may be nothing in one panel, and something in another.
    handles = {line.get_label(): line for axes in grid for line in axes.lines}
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(f"{title}: error of every scheme, layer by layer", fontsize=11)
    return figure, data
