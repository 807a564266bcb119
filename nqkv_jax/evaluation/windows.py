"""A text in windows, each of which the model reads from scratch.

No BOS token is put before a window, but for a model that breaks down without (`opening`); the first
token that is read, of which nothing is known, is not scored.

Source: the windows are those of Frantar et al. (2022), GPTQ, and of the KV papers after it; the
stride is Hugging Face's sliding-window recipe.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.words import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Which tokens are read together, and which of them are scored.

    Attributes:
      tokens: i32[text].
      size: tokens per window.
      stride: from one window to the next.
      spans: (start, first, stop) of every window: tokens [start, stop), of which [first, stop) are
        scored.
      opening: tokens that every window begins with; they are among its `size`.
    """

    tokens: np.ndarray
    size: int
    stride: int
    spans: tuple[tuple[int, int, int], ...]
    opening: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.spans)

    def padded(self, index: int) -> tuple[np.ndarray, int]:
        """The tokens i32[size] of a window, zeros after them, and how many they are."""
        start, _, stop = self.spans[index]
        window, begin = np.zeros(self.size, np.int32), len(self.opening)
        length = begin + stop - start
        window[:begin] = self.opening
        window[begin:length] = self.tokens[start:stop]
        return window, length

    def scored(self, index: int, values: np.ndarray) -> np.ndarray:
        """Of `values` [size - 1], that belong to tokens 1.. of the window, those that count."""
        start, first, stop = self.spans[index]
        shift = len(self.opening) - 1 - start
        return values[first + shift : stop + shift]


def windows(
    what: str,
    lm: LanguageModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    size: int,
    stride: int | None,
    max_tokens: int | None,
) -> Windows:
    """The windows of a text.

    Args:
      what: asks, for messages.
      text: a string, encoded without special tokens; or token ids.
      size: tokens per window, those of `opening` included.
      stride: from one window to the next; None for as many tokens as a window has of the text.
        After the first window only the last `stride` tokens of each are scored, so that every token
        of the text is scored once.
      max_tokens: how many tokens of the text are used; None for all.

    Raises: ValueError: the sizes are wrong, or the text has fewer than two tokens.
    """
    whole_numbers(what, window=size, stride=stride, max_tokens=max_tokens)
    begin = opening(lm)
    room, longest = size - len(begin), lm.config.max_positions
    if not 2 <= size <= longest:
        raise ValueError(
            f"{what}: window must be between 2 and {longest}, the positions that "
            f"{lm.name} has; got {size}"
        )
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        rest = f" less {counted(len(begin), 'token')} before the text" if begin else ""
        raise ValueError(f"{what}: stride must be between 1 and window={size}{rest}; got {stride}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"{what}: max_tokens must be at least 2, of which one is scored; got {max_tokens}"
        )
    tokens = encode(what, lm, text)[:max_tokens]
    if tokens.size < 2:
        raise ValueError(
            f"{what}: text must have at least 2 tokens, of which one is scored; got {tokens.size}"
        )
    spans = tuple(_spans(len(tokens), room, stride, unscored=0 if begin else 1))
    return Windows(tokens=tokens, size=size, stride=stride, spans=spans, opening=begin)


def opening(lm: LanguageModel) -> tuple[int, ...]:
    """Token ids that every text for this model must begin with; most need none."""
    return getattr(lm.config, "opening", ())


def opened(lm: LanguageModel, tokens: Sequence[int], room: int | None = None) -> list[int]:
    """The tokens of a text, beginning with `opening`; with `room` for so many, the last of them."""
    begin, tokens = list(opening(lm)), [int(token) for token in _unopened(lm, tokens)]
    if room is not None and len(begin) + len(tokens) > room:
        begin = begin if room > len(begin) else []
        tokens = tokens[len(tokens) - room + len(begin) :]
    return begin + tokens


def _unopened(lm: LanguageModel, tokens: Any) -> Any:
    begin = list(opening(lm))
    return tokens[len(begin) :] if begin and list(tokens[: len(begin)]) == begin else tokens


def encode(what: str, lm: LanguageModel, text: Any) -> np.ndarray:
    """i32[tokens] of a string, without special tokens, or of ids, which are checked; in either case
    without `opening`.

    Raises: ValueError: ids are wrong, or there is no tokenizer.
    """
    if isinstance(text, str):
        if lm.tokenizer is None:
            raise ValueError(
                f"{what}: {lm.name} came without a tokenizer, so text must be token ids; got a "
                "string"
            )
        text = lm.tokenizer.encode(text, add_special_tokens=False)
    tokens = np.asarray(text)
    if not tokens.size:
        return np.zeros(0, np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{what}: text must be a string or integers [tokens]; got "
            f"{tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= lm.config.vocab_size:
        raise ValueError(
            f"{what}: token ids must be in [0, {lm.config.vocab_size}), the "
            f"vocabulary of {lm.name}; got {tokens.min()} to {tokens.max()}"
        )
    return np.asarray(_unopened(lm, tokens), np.int32)


def _spans(length: int, size: int, stride: int, *, unscored: int):
    """8 tokens, windows of 4, stride 2: (0, 1, 4), (2, 4, 6), (4, 6, 8).

    Of a window that stands alone the first `unscored` tokens are not predicted.
    """
    start = 0
    while True:
        first = start + max(unscored, size - stride if start else 0)
        if first >= length:
            return
        yield start, first, min(start + size, length)
        start += stride


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> float:
    """The mean of all tokens, from the sums over windows."""
    return math.fsum(sums) / sum(counts)


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Of `mean_of`: tokens within a window are not independent, windows nearly are.

    The ratio estimator, as the last window may be shorter. NaN for one window.
    """
    if len(sums) < 2:
        return math.nan
    mean = mean_of(sums, counts)
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
