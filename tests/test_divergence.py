"""KL divergence against float64, and its statistics."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language_model import TinyLM

from nqkv_jax.evaluation import divergence, perplexity
from nqkv_jax.evaluation.divergence import _compare

LM = TinyLM.random()
TOKENS = np.random.default_rng(1).integers(0, 256, 100).astype(np.int32)
COMPARE = jax.jit(_compare)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def oracle(full, ours, tokens):
    """What `comparer` gives, in float64, from logits of all positions."""
    p, q = log_softmax(full)[:-1], log_softmax(ours)[:-1]
    rows, targets = np.arange(len(tokens) - 1), np.asarray(tokens)[1:]
    return dict(
        kl=(np.exp(p) * (p - q)).sum(axis=1), same=p.argmax(axis=1) == q.argmax(axis=1),
        full_nll=-p[rows, targets], nll=-q[rows, targets],
    )  # fmt: skip


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0, 30.0]),
    st.sampled_from([1.0, 20.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_logits_match_float64(seed, noise, scale):
    """From hardly any difference to none in common; 70 positions are a block and a part of one."""
    rng = np.random.default_rng(seed)
    full = (scale * rng.standard_normal((71, 24))).astype(np.float32)
    ours = (full + noise * rng.standard_normal(full.shape)).astype(np.float32)
    tokens = rng.integers(0, 24, 71).astype(np.int32)
    found, expected = COMPARE(full, ours, tokens), oracle(full, ours, tokens)
    # Log-probabilities have an error of a few units in the last place of the largest logit.
    rounding = 1e-6 * max(1, scale, noise)
    np.testing.assert_array_equal(found["same"], expected["same"])
    np.testing.assert_allclose(
        found["kl"], expected["kl"], rtol=1e-4, atol=rounding * max(noise, 1e-4)
    )
    for name in ("full_nll", "nll"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=8 * rounding)
    assert np.all(np.asarray(found["kl"]) >= 0 if noise == 0 else True)


def test_what_full_precision_rules_out_does_not_count():
    full = np.array([[0.0, 0.0, -np.inf]] * 3, np.float32)
    ours = np.array([[0.0, 0.0, 0.0]] * 3, np.float32)
    tokens = np.zeros(3, np.int32)
    np.testing.assert_allclose(COMPARE(full, ours, tokens)["kl"], np.log(1.5), rtol=1e-6)
    # The other way round a possible token was ruled out, which no finite figure can make good.
    assert np.all(np.isinf(COMPARE(ours, full, tokens)["kl"]))
    assert np.all(np.isnan(COMPARE(full * np.nan, ours, tokens)["kl"]))


def test_statistics_over_windows(tmp_path):
    result = divergence(LM, TOKENS, scheme="nqkv:bits=2", window=40, resume=tmp_path / "kl.jsonl")
    steps = list(map(json.loads, (tmp_path / "kl.jsonl").read_text().splitlines()))[1:]
    assert [len(step["kl"]) for step in steps] == [39, 39, 19]
    assert (result.tokens, result.windows, result.text_tokens) == (97, 3, 100)
    for mean, error, parts in (
        (result.kl, result.kl_error, [step["kl"] for step in steps]),
        (result.top1, result.top1_error, [step["same"] for step in steps]),
        (
            result.nll_increase,
            result.nll_increase_error,
            [np.subtract(step["nll"], step["full_nll"]) for step in steps],
        ),
    ):
        values = np.concatenate(parts)
        np.testing.assert_allclose(mean, values.mean(), rtol=1e-6)
        residual = np.array([np.sum(part) - values.mean() * len(part) for part in parts])
        np.testing.assert_allclose(error, np.sqrt((residual**2).sum() * 3 / 2) / 97, rtol=1e-6)
    kl = np.concatenate([step["kl"] for step in steps])
    np.testing.assert_allclose(result.kl_p99, np.quantile(kl, 0.99))
    np.testing.assert_allclose(result.kl_median, np.median(kl))
    np.testing.assert_allclose(result.nll - result.full_nll, result.nll_increase, atol=1e-9)
    assert 0 < result.top1 < 1 and result.kl > 0.05


def test_agrees_with_perplexity():
    ours = divergence(LM, TOKENS, scheme="int4", window=50, stride=25)
    text = perplexity(LM, TOKENS, scheme="int4", window=50, stride=25)
    # Two programs: a code on the edge between two levels may fall to either side.
    np.testing.assert_allclose(ours.nll, text.nll, rtol=1e-4)
    assert abs(ours.nll - ours.full_nll) > 5e-4 * ours.nll
    assert (ours.windows, ours.tokens) == (text.windows, text.tokens)
    np.testing.assert_allclose(ours.perplexity, math.exp(ours.nll))


def test_full_precision_does_not_diverge():
    none = divergence(LM, TOKENS[:20], scheme="none", window=50)
    assert 0 <= none.kl < 1e-9 and none.top1 == 1 and abs(none.nll_increase) < 1e-5
    assert math.isnan(none.kl_error) and none.stored_bits == 32
    rounded = divergence(LM, TOKENS[:20], scheme="none", window=50, cache_dtype="bfloat16")
    assert 100 * none.kl < rounded.kl < 1e-2 and rounded.stored_bits == 16


def test_nan_stays_visible():
    params = LM.params | dict(head=LM.params["head"].at[0, 0].set(jnp.nan))
    result = divergence(TinyLM(params), TOKENS, scheme="none", window=50)
    assert math.isnan(result.kl) and math.isnan(result.kl_p99) and math.isnan(result.perplexity)


@pytest.mark.parametrize("options, message", [
    (dict(window=1), "kl: window must be between 2 and 512"),
    (dict(window=20, stride=0), "kl: stride must be between 1 and window=20; got 0"),
    (dict(window=20, max_tokens=1), "max_tokens must be at least 2"),
    (dict(window=20, scheme="nqvk"), "unknown scheme 'nqvk'"),
    (dict(window=20, scheme="nqkv:block_size=48"), "48"),
])  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        divergence(LM, TOKENS, **(dict(scheme="none") | options))


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="kl: tiny came without a tokenizer"):
        divergence(TinyLM(LM.params, tokenizer=None), "some text", scheme="none", window=20)
