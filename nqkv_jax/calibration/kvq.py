"""Scores that say which layer's keys and values deserve bits, and the allocation by them (KVQ).

    weight_frobenius, weight_spectral   norms of the projections W_K and W_V: the paper's
    activation                          mean squared norm of the keys and values of a text
    sensitivity                         how far predictions move (KL divergence, nats per token)
                                        if only this layer's keys or values are quantized

The first three are turned into errors by a law err(b): 4^-b (the paper's) or the measured error of
the quantizer on normal data. The last one *is* the error at every width. It is the only one that
knows that errors of keys and of values do harm of different kinds, and takes minutes.

Source: Hariri et al. (2025), Quantize What Counts, arXiv 2502.15075. Norms of weights mislead where
keys are normalised after the projection (Qwen3), so the default is `activation`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax.allocation import LADDER, Allocation, check_budget, error_table, paper_error
from nqkv_jax.calibration import artifact
from nqkv_jax.calibration.recorder import Recorder
from nqkv_jax.checks import one_of, whole_numbers
from nqkv_jax.evaluation.windows import encode, opened
from nqkv_jax.partial import attend_new
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.schemes.base import LayerShape
from nqkv_jax.schemes.kvq import BACKENDS
from nqkv_jax.stand_in import StandIn

SCORES = ("activation", "weight_frobenius", "weight_spectral", "sensitivity")
TEXT_SCORES = ("activation", "sensitivity")
LAWS = ("measured", "paper")


def calibrate(
    lm: Any,
    tokens: np.ndarray | None = None,
    *,
    budget: float,
    score: str = "activation",
    law: str = "measured",
    backend: str = "quanto",
    group_size: int = 64,
    ladder: Sequence[int] = LADDER,
    progress: bool | None = None,
) -> Allocation:
    """Bits for every layer's keys and values, `budget` on average.

    Args:
      lm: a language model as `nqkv_jax.models` loads it.
      tokens: i32[tokens], a text; not needed for the norms of weights.
      budget: bits per number, without scales and zero points.
      score: one of `SCORES`.
      law: "measured" or "paper", how errors fall with the width; not for "sensitivity".
      backend, group_size: how the cache will encode, as in the scheme `kvq`.
      ladder: widths to choose from.
      progress: a bar on stderr for "sensitivity"; None: if that is a terminal.

    Raises: ValueError for settings that do not go together or do not fit the model.
    """
    quantizers = check(
        lm, tokens, budget=budget, score=score, law=law, backend=backend, group_size=group_size,
        ladder=ladder,
    )  # fmt: skip
    if score == "sensitivity":
        errors = sensitivity(lm, tokens, tuple(quantizers.values()), progress=progress)
    else:
        if score == "activation":
            sides = record(lm, tokens)
            weights = [[mean_square_norm(x) for x in pair] for pair in zip(*sides, strict=True)]
        else:
            order = "fro" if score == "weight_frobenius" else 2
            weights = [[np.linalg.norm(w, order) ** 2 for w in pair] for pair in projections(lm)]
        measured = lambda bits: normal_error(quantizers[bits], group_size)
        table = error_table(np.ravel(weights), ladder, paper_error if law == "paper" else measured)
        errors = table.reshape(-1, 2, len(ladder))
    about = dict(model=lm.name, fingerprint=artifact.fingerprint(lm.params), score=score)
    return Allocation.of_errors(errors, budget=budget, ladder=ladder, **about)


def check(
    lm: Any,
    tokens: np.ndarray | None = None,
    *,
    budget: float,
    score: str = "activation",
    law: str = "measured",
    backend: str = "quanto",
    group_size: int = 64,
    ladder: Sequence[int] = LADDER,
) -> dict[int, Quantizer]:
    """The quantizers that `calibrate` chooses from, by bits; takes and raises what that does."""
    one_of("calibrate kvq: score", score, SCORES)
    one_of("calibrate kvq: law", law, LAWS)
    one_of("calibrate kvq: backend", backend, BACKENDS)
    for width in ladder:
        whole_numbers("calibrate kvq", width=width)
    check_budget(budget, ladder)
    if score in TEXT_SCORES:
        if tokens is None:
            raise ValueError(f"calibrate kvq: score {score} is measured on a text; got none")
        check_tokens(lm, tokens)
    shape = LayerShape(num_kv_heads=lm.config.num_kv_heads, head_dim=lm.config.head_dim)
    layers = {
        bits: BACKENDS[backend](bits=bits, group_size=group_size, residual=0)(shape)
        for bits in ladder
    }
    for layer in layers.values():
        layer.check(shape)
    return {bits: layer.key for bits, layer in layers.items()}


def projections(lm: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(W_K, W_V) of every layer, f32[model width, num_kv_heads * head_dim] each.

    Biases, and norms of keys after the projection, are not in them.

    Raises: ValueError if `lm` is not built like the models of `nqkv_jax.models`.
    """
    size = lm.config.num_kv_heads * lm.config.head_dim
    try:
        # Both families keep the maps to queries, keys and values in one kernel, in this order.
        kernels = [np.asarray(layer.qkv.kernel[...], np.float32) for layer in lm.model.layers]
    except AttributeError as error:
        raise ValueError(
            "calibrate kvq: norms of weights need a model of nqkv_jax.models, whose layers have a "
            f"kernel `qkv`; got {type(lm).__name__} ({error}). Use score=activation"
        ) from error
    return [(kernel[:, -2 * size : -size], kernel[:, -size:]) for kernel in kernels]


def record(lm: Any, tokens: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The keys, before RoPE, and the values of a text: f32[tokens, heads, head_dim] per layer."""

    @jax.jit
    def run(params, tokens):
        return lm.apply(params, tokens[None], Recorder(), last_only=True)[1].layers

    layers = run(lm.params, jnp.asarray(check_tokens(lm, tokens)))
    return tuple([np.asarray(x[0], np.float32) for x in side] for side in zip(*layers, strict=True))


def mean_square_norm(x: np.ndarray) -> float:
    """Mean over tokens of ||x_t||^2, for x [tokens, heads, head_dim]; RoPE does not change it."""
    return float(np.mean(np.sum(np.square(x, dtype=np.float64), axis=(1, 2))))


def normal_error(quantizer: Quantizer, group_size: int, groups: int = 4096) -> float:
    """Mean squared error on N(0, 1), in groups of `group_size` with scales of their own."""
    x = np.random.default_rng(0).standard_normal((1, groups, 1, group_size), np.float32)
    decoded = jax.jit(lambda x: round_trip(quantizer, x))(x)
    return float(np.mean(np.square(np.asarray(decoded, np.float64) - x)))


def round_trip(quantizer: Quantizer, x: jax.Array) -> jax.Array:
    """`x` [B, S, Hkv, D], every token encoded and decoded; for per-token quantizers."""

    def one(row):
        context = Context()
        return quantizer.dequantize(quantizer.quantize(row[None], context), context, row.dtype)[0]

    return jax.vmap(jax.vmap(one))(x)


def sensitivity(
    lm: Any,
    tokens: np.ndarray,
    quantizers: Sequence[Quantizer],
    *,
    progress: bool | None = None,
) -> np.ndarray:
    """KL divergence of the predictions if one side of one layer is quantized, in nats per token.

    Every token of that side is seen as decoded, the others exactly; keys are encoded after RoPE.

    Returns: f64[layers, 2, quantizers], keys before values; not negative.
    """
    tokens, layers = jnp.asarray(check_tokens(lm, tokens)), lm.config.num_layers

    def log_probabilities(params, layer, branch):
        view = OneSideQuantized(quantizers=tuple(quantizers), layer=layer, branch=branch)
        logits, _ = lm.apply(params, tokens[None], view)
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    @jax.jit
    def divergence(params, exact, layer, branch):
        moved = log_probabilities(params, layer, branch)
        return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - moved), axis=-1))

    exact = jax.jit(log_probabilities)(lm.params, np.int32(0), np.int32(0))
    errors = np.zeros((layers, 2 * len(quantizers)))
    disable = None if progress is None else not progress
    with tqdm.tqdm(total=errors.size, desc="sensitivity", disable=disable) as bar:
        for layer, branch in np.ndindex(*errors.shape):
            at = np.int32(layer), np.int32(branch + 1)
            errors[layer, branch] = divergence(lm.params, exact, *at)
            bar.update()
    # A divergence is not negative; what is computed may be, by roundings.
    return np.maximum(errors, 0).reshape(layers, 2, len(quantizers))


def check_tokens(lm: Any, tokens: np.ndarray) -> np.ndarray:
    """i32[tokens]; ValueError unless the model can read them at once."""
    tokens = np.asarray(opened(lm, encode("calibrate kvq", lm, tokens)), np.int32)
    longest = lm.config.max_positions
    if not 2 <= tokens.size <= longest:
        raise ValueError(
            f"calibrate: expected 2 to {longest} tokens, which {lm.name} can read at once; got "
            f"{tokens.size}"
        )
    return tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OneSideQuantized(StandIn):
    """Stands in for a cache: only the keys or values of one layer are quantized.

    Which ones is data, so that one compiled program serves all.

    Attributes:
      quantizers: per-token quantizers.
      layer: i32[].
      branch: i32[]; 0 for nothing, 1 + i for keys and 1 + n + i for values with the i-th of n
        quantizers.
    """

    quantizers: tuple[Quantizer, ...]
    layer: jax.Array
    branch: jax.Array

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
        k = k if rotary is None else rotary(k, positions)
        branches = [lambda k, v: (k, v)]
        for quantizer in self.quantizers:
            branches.append(lambda k, v, quantizer=quantizer: (round_trip(quantizer, k), v))
        for quantizer in self.quantizers:
            branches.append(lambda k, v, quantizer=quantizer: (k, round_trip(quantizer, v)))
        branch = jnp.where(self.layer == layer, self.branch, 0)
        k, v = jax.lax.switch(branch, branches, k, v)
        valid = jnp.ones(k.shape[:2], jnp.bool_)
        return attend_new(q, k.astype(q.dtype), v, positions, valid, window, soft_cap), self
