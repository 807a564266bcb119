"""Models that need a BOS token before every text (Gemma) get it in evaluations and calibrations."""

import dataclasses
import types

import numpy as np
import pytest
from tiny_language_model import TinyLM

from nqkv_jax.analysis import activations
from nqkv_jax.calibration import kvq, recorder
from nqkv_jax.cli import options
from nqkv_jax.evaluation import decode_perplexity, divergence, drift, perplexity
from nqkv_jax.evaluation.likelihood import check_pairs, encode_pair
from nqkv_jax.evaluation.windows import opened, windows
from nqkv_jax.models import families

BOS = 7
TOKENS = np.random.default_rng(1).integers(0, 256, 100).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class NeedsBos(TinyLM):
    config = types.SimpleNamespace(**vars(TinyLM.config), opening=(BOS,))


LM, PLAIN = NeedsBos.random(), TinyLM.random()


def test_gemma_needs_it_and_others_do_not():
    openings = {name: config.opening for name, config in families.presets.items()}
    assert openings.pop("gemma-3-270m") == openings.pop("gemma-2-2b") == (2,)
    assert set(openings.values()) == {()}
    nameless = dataclasses.replace(families.presets["gemma-3-270m"], bos_token_id=None)
    assert nameless.opening == ()


def test_windows_begin_with_it_and_score_every_token():
    text = windows("test", LM, TOKENS, size=41, stride=None, max_tokens=None)
    assert text.stride == 40 and text.spans == ((0, 0, 40), (40, 40, 80), (80, 80, 100))
    scored = []
    for i in range(len(text)):
        window, length = text.padded(i)
        assert window.shape == (41,) and window[0] == BOS and not window[length:].any()
        scored += text.scored(i, window[1:]).tolist()  # the value of a token: itself
    assert scored == TOKENS.tolist()


def test_text_that_begins_with_it_already():
    given = [BOS, *TOKENS]
    text = windows("test", LM, given, size=41, stride=None, max_tokens=None)
    np.testing.assert_array_equal(text.tokens, TOKENS)
    assert opened(LM, given) == opened(LM, TOKENS) == given
    assert opened(LM, given, 4) == [BOS, *TOKENS[-3:]] and opened(LM, given, 1) == [TOKENS[-1]]
    assert opened(PLAIN, given) == given and opened(PLAIN, given, 3) == TOKENS[-3:].tolist()


def test_windows_that_overlap():
    text = windows("test", LM, TOKENS, size=41, stride=15, max_tokens=77)
    scored = [text.scored(i, text.padded(i)[0][1:]) for i in range(len(text))]
    assert np.concatenate(scored).tolist() == TOKENS[:77].tolist()
    assert [len(part) for part in scored] == [40, 15, 15, 7]
    with pytest.raises(
        ValueError, match=r"between 1 and window=41 less 1 token before the text; got 41"
    ):
        windows("test", LM, TOKENS, size=41, stride=41, max_tokens=None)


def test_perplexity_reads_it():
    """The same as if it had been in the text all along, where it is not scored either."""
    ours = perplexity(LM, TOKENS[:30], scheme="int4", window=40)
    theirs = perplexity(PLAIN, [BOS, *TOKENS[:30]], scheme="int4", window=40)
    assert ours.tokens == theirs.tokens == 30
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=1e-6)
    loop = decode_perplexity(LM, TOKENS[:30], scheme="int4", window=40)
    np.testing.assert_allclose(ours.nll, loop.nll, rtol=1e-4)
    kl = divergence(LM, TOKENS[:30], scheme="int4", window=40)
    np.testing.assert_allclose(kl.nll, ours.nll, rtol=1e-4)
    assert kl.tokens == 30


def test_prompts_of_drift_begin_with_it():
    prompts = []

    def stand_in(lm, batch, **given):
        prompts.extend(batch)
        return types.SimpleNamespace(tokens=[[1, 2, 3, 4]])

    text = [BOS, *TOKENS]  # as its tokenizer gives it
    drift(LM, text, generate=stand_in, scheme="int4", prompts=2, prompt=8, length=4)
    assert [p[0] for p in prompts] == [BOS] * 4 and {len(p) for p in prompts} == {8}
    assert prompts[0][1:] == TOKENS[:7].tolist()


def test_calibrations_and_analyses_read_it():
    read = recorder.windows(LM, [BOS, *TOKENS], samples=2, seqlen=10)
    assert read.shape == (2, 10) and (read[:, 0] == BOS).all()
    np.testing.assert_array_equal(read[0, 1:], TOKENS[:9])
    assert read.dtype == recorder.windows(PLAIN, TOKENS, samples=2, seqlen=10).dtype == np.int32
    np.testing.assert_array_equal(options.first_tokens(LM, "abcd", 4), [BOS, *b"abc"])
    np.testing.assert_array_equal(options.first_tokens(PLAIN, "abcd", 4), [*b"abcd"])
    for check in (kvq.check_tokens, activations.check_tokens):
        np.testing.assert_array_equal(check(LM, "abc"), [BOS, *b"abc"])
        np.testing.assert_array_equal(check(LM, [BOS, 1]), [BOS, 1])


def test_contexts_begin_with_it_however_long():
    pair = encode_pair(LM, "ab", " c")
    assert check_pairs(LM, [pair]) == [([BOS, *b"ab"], [*b" c"])]
    assert check_pairs(LM, [([BOS, 5], [6])]) == [([BOS, 5], [6])]
    assert check_pairs(PLAIN, [pair]) == [pair]
    long = [BOS, *range(100)] * 6
    [(cut, _)] = check_pairs(LM, [(long, [1, 2])])
    assert len(cut) == 510 and cut == [BOS, *long[-509:]]
    [(cut, _)] = check_pairs(PLAIN, [(long, [1, 2])])
    assert cut == long[-510:]
    [(cut, _)] = check_pairs(LM, [(long, [1] * 511)])
    assert cut == long[-1:]  # no room for both
