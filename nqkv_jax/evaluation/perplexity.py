"""Perplexity as decoding with a quantized cache would see it.

The text is cut into windows, each of which the model reads from scratch: no BOS token is put
before it, and its first token, of which nothing is known, is not scored. perplexity = exp(mean NLL)
over all scored tokens.

    perplexity(lm, text, scheme="nqkv", window=1024)             # a window at a time, in parallel
    decode_perplexity(lm, text, scheme="nqkv", window=1024)      # token by token: same, and slow

Source: the windows are those of Frantar et al. (2022), GPTQ, and of the KV papers after it; the
stride is Hugging Face's sliding-window recipe.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
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
from nqkv_jax.plan import AbstractCaches, cache_sizes

# Positions whose log-softmax is taken at a time, so that logits [S, V] exist once and no more.
_BLOCK = 128

_RECORD = "nqkv perplexity 1"  # kind and version of the resume file


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
        return _exp(self.nll - self.standard_error), _exp(self.nll + self.standard_error)


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
    stride = window if stride is None else stride
    _check_sizes(lm, window, stride, max_tokens)
    dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
    # Before the first token is read, so that a scheme that does not fit fails at once.
    bits = AbstractCaches(lm.config, scheme, dtype).stored_bits
    scheme.check_model(lm)
    tokens = _tokens(lm, text, max_tokens)

    spans = list(_spans(len(tokens), window, stride))
    setting = dict(
        model=lm.name, scheme=str(scheme), dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name,
        window=window, stride=stride, through_cache=through_cache, text_tokens=len(tokens),
        text_sha256=hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
    )  # fmt: skip
    record = _Record(resume, setting, spans)
    score = (_sequential if through_cache else _parallel)(lm, scheme, dtype, window)
    params = lm.params
    disable = None if progress is None else not progress
    with tqdm.tqdm(
        total=len(spans),
        initial=len(record.windows),
        desc=str(scheme),
        unit="window",
        disable=disable,
    ) as bar:
        for start, first, stop in spans[len(record.windows) :]:
            began = time.perf_counter()
            padded = np.zeros(window, np.int32)
            padded[: stop - start] = tokens[start:stop]
            nll = np.asarray(score(params, padded, stop - start), np.float64)
            # nll[i] belongs to token i + 1 of the window; what comes after `stop` is padding.
            nll = nll[first - start - 1 : stop - start - 1]
            record.add(nll=float(nll.sum()), tokens=nll.size, seconds=time.perf_counter() - began)
            bar.set_postfix_str(f"ppl {_exp(record.mean()):.3f}", refresh=False)
            bar.update()
    nll = record.mean()
    return PerplexityResult(
        perplexity=_exp(nll), nll=nll, standard_error=record.standard_error(), tokens=record.tokens,
        text_tokens=len(tokens), windows=len(spans), window=window, stride=stride,
        scheme=str(scheme), model=lm.name, dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name,
        stored_bits=bits, through_cache=through_cache,
        seconds=sum(w["seconds"] for w in record.windows),
    )  # fmt: skip


def decode_perplexity(
    lm: LanguageModel, text: str | Sequence[int] | np.ndarray, **options: Any
) -> PerplexityResult:
    """`perplexity` by definition: token by token through a real cache, in one jitted loop.

    Takes the same options. Hundreds of times slower; it is what `perplexity` is tested against.
    """
    return perplexity(lm, text, **options, through_cache=True)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _check_sizes(lm: LanguageModel, window: int, stride: int, max_tokens: int | None) -> None:
    longest = lm.config.max_positions
    if not 2 <= window <= longest:
        raise ValueError(
            f"perplexity: window must be between 2 and {longest}, the positions that "
            f"{lm.name} has; got {window}"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"perplexity: stride must be between 1 and window={window}; got {stride}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"perplexity: max_tokens must be at least 2, the first token is not "
            f"scored; got {max_tokens}"
        )


def _tokens(lm: LanguageModel, text: Any, max_tokens: int | None) -> np.ndarray:
    """i32[tokens]."""
    if isinstance(text, str):
        if lm.tokenizer is None:
            raise ValueError(
                f"perplexity: {lm.name} came without a tokenizer, so text must be "
                "token ids; got a string"
            )
        text = lm.tokenizer.encode(text, add_special_tokens=False)
    tokens = np.asarray(text)
    if tokens.size and (tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            "perplexity: text must be a string or integers [tokens]; got "
            f"{tokens.dtype} of shape {tokens.shape}"
        )
    tokens = tokens[:max_tokens]
    if tokens.size < 2:
        raise ValueError(
            f"perplexity: text must have at least 2 tokens, the first is not scored; "
            f"got {tokens.size}"
        )
    if tokens.min() < 0 or tokens.max() >= lm.config.vocab_size:
        raise ValueError(
            f"perplexity: token ids must be in [0, {lm.config.vocab_size}), the "
            f"vocabulary of {lm.name}; got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)


def _spans(size: int, window: int, stride: int):
    """(start, first, stop) of every window: tokens [start, stop), of which [first, stop) count.

    8 tokens, window 4, stride 2: (0, 1, 4), (2, 4, 6), (4, 6, 8).
    """
    start = 0
    while True:
        first = start + max(1, window - stride if start else 1)
        if first >= size:
            return
        yield start, first, min(start + window, size)
        start += stride


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


class _Record:
    """The windows that are done, and their copy on disk.

    JSON lines: what the run is, then {"window", "nll", "tokens", "seconds"} of every window in
    order. A line is on disk before the next window begins; the last one may be torn, and is then
    dropped.
    """

    def __init__(self, path: str | os.PathLike | None, setting: dict, spans: list):
        self.windows: list[dict] = []
        self._path = None if path is None else pathlib.Path(path)
        if self._path is None:
            return
        header = dict(record=_RECORD, **setting)
        whole = self._read(header) if self._path.is_file() else b""
        if len(self.windows) > len(spans):
            raise self._wrong(
                f"must hold at most {len(spans)} windows; it holds {len(self.windows)}"
            )
        # Not only when something was torn: a file that cannot be written fails now, not later.
        with open(self._path, "ab") as file:
            file.truncate(len(whole))
            if not whole:
                file.write(json.dumps(header).encode() + b"\n")

    def _wrong(self, problem: str) -> ValueError:
        return ValueError(f"resume: {self._path} {problem}. Delete it, or name another file")

    def _read(self, header: dict) -> bytes:
        """Fills `windows`; returns the lines that are whole."""
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        # A file that begins like ours but has no whole line was torn in its header.
        if not whole and not json.dumps(header).encode().startswith(content):
            raise self._wrong("must be a record of a perplexity run; it is something else")
        for number, line in enumerate(whole.splitlines()):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise self._wrong(
                    f"must hold one JSON object per line; line {number + 1} is not: {error}"
                ) from error
            if number == 0:
                self._compare(entry, header)
            elif not isinstance(entry, dict) or entry.get("window") != number - 1:
                raise self._wrong(
                    f"must go on with window {number - 1} in line {number + 1}; got "
                    f"{line.decode(errors='replace')[:80]}"
                )
            else:
                self.windows.append(entry)
        return whole

    def _compare(self, entry: Any, header: dict) -> None:
        if not isinstance(entry, dict) or entry.get("record") != _RECORD:
            raise self._wrong("must be a record of a perplexity run; it is something else")
        if entry != header:
            differ = [
                f"{key}: {entry.get(key)!r} there, {header.get(key)!r} now"
                for key in header | entry
                if entry.get(key) != header.get(key)
            ]
            raise self._wrong(f"must hold the same run; these differ: {'; '.join(differ)}")

    def add(self, **entry: Any) -> None:
        entry = dict(window=len(self.windows), **entry)
        self.windows.append(entry)
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    @property
    def tokens(self) -> int:
        return sum(w["tokens"] for w in self.windows)

    def mean(self) -> float:
        return math.fsum(w["nll"] for w in self.windows) / self.tokens

    def standard_error(self) -> float:
        """Of the mean: tokens within a window are not independent, windows nearly are."""
        count, mean = len(self.windows), self.mean()
        if count < 2:
            return math.nan
        # The ratio estimator, as the last window may be shorter.
        squares = math.fsum((w["nll"] - mean * w["tokens"]) ** 2 for w in self.windows)
        return math.sqrt(squares * count / (count - 1)) / self.tokens
