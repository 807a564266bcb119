"""Calibration of CommVQ: files that go on and refuse, models that generate with them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMMVQ_FILE, write_commvq_calibration
from test_calibration import SIZES, damaged, language_model
from tiny_generators import random_prompts, tiny

import nqkv_jax as nq
from nqkv_jax.calibration import Recorder, artifact, commvq
from nqkv_jax.cli import main
from nqkv_jax.evaluation import perplexity
from nqkv_jax.models import generate

TOKENS = np.random.default_rng(0).integers(0, 256, 1000)


def run(path, **options):
    options = dict(bits=1, samples=2, seqlen=128, key_steps=2, value_steps=2, batch=64) | options
    return commvq.calibrate(language_model(), TOKENS, out=path, **options)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(file, what calibrate returned)."""
    path = tmp_path_factory.mktemp("calibrated") / "tiny.safetensors"
    return path, run(path)


def test_arrays_of_every_layer(calibrated):
    path, found = calibrated
    arrays, made = artifact.load(path, "commvq 1")
    assert made["levels"] == 2 and made["bits"] == 1 and made["model"] == "tiny"
    assert arrays["key.codebook"].shape == (2, 2, 2, 64, 32)
    assert arrays["value.codebook"].shape == (2, 64, 2, 32)
    assert arrays["encoder.outer"].shape == (2, 128, 128)
    assert {a.dtype.name for n, a in arrays.items() if n not in ("value.scale", "errors")} == {
        "float16"
    }
    np.testing.assert_array_equal(arrays["errors"], found["errors"])
    # Random tokens: 64 of 256 keys start as codewords, values are nearly white.
    assert np.all(arrays["errors"] > 0.05) and np.all(arrays["errors"] < 0.5)
    assert np.abs(arrays["key.codebook"][0] - arrays["key.codebook"][1]).max() > 0.1


def test_errors_are_those_of_the_recorded_text(calibrated):
    lm = language_model()
    texts = np.stack([TOKENS[:128], TOKENS[-128:]])
    recorded = commvq.record(lm, texts)
    apply = jax.jit(lambda tokens: lm.apply(lm.params, tokens, Recorder())[1].layers)
    layers = apply(jnp.asarray(texts))
    for side, x in zip(recorded, layers[1], strict=True):
        np.testing.assert_allclose(side[1], x, rtol=2e-3, atol=2e-3)
    arrays, _ = artifact.load(calibrated[0], "commvq 1")
    for quantizer, side, error in zip(
        commvq.quantizers(arrays, 1), recorded, arrays["errors"][1], strict=True
    ):
        side = side.reshape(2, 256, 2, 32)
        groups = jnp.asarray(side[1].astype(np.float32)).reshape(256, 1, 2, 32)
        x = np.float64(side[1])
        decoded = np.float64(commvq._round_trip(quantizer, groups)).reshape(x.shape)
        np.testing.assert_allclose(np.sum((decoded - x) ** 2) / np.sum(x**2), error, rtol=1e-3)


def test_scores_are_recorded_for_the_output_of_attention(tmp_path):
    lm = language_model()
    texts = TOKENS[None, :128]
    keys, values, queries, turned = commvq.record(lm, texts, attention=True)
    for plain, again in zip(commvq.record(lm, texts), (keys, values), strict=True):
        np.testing.assert_array_equal(plain, again)
    assert queries.shape == (2, 1, 128, 4, 32) and turned.shape == keys.shape
    # The first token is not turned, the others are, and keep their length.
    np.testing.assert_array_equal(turned[:, :, 0], keys[:, :, 0])
    assert np.abs(turned - keys).max() > 0.1
    length = lambda a: np.linalg.norm(np.float64(a), axis=-1)
    np.testing.assert_allclose(length(turned), length(keys), rtol=2e-3)
    found = run(tmp_path / "aimed.safetensors", attention=1.0)
    assert np.all(found["errors"] < 0.5)


def test_an_interrupted_calibration_goes_on(calibrated, tmp_path, monkeypatch):
    again, partial = tmp_path / "again.safetensors", tmp_path / "again.safetensors.partial"
    fit, layers = commvq._fit_layer, []

    def failing(recorded, layer, setting):
        layers.append(layer)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return fit(recorded, layer, setting)

    monkeypatch.setattr(commvq, "_fit_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    assert partial.exists() and not again.exists()
    with pytest.raises(ValueError, match=r"left by another call; these differ: seed: 0 there, 1"):
        run(again, seed=1)
    run(again)
    assert layers == [0, 1, 1]
    assert not partial.exists() and again.read_bytes() == calibrated[0].read_bytes()


def test_another_model_is_refused(calibrated):
    scheme = f"commvq:bits=1,residual=8,calibration={calibrated[0]}"
    result = perplexity(language_model(), TOKENS[:40], scheme=scheme, window=40)
    assert np.isfinite(result.nll)
    with pytest.raises(ValueError, match=r"made on tiny, .* the same weights; those of tiny are"):
        perplexity(language_model(1), TOKENS[:40], scheme=scheme, window=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_generates(kind, tmp_path):
    """With and without RoPE, and with one query head per key."""
    lm, path = tiny(kind, tokenizer=False), tmp_path / "tiny.safetensors"
    heads = lm.config.num_kv_heads
    write = functools.partial(write_commvq_calibration, path, heads=heads, head_dim=8)
    write(fingerprint=artifact.fingerprint(lm.params))
    scheme = f"commvq:bits=1,residual=16,calibration={path}"
    options = dict(scheme=scheme, max_new_tokens=6, max_len=48, prefill_chunk=16)
    first = generate(lm, random_prompts(37, 5, seed=3), **options)
    # The arrays of the calibration outlive the donated cache.
    second = generate(lm, random_prompts(37, 5, seed=3), **options)
    assert first.tokens == second.tokens and first.cache.lengths.tolist() == [42, 10]
    # Keys 12 * 3 / 8 and values 1, each with 16 bits a token.
    assert first.stored_bits == (4.5 + 1) / 2 + 16 / (8 * heads)
    write(fingerprint="another")
    with pytest.raises(ValueError, match=r"made on none, .* those of tiny are others"):
        generate(lm, [[1, 2]], **options)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("key.codebook", lambda a: a[:, :-1], r"float16 \(2, 3, 2, 64, 32\) and finite"),
        ("value.codebook", lambda a: a[:1], r"got float16 \(1, 64, 2, 32\)"),
        ("value.scale", lambda a: -a, "and positive; in layer 0 it is not"),
        ("encoder.inner", lambda a: a[..., :-1], r"encoder.inner_bias' .*\(2, 47\) and finite"),
        ("encoder.inner_bias", lambda a: a.astype(np.float32), "and finite; got float32"),
        ("encoder.outer", lambda a: a[:, :, :-1], r"\(2, 48, 128\) and finite; got"),
        ("encoder.outer", None, "it has no 'encoder.outer'"),
        ("encoder.outer_bias", lambda a: a * np.float16(np.inf), "in layer 0 it is not"),
    ],
)  # fmt: skip
def test_wrong_contents_are_refused(name, change, message, tmp_path):
    path = damaged(tmp_path / "a.safetensors", COMMVQ_FILE, {name: change})
    with pytest.raises(ValueError, match=f"{message}.* Calibrate again"):
        nq.schemes.get("commvq:bits=1", calibration=path).init(**SIZES)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bits=3), "calibrate: bits: expected one of 1, 2; got 3"),
        (dict(levels=1.5), "levels must be a whole number; got 1.5"),
        (dict(levels=0), "expected levels >= 1, .*; got levels=0, bits=1 and 2 heads x 32"),
        (dict(seqlen=1024), "seqlen must be at most 512, the positions that tiny has; got 1024"),
        (
            dict(samples=8),
            "samples=8 of seqlen=128 tokens each need 1,024 .*; got 1,000. Give",
        ),
        (dict(samples=1, seqlen=64), "at least 128 tokens in all windows; got 64"),
        (dict(value_steps=0), "expected value_steps > 0, and finite; got 0"),
        (dict(attention=-1.0), "expected attention >= 0, and finite; got -1.0"),
        (dict(temperature=-1.0), "expected temperature > 0, and finite; got -1.0"),
        (dict(learning_rate=np.inf), "expected learning_rate > 0, and finite; got inf"),
        (dict(weight_decay=np.nan), "expected weight_decay >= 0, and finite; got nan"),
        (dict(seed=-1), "expected seed >= 0, and finite; got -1"),
    ],
)
def test_refusals(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys, monkeypatch):
    lm = language_model()
    monkeypatch.setattr("nqkv_jax.cli.options.load", lambda args, check: (check(lm), lm)[1])
    text, out = tmp_path / "text.txt", tmp_path / "out.safetensors"
    text.write_text("All work and no play makes Jack a dull boy. " * 20)
    argv = ["calibrate", "commvq", "--model", "tiny", "--text", text, "--out", out, "--bits", 1]
    argv += ["--samples", 2, "--seqlen", 128, "--key-steps", 2, "--value-steps", 2, "--batch", 64]
    assert main([str(a) for a in [*argv, "--json"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "tiny" and result["bytes"] == out.stat().st_size
    assert 0 < result["key_error"] < 1 and 0 < result["value_error"] < 1
    sizes = dict(num_layers=2, batch=1, max_len=128, num_kv_heads=2, head_dim=32)
    cache = nq.schemes.get(result["scheme"]).abstract(**sizes)
    assert cache.stored_bits == (12 * 2 / 32 + 1) / 2 + 16 / 64
