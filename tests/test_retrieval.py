"""The grid of lengths and depths, with a stand-in for generation; and one real generation."""

import re
import types

import numpy as np
import pytest
import tiny_checkpoint
from tiny_language_model import TinyLM

from nqkv_jax.evaluation import retrieval
from nqkv_jax.models import from_pretrained, generate


class LongLM(TinyLM):
    config = types.SimpleNamespace(**(vars(TinyLM.config) | dict(max_positions=4096)))


LM = LongLM.random()


def reader(calls=(), sees=lambda depth: True, miss="nothing"):
    """A `generate` that answers right where `sees(depth of the pass key)`."""

    def answer(lm, prompts, *, max_new_tokens, **options):
        if isinstance(calls, list):
            calls.append(dict(prompts=len(prompts), **options))
        texts = [lm.tokenizer.decode(p[1:]) for p in prompts]  # without the BOS token
        found = [re.search(r"pass key is (\d{5})\. Remember", text) for text in texts]
        words = [
            f" {m[1]}." if sees(m.start() / len(t)) else f" {miss}"
            for m, t in zip(found, texts, strict=True)
        ]
        tokens = [list(w.encode()) for w in words]
        assert max(map(len, tokens)) <= max_new_tokens
        return types.SimpleNamespace(tokens=tokens)

    return answer


def test_grid():
    calls = []
    result = retrieval(
        LM, generate=reader(calls, lambda depth: depth > 0.5), scheme="nqkv", lengths=[1500, 800],
        depths=4, samples=3, prefill_chunk=64,
    )  # fmt: skip
    assert [(c.length, c.depth, c.correct) for c in result.cells] == [
        (n, d, 3 * (d > 0.5)) for n in (800, 1500) for d in (0.125, 0.375, 0.625, 0.875)
    ]
    assert (result.accuracy, result.recall, result.samples) == (0.5, 0.5, 24)
    np.testing.assert_allclose(result.accuracy_error, np.sqrt(0.25 / 23))
    # Wilson's formula for 12 of 24.
    z, n = 1.959964, 24
    half = z / (1 + z**2 / n) * np.sqrt(0.25 / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(result.accuracy_interval, (0.5 - half, 0.5 + half), rtol=1e-5)
    # 4,096 tokens are five texts of 800, or two of 1,500; every batch is full, and alike.
    assert [c["prompts"] for c in calls] == [5] * 3 + [2] * 6
    room = {c["prompts"]: c["max_len"] for c in calls}
    assert room == {5: 832 + 12, 2: 1536 + 12}
    assert all(str(c["scheme"]) == "nqkv" and c["prefill_chunk"] == 64 for c in calls)


def test_everything_and_nothing():
    right = retrieval(LM, generate=reader(), scheme="none", samples=4)
    assert right.accuracy == 1 and right.accuracy_error == 0
    np.testing.assert_allclose(right.accuracy_interval, (4 / (4 + 1.959964**2), 1), rtol=1e-5)
    wrong = retrieval(LM, generate=reader(sees=lambda d: False), scheme="none", samples=1)
    assert wrong.accuracy == 0 and np.isnan(wrong.accuracy_error)


def test_part_of_the_answers():
    def half(lm, prompts, **options):
        text = lm.tokenizer.decode(prompts[0][1:])
        names = re.findall(r"Let (\w+) be", text)
        return types.SimpleNamespace(tokens=[list(f" {names[0]}, {names[3]}".encode())])

    result = retrieval(LM, "variables", generate=half, scheme="none", lengths=[900], samples=1)
    assert (result.accuracy, result.recall, result.cells[0].recall) == (0, 0.4, 0.4)


def test_texts_depend_on_the_seed_alone():
    seen = []

    def keep(lm, prompts, **options):
        seen.append(prompts)
        return types.SimpleNamespace(tokens=[[] for _ in prompts])

    for scheme, seed in (("none", 0), ("nqkv", 0), ("none", 1)):
        retrieval(LM, "kv", generate=keep, scheme=scheme, lengths=[300], samples=2, seed=seed)
    assert seen[0] == seen[1] != seen[2]
    assert all(len(p) <= 300 for batch in seen for p in batch)


def test_real_generation(tmp_path):
    lm = from_pretrained(
        tiny_checkpoint.write(tmp_path, max_position_embeddings=1024), progress=False
    )
    made = []

    def keep(lm, prompts, **options):
        made.append(generate(lm, prompts, **options))
        return made[-1]

    result = retrieval(
        lm, generate=keep, scheme="int4", lengths=[500], samples=2, prefill_chunk=256
    )
    (generation,) = made
    assert generation.scheme == result.scheme == "int4" and generation.cache.max_len == 512 + 12
    # The last token of an answer is not cached.
    new = np.array([len(tokens) for tokens in generation.tokens]) - 1
    prompts = np.array([len(p) for p in generation.prompt_tokens])
    np.testing.assert_array_equal(generation.cache.lengths, prompts + new)
    assert np.all((prompts > 440) & (prompts <= 500)) and np.all(new >= 0)


@pytest.mark.parametrize("options, message", [
    (dict(task="haystack"), "task must be one of passkey, needle, .*; got 'haystack'"),
    (dict(lengths=[]), "lengths must be between 1 and 4084"),
    (dict(lengths=[500, 4090]), r"less 12 for the answer\); got \[500, 4090\]"),
    (dict(lengths=[50]), r"passkey: length must be at least \d+ tokens; got 50"),
    (dict(depths=1.5), "depths must be a whole number; got 1.5"),
    (dict(lengths=["300"]), "length must be a whole number; got '300'"),
    (dict(depths=0), "must be positive.*got 0, 8, 0"),
    (dict(samples=0), "must be positive.*got 1, 0, 0"),
    (dict(seed=-1), "got 1, 8, -1"),
    (dict(prefill_chunk=1), "prefill_chunk must be at least 2; got 1"),
    (dict(scheme="nqvk"), "unknown scheme 'nqvk'"),
])  # fmt: skip
def test_wrong_settings(options, message):
    def never(*args, **kwargs):
        pytest.fail("generated before the arguments were checked")

    with pytest.raises(ValueError, match=message):
        retrieval(LM, generate=never, **(dict(scheme="none") | options))


def test_needs_a_tokenizer():
    lm = LongLM(LM.params, tokenizer=None)
    with pytest.raises(ValueError, match="without a tokenizer"):
        retrieval(lm, generate=None, scheme="none")
