"""Perplexity as decoding with a quantized cache would see it.

perplexity = exp(mean NLL) over all scored tokens of a text, which is read in windows:
`nqkv_jax.evaluation.windows`.

    perplexity(lm, text, scheme="nqkv", window=1024)             # a window at a time, in parallel
    decode_perplexity(lm, text, scheme="nqkv", window=1024)      # token by token: same, and slow
"""

import dataclasses
import math
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
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe, tokens_sha256
from nqkv_jax.evaluation.windows import mean_of, standard_error, windows
from nqkv_jax.plan import AbstractCaches, cache_sizes

# Positions whose log-softmax is taken at a time, so that logits [S, V] exist once and no more.
_BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """What was measured, and how.

    Attributes:
      perplexity: exp(nll); infinite or NaN if the model broke down.
      nll: mean negative log-likelihood, in nats per scored token.
      standard_error: of `nll`, from its scatter over windows; NaN for one window.
      tokens: scored tokens.
      text_tokens: tokens of the text that were read.
      windows: how many windows that took.
      window, stride: tokens per window, and from one window to the next.
      scheme, model: their names.
      dtype, cache_dtype: of the model, and of what its cache keeps in full precision.
      stored_bits: per element of the body of a long cache, all that is stored counted.
      through_cache: whether a real cache was filled token by token.
      seconds: of computing, compilation included, earlier runs that were resumed included.
    """

    perplexity: float
    nll: float
    standard_error: float
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
    through_cache: bool
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """Perplexity one standard error of the NLL below and above."""
        return exp(self.nll - self.standard_error), exp(self.nll + self.standard_error)


def perplexity(
    lm: LanguageModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    scheme: str | schemes.Scheme = "none",
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    cache_dtype: Any = None,
    through_cache: bool = False,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> PerplexityResult:
    """Perplexity of a text, every token predicted from the cache that decoding would have then.

    Every query sees the tokens that the scheme has encoded by then as decoded, and all others in
    full precision; `DecodedView` computes that for a whole window at once. Compiles once.

    Args:
      lm: the model.
      text: a string, encoded without special tokens; or token ids.
      scheme: how keys and values are cached.
      window: tokens that the model reads at once.
      stride: from one window to the next; default `window`, so that they do not overlap. A smaller
        one gives every token more context: after the first window only the last `stride` tokens of
        each are scored, and every token of the text is scored once.
      max_tokens: how many tokens of the text are used; None for all.
      cache_dtype: of what the cache keeps in full precision; default the model's.
      through_cache: fill a real cache token by token instead (see `decode_perplexity`).
      progress: a bar on stderr; None: if that is a terminal.
      resume: a file to which every finished window is added. If it holds windows of the same run
        already, they are not computed again.

    Raises:
      ValueError: the sizes are wrong, the text has fewer than two tokens, the scheme does not fit
        the model, or `resume` holds another run.
    """
    scheme = schemes.get(scheme)
    dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
    # Before the first token is read, so that a scheme that does not fit fails at once.
    bits = AbstractCaches(lm.config, scheme, dtype).stored_bits
    scheme.check_model(lm)
    text = windows(
        "perplexity", lm, text, size=window, stride=stride, max_tokens=max_tokens
    )  # fmt: skip
    record = Record(
        resume, kind="perplexity", unit="window", count=len(text),
        setting=lambda: describe(
            lm, scheme, dtype, window=window, stride=text.stride, through_cache=through_cache,
            text_tokens=len(text.tokens), text_sha256=tokens_sha256(text.tokens),
        ),
    )  # fmt: skip
    score = (_sequential if through_cache else _parallel)(lm, scheme, dtype, window)
    params = lm.params
    disable = None if progress is None else not progress
    sums = lambda: ([w["nll"] for w in record.entries], [w["tokens"] for w in record.entries])
    with tqdm.tqdm(
        total=len(text),
        initial=len(record.entries),
        desc=str(scheme),
        unit="window",
        disable=disable,
    ) as bar:
        for index in record:
            began = time.perf_counter()
            nll = np.asarray(score(params, *text.padded(index)), np.float64)
            nll = text.scored(index, nll)
            record.add(nll=float(nll.sum()), tokens=nll.size, seconds=time.perf_counter() - began)
            bar.set_postfix_str(f"ppl {exp(mean_of(*sums())):.3f}", refresh=False)
            bar.update()
    nll = mean_of(*sums())
    return PerplexityResult(
        perplexity=exp(nll), nll=nll, standard_error=standard_error(*sums()),
        tokens=sum(w["tokens"] for w in record.entries), text_tokens=len(text.tokens),
        windows=len(text), window=window, stride=text.stride, scheme=str(scheme), model=lm.name,
        dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name, stored_bits=bits,
        through_cache=through_cache, seconds=record.seconds,
    )  # fmt: skip


def decode_perplexity(
    lm: LanguageModel, text: str | Sequence[int] | np.ndarray, **options: Any
) -> PerplexityResult:
    """`perplexity` by definition: token by token through a real cache, in one jitted loop.

    Takes the same options. Hundreds of times slower; it is what `perplexity` is tested against.
    """
    return perplexity(lm, text, **options, through_cache=True)


def exp(nll: float) -> float:
    """Of a mean NLL; infinite where that is more than a float can hold."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


Score = Callable[[Any, np.ndarray, int], jax.Array]


def _parallel(lm: LanguageModel, scheme: schemes.Scheme, dtype: Any, window: int) -> Score:
    """NLL f32[window - 1] of tokens 1.. of i32[window], all at once."""
    view = DecodedView(scheme=scheme, num_layers=lm.config.num_layers, dtype=dtype)

    @jax.jit
    def score(params, tokens):
        logits, _ = lm.apply(params, tokens[None], view)
        return _nll(logits[0], tokens)

    # Padding comes last and no token sees what comes after it: the length does not matter here.
    return lambda params, tokens, length: score(params, tokens)


def _sequential(lm: LanguageModel, scheme: schemes.Scheme, dtype: Any, window: int) -> Score:
    """The same through a cache; only the first `length` tokens, what comes after them is 0."""

    @jax.jit
    def score(params, tokens, length):
        cache = scheme.init(**cache_sizes(lm.config), batch=1, max_len=window, dtype=dtype)

        def step(i, carry):
            cache, nll = carry
            token, target = tokens[i], tokens[i + 1]
            logits, cache = lm.apply(params, token[None, None], cache, last_only=True)
            logits = logits[0].astype(jnp.float32)
            return cache, nll.at[i].set(jax.nn.logsumexp(logits) - logits[target])

        nll = jnp.zeros(window - 1, jnp.float32)
        return jax.lax.fori_loop(0, length - 1, step, (cache, nll))[1]

    return lambda params, tokens, length: score(params, tokens, np.int32(length))


def _nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[S - 1]: -log p(tokens[i + 1] | tokens[: i + 1]) from logits [S, V]."""
    size = tokens.size - 1
    block = min(_BLOCK, size)
    # The last block is moved back to fit; what two blocks compute is equal.
    starts = jnp.minimum(jnp.arange(-(-size // block)) * block, size - block)

    def one(start, nll):
        rows = jax.lax.dynamic_slice_in_dim(logits, start, block).astype(jnp.float32)
        targets = jax.lax.dynamic_slice_in_dim(tokens, start + 1, block)
        chosen = jnp.take_along_axis(rows, targets[:, None], axis=1)[:, 0]
        return jax.lax.dynamic_update_slice_in_dim(
            nll, jax.nn.logsumexp(rows, axis=1) - chosen, start, axis=0
        )

    return jax.lax.fori_loop(
        0, starts.size, lambda i, nll: one(starts[i], nll), jnp.zeros(size, jnp.float32)
    )
