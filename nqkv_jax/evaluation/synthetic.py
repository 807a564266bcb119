"""Texts of any length with something in them to be found again.

Every task is a function that builds a prompt of `size` units (sentences, lines or words) around
what is asked for; `make` chooses the largest size that fits into a number of tokens. The same seed
gives the same text, on every machine.

Source of the kinds of tasks: Mohtashami and Jaggi (2023), Landmark Attention (pass keys); Kamradt
(2023), Needle in a haystack; Liu et al. (2023), Lost in the middle (keys and values); Hsieh et al.
(2024), RULER (several needles, variable tracking, common words). The texts are our own.
"""

import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from nqkv_jax.plan import largest

FILLER = (
    "The ferry leaves at seven and comes back before dark.",
    "A grey cat sleeps on the wall behind the bakery.",
    "Most of the windows on this street face north.",
    "Somebody has left a bicycle leaning against the fence.",
    "The tide was low, and the boats lay on their sides.",
    "In spring the meadow floods, and herons walk about in it.",
    "He counted the lamps along the pier and lost his place.",
    "The kettle takes longer than it used to.",
    "Rain is expected from the west by the afternoon.",
    "They painted the gate green, and the hinges too.",
    "A letter lay unopened beside the bowl of apples.",
    "The old clock in the hall runs a little slow.",
    "Two men carried a ladder across the yard.",
    "The road bends twice before it reaches the mill.",
    "She keeps buttons in a tin that once held tea.",
    "Snow stayed on the hills until the end of April.",
    "The orchestra tuned, stopped, and tuned again.",
    "Nobody remembers who planted the walnut tree.",
    "The library closes early when the evenings grow short.",
    "A train went by without stopping, its lights all on.",
)

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt, and what its continuation must contain."""

    prompt: str
    answers: tuple[str, ...]

    def found(self, text: str) -> int:
        """How many of the answers are in a text, as whole words."""
        return sum(
            re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
            for answer in self.answers
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of text.

    Attributes:
      name: of the task.
      summary: what is asked, in a few words.
      max_new_tokens: that an answer may take.
      build: (random numbers, size, depth) -> sample. Depth is where the answer stands: 0 at the
        beginning of the text, 1 at its end. A larger size makes a longer prompt.
    """

    name: str
    summary: str
    max_new_tokens: int
    build: Callable[[np.random.Generator, int, float], Sample]


def make(
    task: Task,
    *,
    length: int,
    depth: float,
    seed: Sequence[int],
    encode: Callable[[str], Sequence[int]],
) -> Sample:
    """The longest sample of at most `length` tokens.

    Args:
      depth: of the answer, 0 to 1.
      seed: whole numbers; with the task and the length they decide every word.
      encode: text -> tokens.

    Raises: ValueError: not even a text without filler fits.
    """
    key = [zlib.crc32(task.name.encode()), length, *seed]
    build = lambda size: task.build(np.random.default_rng(key), size, depth)
    fits = lambda size: len(encode(build(size).prompt)) <= length
    if not fits(0):
        needed = len(encode(build(0).prompt))
        raise ValueError(f"{task.name}: length must be at least {needed} tokens; got {length}")
    return build(largest(fits, guess=length // 16))


def _haystack(rng: np.random.Generator, size: int) -> list[str]:
    """Sentences in an order that changes from pass to pass, so that no pass predicts the next."""
    order = np.concatenate([rng.permutation(len(FILLER)) for _ in range(size // len(FILLER) + 1)])
    return [FILLER[i] for i in order[:size]]


def _insert(sentences: list[str], found: Sequence[tuple[float, str]]) -> str:
    """The text with every (depth, sentence) of `found` in it."""
    places = [(round(depth * len(sentences)), sentence) for depth, sentence in found]
    pieces = list(sentences)
    # From the end, so that earlier places stay what they are; equal ones keep their order.
    for place, sentence in reversed(sorted(places, key=lambda p: p[0])):
        pieces.insert(place, sentence)
    return " ".join(pieces)


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables that no model knows."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(_SYLLABLES, 3))] = None
    return list(found)


def passkey(rng: np.random.Generator, size: int, depth: float) -> Sample:
    """A number of five digits in a text about nothing."""
    key = _number(rng, 5)
    needle = f"The pass key is {key}. Remember it: {key} is the pass key."
    text = _insert(_haystack(rng, size), [(depth, needle)])
    return Sample(
        "Somewhere in the text below there is a pass key. Read the text and remember the pass key, "
        f"as you will be asked for it.\n\n{text}\n\nWhat is the pass key? The pass key is",
        (key,),
    )


def needle(rng: np.random.Generator, size: int, depth: float) -> Sample:
    """Four numbers with names, of which one is asked for; the others are anywhere."""
    names, values = _words(rng, 4), [_number(rng, 7) for _ in range(4)]
    depths = [depth, *rng.uniform(size=3)]
    found = [
        (d, f"The lucky number of {n} is {v}.")
        for d, n, v in zip(depths, names, values, strict=True)
    ]
    text = _insert(_haystack(rng, size), found)
    return Sample(
        "The text below mentions the lucky numbers of several people. Remember them, as you will "
        f"be asked for one.\n\n{text}\n\nWhat is the lucky number of {names[0]}? The lucky number "
        f"of {names[0]} is",
        (values[0],),
    )


def kv(rng: np.random.Generator, size: int, depth: float) -> Sample:
    """Nothing but keys and values, of which one is asked for."""
    # As many words for every size, so that the answer does not depend on it.
    asked, value = _words(rng, 1)[0], _number(rng, 7)
    others = [w for w in _words(rng, size + 1) if w != asked][:size]
    lines = [f"{word}: {_number(rng, 7)}" for word in others]
    lines.insert(round(depth * len(lines)), f"{asked}: {value}")
    return Sample(
        "Below is a list of names and their numbers, one on each line.\n\n"
        + "\n".join(lines)
        + f"\n\nThe number of {asked} in the list above is\n{asked}:",
        (value,),
    )


def variables(rng: np.random.Generator, size: int, depth: float) -> Sample:
    """A number handed on four times; all five variables that hold it are asked for.

    The first statement is at `depth`, the others follow evenly to the end of the text.
    """
    names, value = [w.upper() for w in _words(rng, 5)], _number(rng, 5)
    statements = [f"Let {names[0]} be {value}."]
    statements += [f"Let {b} be equal to {a}." for a, b in itertools.pairwise(names)]
    depths = np.linspace(depth, 1, len(names), endpoint=False)
    text = _insert(_haystack(rng, size), list(zip(depths, statements, strict=True)))
    return Sample(
        "The text below gives values to variables, some of them by naming another variable. Keep "
        f"track of all of them.\n\n{text}\n\nWhich variables have the value {value}? There are "
        f"{len(names)} of them:",
        tuple(names),
    )


def words(rng: np.random.Generator, size: int, depth: float) -> Sample:
    """A list of words, of which the three that come far more often are asked for.

    They are spread over the whole list; `depth` does not matter.
    """
    common = _words(rng, 3)
    often = 4 + size // 8
    rest = [w for w in _words(rng, size // 3 + 4) if w not in common]
    # The others come once or twice, together five eighths of the list.
    others = [rest[i % len(rest)] for i in range(size * 5 // 8)]
    listed = rng.permutation([*(w for w in common for _ in range(often)), *others])
    return Sample(
        "Below is a list of words. Some of them come again and again.\n\n"
        + " ".join(listed)
        + "\n\nWhich three words come most often in the list above? The three words are",
        tuple(common),
    )


TASKS = {
    task.name: task
    for task in (
        Task("passkey", "a number of five digits in a text about nothing", 12, passkey),
        Task("needle", "one of four named numbers in a text about nothing", 14, needle),
        Task("kv", "the value of a key among many keys and values", 14, kv),
        Task("variables", "which variables a number was handed on to", 48, variables),
        Task("words", "the words that come most often in a list", 24, words),
    )
}
