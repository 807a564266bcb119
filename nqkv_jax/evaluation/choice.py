"""Zero-shot tasks by log-likelihood, through the cache: multiple choice, and a text's last word.

An item of a task is a JSON object of one of three forms:

    {"query": ..., "choices": [...], "gold": 0}                   which choice is likeliest?
    {"context_options": [...], "continuation": ..., "gold": 1}    after which is it likeliest?
    {"context": ..., "continuation": ...}                         which word comes? (`last_word`)

    multiple_choice(lm, read_items("piqa.jsonl"), scheme="nqkv")
    last_word(lm, read_items("lambada_openai.jsonl"), scheme="nqkv")

No BOS token is put before a context, but for Gemma, which needs it. A query that begins with
"Question:" is followed by "\\nAnswer:", any other by nothing, and a choice by one blank before it.

Source: the first two forms and their prompts are those of llm-foundry (MosaicML), partial scoring
of contexts is Trinh and Le (2018); acc_norm is that of lm-evaluation-harness (EleutherAI).
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nqkv_jax import schemes
from nqkv_jax.evaluation.likelihood import (
    Pair,
    check_pairs,
    encode_pair,
    recorded_likelihoods,
)
from nqkv_jax.evaluation.perplexity import exp
from nqkv_jax.evaluation.proportions import Share
from nqkv_jax.evaluation.protocol import LanguageModel

_FORMS = (("query", "choices", "gold"), ("context_options", "continuation", "gold"),
          ("context", "continuation"))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """What was measured, and how.

    Attributes:
      accuracy, accuracy_error: share of items whose right choice is the likeliest as it is; and its
        standard error.
      accuracy_interval: of 95 % confidence (Wilson).
      accuracy_norm, accuracy_norm_error, accuracy_norm_interval: the same, log-likelihoods divided
        by the characters of the choice; where contexts are the choice, that changes nothing.
      items: how many there are.
      requests: log-likelihoods that took.
      scheme, model, dtype, cache_dtype: as in `PerplexityResult`.
      seconds: of computing, earlier runs that were resumed included.
    """

    accuracy: float
    accuracy_error: float
    accuracy_interval: tuple[float, float]
    accuracy_norm: float
    accuracy_norm_error: float
    accuracy_norm_interval: tuple[float, float]
    items: int
    requests: int
    scheme: str
    model: str
    dtype: str
    cache_dtype: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWordResult:
    """What was measured, and how.

    Attributes:
      accuracy, accuracy_error, accuracy_interval: share of items whose word greedy decoding finds;
        its standard error, and interval of 95 % confidence (Wilson).
      perplexity: exp(nll).
      nll, nll_error: mean negative log-likelihood of the word, in nats, all its tokens together;
        and its standard error.
      items, scheme, model, dtype, cache_dtype, seconds: as in `ChoiceResult`.
    """

    accuracy: float
    accuracy_error: float
    accuracy_interval: tuple[float, float]
    perplexity: float
    nll: float
    nll_error: float
    items: int
    scheme: str
    model: str
    dtype: str
    cache_dtype: str
    seconds: float


def read_items(path: str | os.PathLike, limit: int | None = None) -> list[dict]:
    """The first `limit` items of a file of JSON lines, or all. Blank lines are no items.

    Raises: ValueError: the file cannot be read, or a line is no item.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    try:
        # Not `splitlines`: texts in JSON may have U+2028, U+0085 and others of its line ends as
        # they are. A byte order mark, as Windows writes it, is no part of the first line.
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"the task {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the task {path} must be UTF-8; byte {error.start} is not") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} must be a JSON object; {error}") from error
        try:
            _form(item)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        items.append(item)
    if not items:
        raise ValueError(f"the task {path} must have at least one item; it is empty")
    return items


def multiple_choice(
    lm: LanguageModel,
    items: Sequence[dict],
    *,
    scheme: str | schemes.Scheme,
    cache_dtype: Any = None,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> ChoiceResult:
    """Accuracy on items of the first two forms.

    Args:
      lm: the model.
      items: as `read_items` gives them.
      scheme: how keys and values are cached.
      cache_dtype: of what the cache keeps in full precision; default the model's.
      progress: a bar on stderr; None: if that is a terminal.
      resume: a file to which every finished batch is added; those that it holds are not computed
        again.

    Raises:
      ValueError: an item is of another form, a text has no token, the scheme does not fit the
        model, or `resume` holds another run.
    """
    scheme = schemes.get(scheme)
    requests = _choices(items)
    pairs = choice_pairs(lm, items)
    found, seconds = recorded_likelihoods(
        "choice", lm, pairs, scheme=scheme, cache_dtype=cache_dtype, progress=progress,
        resume=resume,
    )  # fmt: skip
    values, right, right_norm = iter(found), 0, 0
    for item, texts in zip(items, requests, strict=True):
        scores = np.array([next(values).log_likelihood for _ in texts])
        # Without the blank that was put before it.
        characters = [len(continuation) - 1 for _, continuation in texts]
        right += bool(_best(scores) == item["gold"])
        right_norm += bool(_best(scores / characters) == item["gold"])
    plain, norm = Share(right, len(items)), Share(right_norm, len(items))
    return ChoiceResult(
        accuracy=plain.value, accuracy_error=plain.error, accuracy_interval=plain.interval,
        accuracy_norm=norm.value, accuracy_norm_error=norm.error,
        accuracy_norm_interval=norm.interval, items=len(items), requests=len(pairs),
        seconds=seconds, **_names(lm, scheme, cache_dtype),
    )  # fmt: skip


def last_word(
    lm: LanguageModel,
    items: Sequence[dict],
    *,
    scheme: str | schemes.Scheme,
    cache_dtype: Any = None,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> LastWordResult:
    """Accuracy and perplexity of the last word, on items of the third form.

    Takes the arguments of `multiple_choice`, and raises what it raises.

    Source: Paperno et al. (2016), LAMBADA; the word as a whole, in the form of Radford et al.
    (2019).
    """
    scheme = schemes.get(scheme)
    pairs = word_pairs(lm, items)
    found, seconds = recorded_likelihoods(
        "lambada", lm, pairs, scheme=scheme, cache_dtype=cache_dtype, progress=progress,
        resume=resume,
    )  # fmt: skip
    share = Share(sum(f.greedy for f in found), len(items))
    nll = -np.array([f.log_likelihood for f in found])
    error = float(np.std(nll, ddof=1) / np.sqrt(nll.size)) if nll.size > 1 else math.nan
    return LastWordResult(
        accuracy=share.value, accuracy_error=share.error, accuracy_interval=share.interval,
        perplexity=exp(float(nll.mean())), nll=float(nll.mean()), nll_error=error,
        items=len(items), seconds=seconds, **_names(lm, scheme, cache_dtype),
    )  # fmt: skip


def choice_pairs(lm: LanguageModel, items: Sequence[dict]) -> list[Pair]:
    """What `multiple_choice` scores, in the order of items and choices; raises what it raises."""
    return check_pairs(lm, (encode_pair(lm, *texts) for item in _choices(items) for texts in item))


def word_pairs(lm: LanguageModel, items: Sequence[dict]) -> list[Pair]:
    """What `last_word` scores; raises what it raises."""
    if not items:
        raise ValueError("lambada: expected at least one item; got none")
    wrong = [i for i, item in enumerate(items) if _form(item) != _FORMS[2]]
    if wrong:
        raise ValueError(
            "lambada: every item must have context and continuation and no choices; item "
            f"{wrong[0]} is {_shown(items[wrong[0]])}. Use `choice` for it"
        )
    texts = ((item["context"], " " + item["continuation"]) for item in items)
    return check_pairs(lm, (encode_pair(lm, *both) for both in texts))


def _best(scores: np.ndarray) -> int:
    """The first of the largest; -1, which is never right, if a model broke down."""
    return -1 if np.isnan(scores).any() else int(np.argmax(scores))


def _names(lm: LanguageModel, scheme: schemes.Scheme, cache_dtype: Any) -> dict[str, str]:
    name = lambda dtype: np.dtype(dtype).name
    return dict(
        scheme=str(scheme), model=lm.name, dtype=name(lm.dtype),
        cache_dtype=name(lm.dtype if cache_dtype is None else cache_dtype),
    )  # fmt: skip


def _shown(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, default=str)[:80]


def _form(item: Any) -> tuple[str, ...]:
    """Which of the forms an item has; ValueError if none, or if its values do not fit."""
    if isinstance(item, dict):
        for form in _FORMS:
            if set(form) <= set(item):
                _check(item, form)
                return form
    forms = " or ".join("{" + ", ".join(form) + "}" for form in _FORMS)
    raise ValueError(f"an item must be a JSON object with {forms}; got {_shown(item)}")


def _check(item: dict, form: tuple[str, ...]) -> None:
    text = lambda value: isinstance(value, str) and bool(value.strip())
    for name in form:
        value = item[name]
        if name in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2 or not all(map(text, value)):
                raise ValueError(f"{name} must be at least two texts; got {_shown(value)}")
        elif name != "gold" and not text(value):
            raise ValueError(f"{name} must be a text that is not empty; got {_shown(value)}")
    if "gold" in form:
        count, gold = len(item[form[0] if form[0] != "query" else "choices"]), item["gold"]
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
            raise ValueError(
                f"gold must be the number of a choice, 0 to {count - 1}; got {_shown(gold)}"
            )


def _choices(items: Sequence[dict]) -> list[list[tuple[str, str]]]:
    if not items:
        raise ValueError("choice: expected at least one item; got none")
    return [_requests(item, i) for i, item in enumerate(items)]


def _requests(item: dict, number: int) -> list[tuple[str, str]]:
    """(context, continuation) of every choice."""
    form = _form(item)
    if form == _FORMS[0]:
        query = item["query"].rstrip()
        query += "\nAnswer:" if query.startswith("Question:") else ""
        return [(query, " " + choice) for choice in item["choices"]]
    if form == _FORMS[1]:
        return [(option, " " + item["continuation"]) for option in item["context_options"]]
    raise ValueError(
        f"choice: every item must have choices; item {number} is {_shown(item)}. Use `lambada` for "
        "it"
    )
