"""How long a generation stays what it would be in full precision.

From prompts out of a text, the model goes on greedily, in full precision and with a scheme. Two
things are measured: how many tokens both have in common before they part; and, as everything after
that compares different texts, KL(full precision || scheme) along the full-precision continuation,
which both read, by position. The second tells whether errors grow with the length.

Generation reads a prompt in one piece and in full precision, and then has its encoded keys and
values; for the divergence every token of the prompt, too, has seen those before it as decoding
would have.

    drift(lm, text, generate=generate, scheme="nqkv", prompt=128, length=256)
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.divergence import comparer
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe, tokens_sha256
from nqkv_jax.evaluation.retrieval import Generate
from nqkv_jax.evaluation.windows import encode, mean_of, opening, standard_error
from nqkv_jax.plan import AbstractCaches
from nqkv_jax.words import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftBucket:
    """Positions [start, stop) of the continuation, 0 being its first token.

    Attributes:
      kl, kl_error: mean KL in nats per token, and its standard error over prompts; NaN where no
        continuation is so long, and the error for one prompt.
      tokens: over which that is.
    """

    start: int
    stop: int
    kl: float
    kl_error: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftResult:
    """What was measured, and how.

    Attributes:
      common, common_error: mean number of tokens before both continuations part, and its standard
        error over prompts. Continuations that never part count with their length, so that the mean
        is a lower bound.
      common_median: over prompts.
      first_tokens: tokens before both part, for every prompt.
      parted: prompts whose continuations part at all.
      kl, kl_error: KL along the full-precision continuation, in nats per token; over prompts.
      buckets: the same, by position.
      prompts, prompt, length: how many prompts, their tokens, and those of the continuations, less
        where the model ended its text.
      scheme, model, dtype, cache_dtype, stored_bits, seconds: as in `PerplexityResult`.
    """

    common: float
    common_error: float
    common_median: float
    first_tokens: tuple[int, ...]
    parted: int
    kl: float
    kl_error: float
    buckets: tuple[DriftBucket, ...]
    prompts: int
    prompt: int
    length: int
    scheme: str
    model: str
    dtype: str
    cache_dtype: str
    stored_bits: float
    seconds: float


def drift(
    lm: LanguageModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    generate: Generate,
    scheme: str | schemes.Scheme,
    prompts: int = 8,
    prompt: int = 128,
    length: int = 256,
    buckets: int = 4,
    cache_dtype: Any = None,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> DriftResult:
    """Compares greedy continuations with a scheme's cache with those of the model itself.

    Args:
      lm: the model.
      text: a string, encoded without special tokens; or token ids. Prompts are spread over it.
      generate: `nqkv_jax.models.generate`.
      scheme: how keys and values are cached.
      prompts: how many, of `prompt` tokens each.
      length: tokens of a continuation.
      buckets: equal ranges of positions.
      cache_dtype: of what the scheme's cache keeps in full precision; default the model's. The
        reference has a full-precision cache in the model's dtype.
      progress: a bar on stderr; None: if that is a terminal.
      resume: a file to which every finished prompt is added; those that it holds are not computed
        again.

    Raises:
      ValueError: a size is wrong, the text is too short, the scheme does not fit the model, or
        `resume` holds another run.
    """
    scheme = schemes.get(scheme)
    dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
    tokens, starts = prompts_of(
        lm, text, prompts=prompts, prompt=prompt, length=length, buckets=buckets
    )
    begin = opening(lm)
    bits = AbstractCaches(lm.config, scheme, dtype).stored_bits
    scheme.check_model(lm)
    record = Record(
        resume, kind="drift", unit="prompt", count=prompts,
        setting=lambda: describe(
            lm, scheme, dtype, prompts=prompts, tokens_per_prompt=prompt, length=length,
            text_tokens=tokens.size, text_sha256=tokens_sha256(tokens),
        ),
    )  # fmt: skip
    compare = comparer(lm, scheme, dtype)
    disable = None if progress is None else not progress
    with tqdm.tqdm(
        total=prompts, initial=len(record.entries), desc=str(scheme), unit="prompt",
        disable=disable,
    ) as bar:  # fmt: skip
        for index in record:
            began = time.perf_counter()
            head = [*begin, *tokens[starts[index] : starts[index] + prompt - len(begin)].tolist()]
            go_on = lambda scheme, dtype, head=head: generate(
                lm, [head], scheme=scheme, max_new_tokens=length, cache_dtype=dtype
            ).tokens[0]
            full, ours = go_on("none", None), go_on(scheme, dtype)
            padded = np.zeros(prompt + length, np.int32)
            padded[: prompt + len(full)] = head + full
            # Element i belongs to token i + 1.
            kl = compare(lm.params, padded)["kl"][prompt - 1 : prompt - 1 + len(full)]
            record.add(
                common=_common(full, ours), parted=full != ours, kl=kl.tolist(),
                seconds=time.perf_counter() - began,
            )  # fmt: skip
            bar.update()
    first = [entry["common"] for entry in record.entries]
    edges = np.linspace(0, length, buckets + 1).astype(int).tolist()
    kl, kl_error, _ = _mean(record.entries, 0, length)
    return DriftResult(
        common=float(np.mean(first)), common_median=float(np.median(first)),
        common_error=float(np.std(first, ddof=1) / np.sqrt(prompts)) if prompts > 1 else np.nan,
        first_tokens=tuple(first), parted=sum(entry["parted"] for entry in record.entries),
        kl=kl, kl_error=kl_error,
        buckets=tuple(
            _bucket(record.entries, a, b) for a, b in itertools.pairwise(edges)
        ),
        prompts=prompts, prompt=prompt, length=length, scheme=str(scheme), model=lm.name,
        dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name, stored_bits=bits,
        seconds=record.seconds,
    )  # fmt: skip


def prompts_of(
    lm: LanguageModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    prompts: int,
    prompt: int,
    length: int,
    buckets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, and where its prompts begin; takes and raises what `drift` does."""
    whole_numbers("drift", prompts=prompts, prompt=prompt, length=length, buckets=buckets)
    longest = lm.config.max_positions
    if min(prompts, prompt, length) < 1 or prompt + length > longest:
        raise ValueError(
            f"drift: prompts, prompt and length must be positive, and prompt + length at most "
            f"{longest}, the positions of {lm.name}; got {prompts}, {prompt} and {length}"
        )
    if not 1 <= buckets <= length:
        raise ValueError(f"drift: buckets must be between 1 and length={length}; got {buckets}")
    tokens = encode("drift", lm, text)
    if tokens.size < prompts * prompt:
        raise ValueError(
            f"drift: text must have at least {counted(prompts * prompt, 'token')}, "
            f"prompts={prompts} of "
            f"prompt={prompt} each; got {tokens.size}. Give a longer text, or fewer or shorter "
            "prompts"
        )
    return tokens, np.linspace(0, tokens.size - prompt, prompts).astype(int)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def _mean(entries: Sequence[dict], start: int, stop: int) -> tuple[float, float, int]:
    """KL at positions [start, stop): mean, standard error over prompts, tokens."""
    parts = [part for entry in entries if (part := entry["kl"][start:stop])]
    if not parts:
        return np.nan, np.nan, 0
    sums, counts = [float(np.sum(part)) for part in parts], [len(part) for part in parts]
    return mean_of(sums, counts), standard_error(sums, counts), sum(counts)


def _bucket(entries: Sequence[dict], start: int, stop: int) -> DriftBucket:
    kl, error, tokens = _mean(entries, start, stop)
    return DriftBucket(start=start, stop=stop, kl=kl, kl_error=error, tokens=tokens)
