"""Where two generations part, and the divergence along one of them."""

import importlib
import math
import types

import numpy as np
import pytest
from tiny_language_model import TinyLM

from nqkv_jax.evaluation import drift

LM = TinyLM.random()
TOKENS = np.arange(200) % 256
MODULE = importlib.import_module("nqkv_jax.evaluation.drift")

# By the first token of the prompt: the continuation in full precision, and with the scheme.
CONTINUATIONS = {
    0: ([5, 6, 7, 8, 9, 10], [5, 6, 7, 1, 2, 3]),
    90: ([5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10]),
    180: ([5, 6, 7, 257], [5, 6, 7, 257]),  # the model ended its text
}


def stand_in(lm, prompts, *, scheme, max_new_tokens, cache_dtype):
    assert max_new_tokens == 6 and (cache_dtype is None) == (str(scheme) == "none")
    ((first, *rest),) = prompts
    assert len(rest) == 19
    return types.SimpleNamespace(tokens=[CONTINUATIONS[first][str(scheme) != "none"]])


@pytest.fixture
def compared(monkeypatch):
    """What was read, with KL = 1, 2, 3 ... by position."""
    read = []

    def comparer(lm, scheme, dtype):
        def compare(params, tokens):
            read.append(tokens.tolist())
            return dict(kl=np.arange(1.0, tokens.size))

        return compare

    monkeypatch.setattr(MODULE, "comparer", comparer)
    return read


def test_continuations(compared):
    result = drift(
        LM, TOKENS, generate=stand_in, scheme="nqkv", prompts=3, prompt=20, length=6, buckets=2
    )
    assert [window[0] for window in compared] == [0, 90, 180]
    assert compared[0] == [*range(20), 5, 6, 7, 8, 9, 10]
    assert compared[2] == [*range(180, 200), 5, 6, 7, 257, 0, 0]
    assert result.first_tokens == (3, 6, 4) and result.parted == 1
    assert (result.common, result.common_median) == (pytest.approx(13 / 3), 4)
    np.testing.assert_allclose(result.common_error, np.std([3, 6, 4], ddof=1) / np.sqrt(3))
    # The first new token is the 20th of the window, and element 19 of what belongs to tokens 1...
    first, last = result.buckets
    assert (first.start, first.stop, first.tokens) == (0, 3, 9)
    assert (last.start, last.stop, last.tokens) == (3, 6, 7)
    assert (first.kl, first.kl_error) == (21, 0)
    np.testing.assert_allclose(last.kl, (2 * (23 + 24 + 25) + 23) / 7)
    np.testing.assert_allclose(result.kl, (21 * 9 + last.kl * 7) / 16)
    assert result.stored_bits > 4 and result.scheme == "nqkv"


def test_one_prompt(compared):
    result = drift(
        LM, TOKENS, generate=stand_in, scheme="int4", prompts=1, prompt=20, length=6, buckets=6
    )
    assert math.isnan(result.common_error) and math.isnan(result.buckets[0].kl_error)
    assert [bucket.kl for bucket in result.buckets] == [20, 21, 22, 23, 24, 25]


def test_positions_that_no_continuation_has(compared):
    ended = lambda *args, **options: types.SimpleNamespace(tokens=[[257]])
    result = drift(
        LM, TOKENS, generate=ended, scheme="int4", prompts=2, prompt=20, length=6, buckets=2
    )
    assert result.first_tokens == (1, 1) and result.parted == 0
    assert result.buckets[0].tokens == 2
    assert result.buckets[1].tokens == 0 and math.isnan(result.buckets[1].kl)


def test_one_continuation_ends_early(compared):
    def shorter(lm, prompts, *, scheme, **options):
        return types.SimpleNamespace(tokens=[[1, 2, 3] if str(scheme) == "none" else [1, 2]])

    result = drift(LM, TOKENS, generate=shorter, scheme="int4", prompts=1, prompt=20, length=6)
    assert result.first_tokens == (2,) and result.parted == 1


@pytest.mark.parametrize("options, message", [
    (dict(prompts=1.5), "prompts must be a whole number; got 1.5"),
    (dict(prompts=0), "must be positive.*got 0, 128 and 256"),
    (dict(length=500), "prompt \\+ length at most 512.*got 8, 128 and 500"),
    (dict(buckets=0), "buckets must be between 1 and length=256; got 0"),
    (dict(), "at least 1,024 tokens, prompts=8 of prompt=128 each; got 200. Give a longer text"),
    (dict(scheme="nqvk"), "unknown scheme"),
])  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        drift(LM, TOKENS, generate=None, **(dict(scheme="int4") | options))
