"""Whether a model finds again what stood in a long text, with a quantized cache.

Texts of several lengths hold an answer at several depths (`nqkv_jax.evaluation.synthetic`). The
model reads them and goes on greedily; an answer counts if the continuation contains it.

Texts are read in chunks, which see earlier ones through the cache, and are themselves encoded. With
one chunk for the whole text, as in most papers, text and question would be read in full precision,
and the first token of the answer would never see a quantized key or value.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.proportions import Share
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe
from nqkv_jax.evaluation.synthetic import TASKS, Sample, make
from nqkv_jax.evaluation.windows import opened

_BATCH_TOKENS = 4096  # of the texts that are read together: bounds the cache

# `nqkv_jax.models.generate`, or what takes and gives the same.
Generate = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalCell:
    """Texts of one length with the answer in one range of depths.

    Attributes:
      length: tokens of the text, question included, at most.
      depth: middle of the range; 0 is the beginning of the text, 1 its end.
      samples, correct: texts, and those of which every answer was found.
      recall: mean share of the answers that were found.
    """

    length: int
    depth: float
    samples: int
    correct: int
    recall: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """What was measured, and how.

    Attributes:
      task: one of `TASKS`.
      accuracy, accuracy_error: share of texts of which every answer was found; its standard error.
      accuracy_interval: of 95 % confidence (Wilson).
      recall: mean share of the answers that were found.
      samples: texts.
      cells: lengths, ascending, and depths, ascending within each.
      prefill_chunk: tokens that are read at a time.
      seed: of the texts.
      scheme, model, dtype, cache_dtype: as in `PerplexityResult`.
      seconds: of reading and generating, earlier runs that were resumed included.
    """

    task: str
    accuracy: float
    accuracy_error: float
    accuracy_interval: tuple[float, float]
    recall: float
    samples: int
    cells: tuple[RetrievalCell, ...]
    prefill_chunk: int
    seed: int
    scheme: str
    model: str
    dtype: str
    cache_dtype: str
    seconds: float


def retrieval(
    lm: LanguageModel,
    task: str = "passkey",
    *,
    generate: Generate,
    scheme: str | schemes.Scheme,
    lengths: Sequence[int] = (512,),
    depths: int = 1,
    samples: int = 8,
    seed: int = 0,
    prefill_chunk: int = 128,
    cache_dtype: Any = None,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> RetrievalResult:
    """Measures a grid of lengths and depths.

    Args:
      lm: the model, with a tokenizer.
      task: one of `nqkv_jax.evaluation.synthetic.TASKS`.
      generate: `nqkv_jax.models.generate`.
      scheme: how keys and values are cached.
      lengths: of the texts, in tokens.
      depths: equal ranges that the text is divided into; the answers of one cell are spread evenly
        over its range.
      samples: texts per length and range.
      seed: of the texts, which do not depend on the scheme.
      prefill_chunk: tokens that are read at a time, see above.
      cache_dtype: of what the cache keeps in full precision; default the model's.
      progress: a bar on stderr; None: if that is a terminal.
      resume: a file to which every finished batch is added; those that it holds are not computed
        again.

    Raises:
      ValueError: there is no such task, a size is wrong, a length has no room for the question or
        exceeds the model's positions, the scheme does not fit the model, or `resume` holds another
        run.
    """
    scheme = schemes.get(scheme)
    sizes = dict(depths=depths, samples=samples, seed=seed)
    check(lm, task, lengths=lengths, prefill_chunk=prefill_chunk, **sizes)
    scheme.check_model(lm)
    kind, lengths = TASKS[task], sorted(set(lengths))
    texts = {length: _texts(lm, task, length=length, **sizes) for length in lengths}
    plan = [
        (length, first, min(first + _rows(length, samples * depths), samples * depths))
        for length in lengths
        for first in range(0, samples * depths, _rows(length, samples * depths))
    ]
    dtype = jnp.dtype(lm.dtype if cache_dtype is None else cache_dtype)
    record = Record(
        resume, kind=task, unit="batch", count=len(plan),
        setting=lambda: describe(
            lm, scheme, dtype, lengths=lengths, depths=depths, samples=samples, seed=seed,
            prefill_chunk=prefill_chunk, max_new_tokens=kind.max_new_tokens,
        ),
    )  # fmt: skip
    disable = None if progress is None else not progress
    done = sum(stop - first for _, first, stop in plan[: len(record.entries)])
    with tqdm.tqdm(
        total=samples * depths * len(lengths), initial=done, desc=f"{scheme}, {task}", unit="text",
        disable=disable,
    ) as bar:  # fmt: skip
        for index in record:
            length, first, stop = plan[index]
            began = time.perf_counter()
            continuations = _continuations(
                lm, generate, texts[length][first:stop], rows=_rows(length, samples * depths),
                length=length, scheme=scheme, max_new_tokens=kind.max_new_tokens,
                prefill_chunk=prefill_chunk, cache_dtype=dtype,
            )  # fmt: skip
            record.add(texts=continuations, seconds=time.perf_counter() - began)
            bar.update(stop - first)
    continuations = [text for entry in record.entries for text in entry["texts"]]
    every = [sample for length in lengths for sample in texts[length]]
    shares = [s.found(t) / len(s.answers) for s, t in zip(every, continuations, strict=True)]
    cells = _cells(np.reshape(shares, (len(lengths), depths, samples)), lengths)
    total = Share(sum(cell.correct for cell in cells), len(shares))
    return RetrievalResult(
        task=task, accuracy=total.value, accuracy_error=total.error,
        accuracy_interval=total.interval, recall=float(np.mean(shares)), samples=len(shares),
        cells=cells, prefill_chunk=prefill_chunk, seed=seed, scheme=str(scheme), model=lm.name,
        dtype=jnp.dtype(lm.dtype).name, cache_dtype=dtype.name, seconds=record.seconds,
    )  # fmt: skip


def check(
    lm: LanguageModel,
    task: str,
    *,
    lengths: Sequence[int],
    depths: int = 1,
    samples: int,
    seed: int = 0,
    prefill_chunk: int = 128,
) -> None:
    """What `retrieval` checks before it reads; takes and raises what that does."""
    if task not in TASKS:
        raise ValueError(f"retrieval: task must be one of {', '.join(TASKS)}; got {task!r}")
    if lm.tokenizer is None:
        raise ValueError(f"retrieval: {lm.name} came without a tokenizer, which texts need")
    whole_numbers(
        "retrieval", depths=depths, samples=samples, seed=seed, prefill_chunk=prefill_chunk
    )
    for length in lengths:
        whole_numbers("retrieval", length=length)
    new = TASKS[task].max_new_tokens
    longest = lm.config.max_positions - new
    if not lengths or min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(
            f"retrieval: lengths must be between 1 and {longest} (the positions of {lm.name}, less "
            f"{new} for the answer); got {sorted(lengths)}"
        )
    if min(depths, samples) < 1 or seed < 0:
        raise ValueError(
            "retrieval: depths and samples must be positive, and seed not negative; got "
            f"{depths}, {samples}, {seed}"
        )
    if prefill_chunk < 2:
        raise ValueError(f"retrieval: prefill_chunk must be at least 2; got {prefill_chunk}")
    # Where there is room for the question in the shortest, there is in all.
    _texts(lm, task, length=min(lengths), depths=depths, samples=samples, seed=seed)


def _texts(
    lm: LanguageModel, task: str, *, length: int, depths: int, samples: int, seed: int
) -> list[Sample]:
    depth = lambda cell, i: (cell + (i + 0.5) / samples) / depths
    return [
        make(
            TASKS[task], length=length, depth=depth(cell, i), seed=(seed, cell, i),
            encode=lm.tokenizer.encode,
        )
        for cell in range(depths)
        for i in range(samples)
    ]  # fmt: skip


def _rows(length: int, total: int) -> int:
    """Texts of a batch."""
    return min(total, max(1, _BATCH_TOKENS // length))


def _continuations(
    lm, generate, samples: list[Sample], *, rows, length, max_new_tokens, prefill_chunk, **options
) -> list[str]:
    """What the model makes of some texts; always `rows` of them, so that one program serves all."""
    prompts = [opened(lm, lm.tokenizer.encode(sample.prompt)) for sample in samples]
    padded = prompts + prompts[-1:] * (rows - len(prompts))
    # The same for all batches of a length; whole chunks, as the last one is padded.
    room = -(-length // prefill_chunk) * prefill_chunk + max_new_tokens
    result = generate(
        lm, padded, max_new_tokens=max_new_tokens, max_len=min(room, lm.config.max_positions),
        prefill_chunk=prefill_chunk, **options,
    )  # fmt: skip
    return [lm.tokenizer.decode(tokens) for tokens in result.tokens[: len(samples)]]


def _cells(shares: np.ndarray, lengths: Sequence[int]) -> tuple[RetrievalCell, ...]:
    """From the shares [lengths, depths, samples] of answers that were found."""
    depths, samples = shares.shape[1:]
    return tuple(
        RetrievalCell(
            length=length, depth=(cell + 0.5) / depths, samples=samples,
            correct=int(np.sum(shares[i, cell] == 1)), recall=float(shares[i, cell].mean()),
        )
        for i, length in enumerate(lengths)
        for cell in range(depths)
    )  # fmt: skip
