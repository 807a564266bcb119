"""Texts with answers in them: how long they are, and where the answers stand."""

import collections
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqkv_jax.cli import evaluate_retrieval
from nqkv_jax.evaluation import synthetic
from nqkv_jax.evaluation.synthetic import TASKS, Sample, make

# Words that one more unit takes.
UNIT = {
    "passkey": 12,
    "needle": 12,
    "kv": 2,
    "variables": 12,
    "words": 4,
}  # words per unit, at most
tasks = st.sampled_from(sorted(TASKS))
lengths, depths, seeds = st.integers(130, 900), st.floats(0, 1), st.integers(0, 2**32)


def sample(name, length=400, depth=0.5, seed=(0,)):
    return make(TASKS[name], length=length, depth=depth, seed=seed, encode=str.split)


@given(tasks, lengths, depths, seeds)
@settings(max_examples=40, deadline=None)
def test_longest_that_fits(name, length, depth, seed):
    made = sample(name, length, depth, (seed,))
    words = len(made.prompt.split())
    assert length - UNIT[name] <= words <= length
    assert made == sample(name, length, depth, (seed,))
    assert made.found(made.prompt) == len(made.answers) == len(set(made.answers))
    assert made.prompt != sample(name, length, depth, (seed + 1,)).prompt


@given(st.sampled_from(["passkey", "needle", "kv"]), lengths, depths, seeds)
@settings(max_examples=30, deadline=None)
def test_answer_is_at_its_depth(name, length, depth, seed):
    made = sample(name, length, depth, (seed,))
    body = made.prompt.split("\n\n")[1]
    (answer,) = made.answers
    assert (made.prompt.count(answer), body.count(answer)) == (
        (2, 2) if name == "passkey" else (1, 1)
    )
    at, total = len(body[: body.index(answer)].split()), len(body.split())
    # Four statements of seven words are no filler, and the answer ends its own.
    assert abs(at - depth * total) <= 2 * UNIT[name] + 28


@given(lengths, depths, seeds)
@settings(max_examples=20, deadline=None)
def test_variables_hold_the_number(length, depth, seed):
    made = sample("variables", length, depth, (seed,))
    values = {}
    for name, other, number in re.findall(
        r"Let (\w+) be (?:equal to (\w+)|(\d+))\.", made.prompt
    ):  # in the order of the text: no variable is named before it has a value
        values[name] = values[other] if other else number
    asked = re.search(r"have the value (\d+)\?", made.prompt)[1]
    assert tuple(values) == made.answers and set(values.values()) == {asked}


@given(st.integers(60, 900), seeds)
@settings(max_examples=20, deadline=None)
def test_common_words_are_the_most_common(length, seed):
    made = sample("words", length, seed=(seed,))
    counts = collections.Counter(made.prompt.split("\n\n")[1].split())
    (*first, _), (fourth, *_) = counts.most_common(4), counts.most_common(4)[3:]
    assert {word for word, _ in first} == set(made.answers)
    assert first[2][1] >= 2 * fourth[1]


def test_keys_are_asked_once():
    made = sample("kv")
    asked = made.prompt.split()[-1]
    lines = dict(line.split(": ") for line in made.prompt.split("\n\n")[1].splitlines())
    assert lines[asked.removesuffix(":")] == made.answers[0]
    assert len(lines) == len(made.prompt.split("\n\n")[1].splitlines())


def test_answers_are_whole_words():
    both = Sample("", ("123", "abc"))
    assert both.found("123, abc.") == 2 and both.found(" 123") == 1
    assert both.found("1234 xabc abcd 0123") == 0 and both.found("") == 0


def test_no_room():
    with pytest.raises(ValueError, match=r"passkey: length must be at least \d+ tokens; got 20"):
        sample("passkey", 20)
    needed = len(TASKS["passkey"].build(synthetic.np.random.default_rng(0), 0, 0).prompt.split())
    assert len(sample("passkey", needed).prompt.split()) == needed


def test_command_line_knows_the_tasks():
    assert evaluate_retrieval.TASKS == {name: task.summary for name, task in TASKS.items()}
