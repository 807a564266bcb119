"""How far a quantized cache moves the model's predictions: KL(full precision || scheme).

The most sensitive measure there is: perplexity asks for one token's probability, in which errors of
both signs cancel, the KL divergence for all of them. It is 0 if and only if nothing has changed,
and needs no labels; both models read the same windows (`nqkv_jax.evaluation.windows`).

    divergence(lm, text, scheme="nqkv", window=1024)
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.decoded import DecodedView
from nqkv_jax.evaluation.perplexity import exp
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe, tokens_sha256
from nqkv_jax.evaluation.windows import mean_of, standard_error, windows
from nqkv_jax.plan import AbstractCaches

# Positions whose distributions are compared at a time: two arrays [_BLOCK, V] beside the logits.
_BLOCK = 64

# Of one prediction each: KL in nats, whether the likeliest token is the same one, and the negative
# log-likelihoods of the token that came, in full precision and with the scheme.
FIELDS = ("kl", "same", "full_nll", "nll")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceResult:
    """What was measured, and how. Errors are standard errors over windows; NaN for one window.

    Attributes:
      kl, kl_error: mean KL(full precision || scheme), in nats per token.
      kl_median, kl_p99: quantiles over tokens.
      top1, top1_error: share of tokens at which both predict the same token.
      nll, full_nll: mean negative log-likelihood of the text with the scheme, and without a cache.
      nll_increase, nll_increase_error: their difference; paired, as both read the same text.
      perplexity, full_perplexity: their exponentials.
      tokens, text_tokens, windows, window, stride: as in `PerplexityResult`.
      scheme, model, dtype, cache_dtype, stored_bits, seconds: likewise.
    """

    kl: float
    kl_error: float
    kl_median: float
    kl_p99: float
    top1: float
    top1_error: float
    nll: float
    full_nll: float
    nll_increase: float
    nll_increase_error: float
    perplexity: float
    full_perplexity: float
    tokens: int
    text_tokens: int
    windows: int
    window: int
    stride: int
    scheme: str
    model: str
    dtype: str
    cache_dtype: str
    stored_bits: float
    seconds: float


def divergence(
    lm: LanguageModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    scheme: str | schemes.Scheme,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    cache_dtype: Any = None,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> DivergenceResult:
    """Compares the model's predictions through a cache with those without one.

    Every token of a window is predicted as decoding would predict it from the scheme's cache, as
    `perplexity` does; and once more without a cache, in the model's own precision. Compiles once.

    Args:
      lm: the model.
      text: a string, encoded without special tokens; or token ids.
      scheme: how keys and values are cached.
      window, stride, max_tokens: see `nqkv_jax.evaluation.windows`.
      cache_dtype: of what the cache keeps in full precision; default the model's.
      progress: a bar on stderr; None: if that is a terminal.
      resume: a file to which every finished window is added; those that it holds are not computed
        again.

    Raises:
      ValueError: the sizes are wrong, the text has fewer than two tokens, the scheme does not fit
        the model, or `resume` holds another run.
    """
    scheme = schemes.get(scheme)
    dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
    bits = AbstractCaches(lm.config, scheme, dtype).stored_bits
    scheme.check_model(lm)
    text = windows("kl", lm, text, size=window, stride=stride, max_tokens=max_tokens)
    record = Record(
        resume, kind="kl", unit="window", count=len(text),
        setting=lambda: describe(
            lm, scheme, dtype, window=window, stride=text.stride, text_tokens=len(text.tokens),
            text_sha256=tokens_sha256(text.tokens),
        ),
    )  # fmt: skip
    compare = comparer(lm, scheme, dtype)
    disable = None if progress is None else not progress
    with tqdm.tqdm(
        total=len(text), initial=len(record.entries), desc=str(scheme), unit="window",
        disable=disable,
    ) as bar:  # fmt: skip
        for index in record:
            began = time.perf_counter()
            found = compare(lm.params, text.padded(index)[0])
            found = {name: text.scored(index, a).tolist() for name, a in found.items()}
            record.add(**found, seconds=time.perf_counter() - began)
            bar.set_postfix_str(f"KL {_mean(_values(record, 'kl')):.4g}", refresh=False)
            bar.update()
    return _result(
        record, text_tokens=len(text.tokens), windows=len(text), window=window, stride=text.stride,
        scheme=str(scheme), model=lm.name, dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name,
        stored_bits=bits,
    )  # fmt: skip


def comparer(
    lm: LanguageModel, scheme: schemes.Scheme, dtype: Any
) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """A function of parameters and tokens i32[S] that gives each of `FIELDS` as f64[S - 1].

    Element i belongs to the prediction of token i + 1.
    """
    view = DecodedView(scheme=scheme, num_layers=lm.config.num_layers, dtype=dtype)

    @jax.jit
    def compare(params, tokens):
        full, _ = lm.apply(params, tokens[None])
        ours, _ = lm.apply(params, tokens[None], view)
        return _compare(full[0], ours[0], tokens)

    def run(params, tokens):
        return {name: np.asarray(a, np.float64) for name, a in compare(params, tokens).items()}

    return run


def _compare(full: jax.Array, ours: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    """`FIELDS` from logits [S, V], a block of positions at a time."""
    size = tokens.size - 1
    block = min(_BLOCK, size)
    # The last block is moved back to fit; what two blocks compute is equal.
    starts = jnp.minimum(jnp.arange(-(-size // block)) * block, size - block)

    def one(start):
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block).astype(jnp.float32)
        targets = jax.lax.dynamic_slice_in_dim(tokens, start + 1, block)[:, None]
        p, q = jax.nn.log_softmax(cut(full)), jax.nn.log_softmax(cut(ours))
        chosen = lambda a: -jnp.take_along_axis(a, targets, axis=1)[:, 0]
        same = jnp.argmax(p, axis=1) == jnp.argmax(q, axis=1)
        return dict(
            kl=jnp.sum(_kl_terms(p, q), axis=1), same=same.astype(jnp.float32), full_nll=chosen(p),
            nll=chosen(q),
        )  # fmt: skip

    blocks = jax.lax.map(one, starts)  # of [blocks, block]
    row = jnp.arange(size)
    index = row // block
    return {name: a[index, row - starts[index]] for name, a in blocks.items()}


def _kl_terms(p: jax.Array, q: jax.Array) -> jax.Array:
    """Terms whose sum over the last axis is KL(exp(p) || exp(q)), from log-probabilities.

    exp(q) - exp(p), which sums to 0, is added to exp(p) (p - q): no term is then negative, and a
    divergence far below the rounding error of the plain sum is still measured.
    """
    d = q - p
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))  # expm1(d) - d
    small = jnp.exp(p) * series
    terms = jnp.where(jnp.abs(d) < 0.1, small, jnp.exp(q) - jnp.exp(p) - jnp.exp(p) * d)
    # What full precision rules out, whatever the scheme makes of it.
    return jnp.where(p == -jnp.inf, jnp.exp(q), terms)


def _values(record: Record, field: str) -> list[np.ndarray]:
    """One of `FIELDS`, by window."""
    return [np.asarray(entry[field]) for entry in record.entries]


def _mean(windows: Sequence[np.ndarray]) -> float:
    return mean_of([float(w.sum()) for w in windows], [w.size for w in windows])


def _error(windows: Sequence[np.ndarray]) -> float:
    return standard_error([float(w.sum()) for w in windows], [w.size for w in windows])


def _result(record: Record, **how: Any) -> DivergenceResult:
    kl, same, full, ours = (_values(record, field) for field in FIELDS)
    increase = [b - a for a, b in zip(full, ours, strict=True)]
    tokens = np.concatenate(kl)
    # Quantiles of NaN are NaN, but NumPy would warn.
    median, p99 = (np.nan, np.nan) if np.isnan(tokens).any() else np.quantile(tokens, [0.5, 0.99])
    return DivergenceResult(
        kl=_mean(kl), kl_error=_error(kl), kl_median=float(median), kl_p99=float(p99),
        top1=_mean(same), top1_error=_error(same), nll=_mean(ours), full_nll=_mean(full),
        nll_increase=_mean(increase), nll_increase_error=_error(increase),
        perplexity=exp(_mean(ours)), full_perplexity=exp(_mean(full)), tokens=tokens.size,
        seconds=record.seconds, **how,
    )  # fmt: skip
