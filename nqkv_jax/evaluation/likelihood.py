"""Log-likelihoods of continuations, as decoding through a quantized cache would see them.

    scorer = Scorer(lm, schemes.get("nqkv"))
    scorer([(context_ids, continuation_ids), ...])     # [Likelihood(log_likelihood, greedy), ...]

Context and continuation are read in parallel (`DecodedView`): every token of the continuation is
predicted from the cache that decoding would have by then. Requests of similar length share a batch;
batches are padded to powers of two, so that few programs are compiled.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax.decoded import DecodedView
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe
from nqkv_jax.evaluation.windows import opened
from nqkv_jax.schemes import Scheme

SMALLEST = 32  # tokens that the shortest requests are padded to
TOKENS = 1024  # of a batch, padding included: bounds the logits to [TOKENS, V]

Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation.

    Attributes:
      log_likelihood: sum over its tokens, in nats.
      greedy: whether every token is the likeliest at its place.
      tokens: how many there are.
    """

    log_likelihood: float
    greedy: bool
    tokens: int


def encode_pair(lm: LanguageModel, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the context alone would end; no special tokens.

    Blanks at the end of the context go to the continuation, as tokenizers put them before words.

    Raises: ValueError: there is no tokenizer, or nothing to read or to score.
    Source: the convention of lm-evaluation-harness (EleutherAI).
    """
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} came without a tokenizer, which texts need")
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    encode = lambda text: list(lm.tokenizer.encode(text, add_special_tokens=False))
    before, whole = encode(stripped), encode(stripped + continuation)
    if not before or len(whole) <= len(before):
        raise ValueError(
            "context and continuation must have at least one token each; got "
            f"{context[-60:]!r} and {continuation[:60]!r}"
        )
    return before, whole[len(before) :]


def check_pairs(lm: LanguageModel, pairs: Iterable[Pair]) -> list[tuple[list[int], list[int]]]:
    """The pairs, with contexts that begin as they must (`opened`), and whose beginnings are cut
    away where the model has no positions for them.

    Raises: ValueError: a context or continuation is empty, or a continuation is too long.
    """
    longest, checked = lm.config.max_positions, []
    for i, (context, continuation) in enumerate(pairs):
        context, continuation = list(context), list(continuation)
        if not context or not continuation or len(continuation) >= longest:
            raise ValueError(
                "log-likelihoods: a context must have at least one token, and a continuation "
                f"between 1 and {longest - 1}, the positions of {lm.name} less one; "
                f"request {i} has {len(context)} and {len(continuation)}"
            )
        checked.append((opened(lm, context, longest - len(continuation)), continuation))
    return checked


class Scorer:
    """Log-likelihoods for one model and scheme; compiles once per length of batches.

    Args:
      lm: the model.
      scheme: how keys and values are cached.
      cache_dtype: of what the cache keeps in full precision; default the model's.

    Raises: ValueError: the scheme was calibrated on another model.
    """

    def __init__(self, lm: LanguageModel, scheme: Scheme, cache_dtype: Any = None):
        scheme.check_model(lm)
        self._lm = lm
        dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
        view = DecodedView(scheme=scheme, num_layers=lm.config.num_layers, dtype=dtype)

        @jax.jit
        def score(params, tokens):
            logits, _ = lm.apply(params, tokens, view)
            # A sequence at a time: one more array of a sequence's logits, not of all.
            return jax.lax.map(lambda row: _score(*row), (logits, tokens))

        self._score = score

    def __call__(self, pairs: Iterable[Pair]) -> list[Likelihood]:
        """Of every pair of token ids (context, continuation), in their order."""
        pairs = check_pairs(self._lm, pairs)
        results: list[Any] = [None] * len(pairs)
        for size, members in batches(pairs, self._lm.config.max_positions):
            for member, result in zip(members, self.batch(size, pairs, members), strict=True):
                results[member] = result
        return results

    def batch(self, size: int, pairs: Sequence[Pair], members: Sequence[int]) -> list[Likelihood]:
        """Of the pairs `members`, none of more than `size` tokens, in one pass."""
        rows = max(1, TOKENS // size)
        tokens = np.zeros((rows, size), np.int32)
        for row, member in enumerate(members):
            both = [*pairs[member][0], *pairs[member][1]]
            tokens[row, : len(both)] = both
        scores, same = map(np.asarray, self._score(self._lm.params, tokens))
        results = []
        for row, member in enumerate(members):
            context, continuation = map(len, pairs[member])
            # Element i belongs to the prediction of token i + 1.
            own = slice(context - 1, context + continuation - 1)
            results.append(
                Likelihood(
                    log_likelihood=float(np.sum(scores[row, own], dtype=np.float64)),
                    greedy=bool(np.all(same[row, own])),
                    tokens=continuation,
                )
            )
        return results


def recorded_likelihoods(
    what: str,
    lm: LanguageModel,
    pairs: Sequence[Pair],
    *,
    scheme: Scheme,
    cache_dtype: Any,
    progress: bool | None,
    resume: str | os.PathLike | None,
) -> tuple[list[Likelihood], float]:
    """What a `Scorer` gives for all pairs, batch by batch; and the seconds that took.

    `what` is the measure's name, `resume` a file to which every finished batch is added.
    """
    scorer = Scorer(lm, scheme, cache_dtype)
    dtype = lm.dtype if cache_dtype is None else cache_dtype
    pairs = check_pairs(lm, pairs)
    plan = batches(pairs, lm.config.max_positions)
    record = Record(
        resume, kind=what, unit="batch", count=len(plan),
        setting=lambda: describe(
            lm, scheme, dtype, requests=len(pairs),
            text_sha256=hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        ),
    )  # fmt: skip
    disable = None if progress is None else not progress
    done = sum(len(members) for _, members in plan[: len(record.entries)])
    with tqdm.tqdm(
        total=len(pairs), initial=done, desc=str(scheme), unit="request", disable=disable
    ) as bar:
        for index in record:
            began = time.perf_counter()
            size, members = plan[index]
            found = [dataclasses.asdict(r) for r in scorer.batch(size, pairs, members)]
            record.add(results=found, seconds=time.perf_counter() - began)
            bar.update(len(members))
    results: list[Any] = [None] * len(pairs)
    for (_, members), entry in zip(plan, record.entries, strict=True):
        for member, found in zip(members, entry["results"], strict=True):
            results[member] = Likelihood(**found)
    return results, record.seconds


def batches(pairs: Sequence[Pair], longest: int) -> list[tuple[int, list[int]]]:
    """Which pairs are read together: (padded length, their indices), the longest first.

    Depends on nothing but lengths and order, so that an interrupted run meets the same batches.
    """
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    sizes = [min(max(SMALLEST, 1 << (n - 1).bit_length()), longest) for n in lengths]
    found = []
    for size in sorted(set(sizes), reverse=True):
        members = [i for i, own in enumerate(sizes) if own == size]
        rows = max(1, TOKENS // size)
        found += [(size, members[i : i + rows]) for i in range(0, len(members), rows)]
    return found


def _score(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of tokens 1.., f32[S - 1], and whether each is the likeliest, from logits [S, V]."""
    logits, targets = logits[:-1].astype(jnp.float32), tokens[1:]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == targets
