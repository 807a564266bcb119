"""Sampling: the filters against transformers' own, what is drawn, and bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax.models import Sampling
from nqkv_jax.models.sampling import sample, scores

VOCAB = 211


def random_logits(batch=4, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, VOCAB)) * scale).astype(np.float32)


def seen_mask(ids):
    seen = np.zeros((len(ids), VOCAB), bool)
    np.put_along_axis(seen, np.asarray(ids), True, axis=1)
    return seen


def transformers_scores(logits, sampling, ids):
    """What transformers' generate() would draw from, with the same settings."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference")
    process = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        process.append(
            transformers.RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty)
        )
    if not sampling.greedy:
        process.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        process.append(transformers.TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p is not None:
        process.append(transformers.TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p is not None:
        process.append(transformers.MinPLogitsWarper(min_p=sampling.min_p))
    return process(torch.tensor(ids), torch.tensor(logits)).numpy()


SETTINGS = [
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=17),
    dict(temperature=1.0, top_k=1000),  # more than there are tokens
    dict(temperature=1.0, top_p=0.3),
    dict(temperature=1.0, top_p=0.95),
    dict(temperature=1.0, top_p=1e-6),  # one token is always left
    dict(temperature=1.0, top_p=1.0),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=1.0, min_p=1.0),
    dict(temperature=1.0, min_p=0.0),
    dict(temperature=1.6, top_k=30, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    dict(temperature=2.5, top_p=0.9, min_p=0.02, repetition_penalty=0.8),
    dict(repetition_penalty=1.8),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_match_transformers(settings):
    sampling = Sampling(**settings)
    logits = random_logits()
    ids = np.random.default_rng(1).integers(0, VOCAB, (4, 40))
    got = np.asarray(jax.jit(scores, static_argnums=1)(logits, sampling, seen_mask(ids)))
    expected = transformers_scores(logits, sampling, ids)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_greedy_is_the_largest_logit_and_uses_no_key():
    logits = random_logits()
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(sample(logits, keys, Sampling()), logits.argmax(1))
    same = Sampling(temperature=1.0, top_k=1)
    np.testing.assert_array_equal(sample(logits, keys, same), logits.argmax(1))


def test_the_penalty_changes_the_greedy_choice():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 5], logits[0, 9] = 2.0, 1.5
    key = jax.random.key(0)
    sampling = Sampling(repetition_penalty=2.0)
    assert sample(logits, key, sampling, seen_mask([[7]]))[0] == 5
    assert sample(logits, key, sampling, seen_mask([[5]]))[0] == 9


def test_drawn_frequencies_are_the_probabilities():
    logits = np.tile(random_logits(1, scale=1.5), (20_000, 1))[:, :12]
    sampling = Sampling(temperature=0.8, top_k=6)
    keys = jax.random.split(jax.random.key(3), len(logits))
    drawn = np.asarray(sample(logits, keys, sampling))
    expected = jax.nn.softmax(scores(logits[:1], sampling)[0])
    counts = np.bincount(drawn, minlength=12) / len(drawn)
    # Four standard deviations of a frequency out of 20 000 draws.
    np.testing.assert_allclose(counts, expected, atol=4 * 0.5 / np.sqrt(len(logits)))
    assert (counts[np.asarray(expected) == 0] == 0).all()


def test_what_is_drawn_for_a_sequence_does_not_depend_on_the_others():
    sampling = Sampling(temperature=1.5, top_p=0.9)
    logits, keys = random_logits(6), jax.random.split(jax.random.key(0), 6)
    together = sample(logits, keys, sampling)
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], sampling)[0]) for i in range(6)]
    assert together.tolist() == alone


def test_one_key_draws_differently_for_every_sequence():
    logits = np.zeros((16, VOCAB), np.float32)
    drawn = sample(logits, jax.random.key(0), Sampling(temperature=1.0))
    assert drawn.dtype == jnp.int32 and len(set(drawn.tolist())) > 8


@pytest.mark.parametrize(
    "settings, sorts",
    [(dict(), 0), (dict(min_p=0.1), 0), (dict(top_p=1.0), 0), (dict(top_p=0.5), 1)],
)
def test_only_what_the_settings_need_is_built(settings, sorts):
    sampling = Sampling(temperature=1.0, **settings)
    text = str(jax.make_jaxpr(lambda x: scores(x, sampling))(random_logits()))
    assert text.count("sort[") == sorts and "top_k[" not in text


def test_settings_are_hashable_and_comparable():
    assert Sampling() == Sampling(temperature=0.0) and len({Sampling(), Sampling()}) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-1.0), "temperature must be a finite number in .*got -1.0"),
        (dict(temperature=float("nan")), "temperature must be a finite number"),
        (dict(temperature=float("inf")), "temperature must be a finite number"),
        (dict(temperature=1e-38), r"in \[1e-30, 1e30\], or 0 \(greedy\); got 1e-38"),
        (dict(temperature=1e39), r"in \[1e-30, 1e30\], or 0 \(greedy\); got 1e\+39"),
        (dict(repetition_penalty=1e-50), r"in \[1e-30, 1e30\]; got 1e-50"),
        (dict(temperature="0.5"), "temperature must be a finite number .*got '0.5'"),
        (dict(temperature=None), "temperature must be a finite number .*got None"),
        (dict(temperature=True), "temperature must be a finite number .*got True"),
        (dict(temperature=jnp.float32(1)), "temperature must be a finite number .*got Array"),
        (dict(temperature=1.0, top_k=0), "top_k must be a whole number >= 1, or None; got 0"),
        (dict(temperature=1.0, top_k=2.5), "top_k must be a whole number"),
        (dict(temperature=1.0, top_p=0.0), r"top_p must be a number in \(0, 1\]"),
        (dict(temperature=1.0, top_p=1.5), "top_p must be"),
        (dict(temperature=1.0, top_p="0.9"), "top_p must be a number .*got '0.9'"),
        (dict(temperature=1.0, top_p=[0.9]), r"top_p must be a number .*got \[0.9\]"),
        (dict(temperature=1.0, min_p="x"), "min_p must be a number .*got 'x'"),
        (dict(temperature=1.0, min_p=-0.1), r"min_p must be a number in \[0, 1\]"),
        (
            dict(repetition_penalty="x"),
            r"repetition_penalty must be a finite number in .*; got 'x'",
        ),
        (dict(repetition_penalty=0.0), "repetition_penalty must be a finite number in .* got 0.0"),
        (dict(top_k=5, top_p=0.5), "top_k=5, top_p=0.5 would change nothing.*Set a temperature"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.5))
    assert sampling == Sampling(temperature=0.5, top_k=3, top_p=0.5)
    assert sample(random_logits(), jax.random.key(0), sampling).shape == (4,)


def test_a_penalty_needs_what_was_seen():
    with pytest.raises(ValueError, match="repetition_penalty needs `seen`"):
        sample(random_logits(), jax.random.key(0), Sampling(repetition_penalty=1.1))
