"""Bit allocation, the scores behind it, and the scheme that reads it."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_cache, make_qkv
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language_model import ByteTokenizer, TinyLM

import nqkv_jax as nq
from nqkv_jax.allocation import LADDER, Allocation, allocate, error_table, paper_error
from nqkv_jax.analysis import spectra
from nqkv_jax.calibration import kvq
from nqkv_jax.cli import main
from nqkv_jax.evaluation import perplexity
from nqkv_jax.models import LanguageModel, families, generate
from nqkv_jax.models.llama import Llama
from nqkv_jax.models.opt import Opt
from nqkv_jax.schemes import LayerShape

PAPER_LADDER = (1, 1.58, 2, 4, 6, 8)
LM = TinyLM.random()
TOKENS = np.random.default_rng(1).integers(0, 256, 60).astype(np.int32)
SHAPE = LayerShape(num_kv_heads=2, head_dim=64)


def of_norms(norms, *, budget, ladder=PAPER_LADDER):
    return allocate(error_table(np.square(norms), ladder), budget=budget, ladder=ladder)


# Allocation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms, budget, ladder, expected", [
    ([1.5, 2, 1], 4, PAPER_LADDER, [4, 4, 4]),
    ([53.8, 22.4], 2, PAPER_LADDER, [2, 2]),
    ([53.8, 22.4], 4, PAPER_LADDER, [4, 4]),
    ([7.77, 1.45], 4, PAPER_LADDER, [6, 2]),
    ([4, 1, 4, 1], 3, (2, 4), [4, 2, 4, 2]),
    ([4, 1, 4, 1], 3, (4, 2), [4, 2, 4, 2]),
    ([7.77, 1.45], 4, (8, 6, 4, 2, 1.58, 1), [6, 2]),
    ([1, 1, 1], 2.5, (2, 3), [3, 2, 2]),  # the first of equals, as far as it goes
    ([0, 0], 8, LADDER, [8, 8]),
])  # fmt: skip
def test_published_vectors(norms, budget, ladder, expected):
    assert of_norms(norms, budget=budget, ladder=ladder) == expected


def test_against_brute_force():
    """kvq.md: greedy errs only in the last steps that no longer fit; at most by a factor of two."""
    rng, equal, worst = np.random.default_rng(0), 0, 1.0
    for _ in range(150):
        norms, budget = rng.uniform(0.5, 10, 3), rng.uniform(1.2, 7)
        errors = error_table(norms**2, PAPER_LADDER)
        column = {bits: i for i, bits in enumerate(PAPER_LADDER)}
        total = lambda bits, errors=errors, column=column: sum(
            row[column[b]] for row, b in zip(errors, bits, strict=True)
        )
        fitting = (b for b in itertools.product(PAPER_LADDER, repeat=3) if sum(b) <= 3 * budget)
        best = min(map(total, fitting))
        ratio = total(of_norms(norms, budget=budget)) / best
        assert ratio >= 1 - 1e-12
        equal, worst = equal + (ratio < 1 + 1e-9), max(worst, ratio)
    assert equal > 0.85 * 150 and worst <= 2, (equal, worst)


NORMS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@given(NORMS, st.floats(2, 9))
@settings(max_examples=200, deadline=None)
def test_laws(norms, budget):
    bits = of_norms(norms, budget=budget, ladder=LADDER)
    assert set(bits) <= set(LADDER) and sum(bits) <= len(bits) * budget * (1 + 1e-9)
    # What is left is not enough for a step of anything.
    left = len(bits) * budget - sum(bits)
    steps = {2: 1, 3: 1, 4: 4, 8: np.inf}
    assert all(steps[b] > left - 1e-9 for b in bits)
    # The steps of this ladder do not shrink, so that a larger norm never has fewer bits.
    for (n, b), (m, c) in itertools.product(zip(norms, bits, strict=True), repeat=2):
        assert b >= c or n <= 1.001 * m
    # Neither units nor the order of the ladder matter.
    for factor in (1e-4, 1e4):
        assert of_norms([factor * n for n in norms], budget=budget, ladder=LADDER) == bits
    assert of_norms(norms, budget=budget, ladder=(8, 2, 4, 3)) == bits


@given(st.integers(1, 40), st.sampled_from(LADDER))
@settings(max_examples=30, deadline=None)
def test_equal_norms_on_the_ladder_are_uniform(count, budget):
    assert of_norms([0.3] * count, budget=budget, ladder=LADDER) == [budget] * count


def test_a_measured_error_table():
    """Widths are told apart by their errors alone, also where a bit more buys nothing at first."""
    errors = [[4.0, 1.0, 0.95], [4.0, 3.9, 0.0]]
    assert allocate(errors, budget=3, ladder=(2, 3, 4)) == [3, 3]
    assert allocate(errors, budget=2.5, ladder=(2, 3, 4)) == [3, 2]
    assert allocate([row[::-1] for row in errors], budget=2.5, ladder=(4, 3, 2)) == [3, 2]
    table = error_table([1, 4], (2, 3), error={2: 0.2, 3: 0.04}.get)
    np.testing.assert_allclose(table, [[0.2, 0.04], [0.8, 0.16]])


@pytest.mark.parametrize("errors, options, message", [
    ([[1, 1]], dict(budget=1.9, ladder=(2, 4)), "at least the narrowest width, 2; got 1.9"),
    ([[1, 1]], dict(budget=np.nan, ladder=(2, 4)), "got nan"),
    ([[1, 1]], dict(budget=3, ladder=(2, 2)), r"different positive widths; got \(2, 2\)"),
    ([[1, 1]], dict(budget=3, ladder=(0, 2)), "different positive widths"),
    ([[1, 1]], dict(budget=3), r"\[matrices, 4\].*got shape \(1, 2\)"),
    ([1, 1], dict(budget=3, ladder=(2, 4)), r"got shape \(2,\)"),
    ([[np.inf, 1]], dict(budget=3, ladder=(2, 4)), "finite and >= 0"),
    ([[-1, 1]], dict(budget=3, ladder=(2, 4)), "finite and >= 0"),
])  # fmt: skip
def test_allocate_refuses(errors, options, message):
    with pytest.raises(ValueError, match=message):
        allocate(errors, **options)


# The file ----------------------------------------------------------------------------------------

ALLOCATION = Allocation(model="tiny", fingerprint="", score="activation", budget=3.0,
                        ladder=(2, 3, 4, 8), key_bits=(4, 3), value_bits=(3, 2))  # fmt: skip


def test_file_round_trip(tmp_path):
    ALLOCATION.save(tmp_path / "a.json")
    loaded = Allocation.load(tmp_path / "a.json")
    assert loaded == ALLOCATION and loaded.mean_bits == 3 and not loaded.is_uniform
    entry = json.loads((tmp_path / "a.json").read_text())
    assert entry["num_layers"] == 2 and entry["key_bits"] == [4, 3]


@pytest.mark.parametrize("change, message", [
    (dict(record="a diary"), 'must hold "record": "nqkv allocation 2". Make one with nqkv'),
    (dict(score=None, extra=1), "must hold budget, fingerprint, key_bits.*got .*extra"),
    (dict(num_layers=3), "key_bits for each of num_layers=3 layers; got"),
    (dict(value_bits=[2]), "value_bits for each of num_layers=2"),
    (dict(key_bits=[4, 5]), r"key_bits of the ladder \[2, 3, 4, 8\]; got \[4, 5\]"),
    (dict(key_bits=[4, "3"]), "key_bits of the ladder"),
    (dict(key_bits=[4, float("nan")]), r"key_bits of the ladder .*got \[4, nan\]"),
    (dict(key_bits="43"), "key_bits for each of num_layers=2 layers; got 43"),
    (dict(fingerprint=7), "a text as each of model, fingerprint, score; got"),
    (dict(key_bits=[], value_bits=[], num_layers=0), "key_bits for each of num_layers=0"),
])  # fmt: skip
def test_file_refuses(tmp_path, change, message):
    path = tmp_path / "a.json"
    ALLOCATION.save(path)
    entry = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in entry.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        Allocation.load(path)


def test_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read: No such file.*Make one"):
        nq.schemes.get(f"kvq:allocation={tmp_path / 'none.json'}")
    (tmp_path / "a.json").write_text("bits: 4")
    with pytest.raises(ValueError, match="must be a JSON file"):
        nq.schemes.get(f"kvq:allocation={tmp_path / 'a.json'}")


# The scheme --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, plain", [
    ("quanto", "quanto:bits=4,group_size=32,residual=16"),
    ("hqq", "hqq:bits=4,group_size=32,residual=16"),
    ("nqkv", "nqkv:bits=4,block_size=32,residual=16"),
])  # fmt: skip
def test_all_widths_4_is_the_plain_4_bit_cache(backend, plain, tmp_path):
    path = tmp_path / "four.json"
    four = dict(budget=4, ladder=(4,), key_bits=(4,), value_bits=(4,))
    dataclasses.replace(ALLOCATION, **four).save(path)
    options = f"backend={backend},group_size=32,residual=16"
    shape = LayerShape(num_kv_heads=2, head_dim=32)
    specs = [plain, f"kvq:k_bits=4,v_bits=4,{options}", f"kvq:allocation={path},{options}"]
    # Equal quantizers in equal windows are one program; once the bits themselves are compared.
    assert len({nq.schemes.get(spec).layer(shape) for spec in specs}) == 1
    assert nq.schemes.get(f"kvq:{options}").layer(shape) != nq.schemes.get(plain).layer(shape)
    if backend == "quanto":
        _, k, v = make_qkv(40)
        append = jax.jit(lambda layer: layer.append(k, v, jnp.array([40, 23]), None))
        caches = [append(make_cache(spec, max_len=48).layers[0]) for spec in specs]
        chex.assert_trees_all_equal(*caches)


def test_widths_per_layer(tmp_path):
    ALLOCATION.save(tmp_path / "a.json")
    scheme = nq.schemes.get(f"kvq:allocation={tmp_path / 'a.json'}")
    cache = scheme.init(num_layers=2, batch=1, max_len=256, num_kv_heads=2, head_dim=64)
    for layer, key, value in zip(cache.layers, (4, 3), (3, 2), strict=True):
        for side, bits in ((layer.key, key), (layer.value, value)):
            stored = sum(a.nbytes for a in jax.tree.leaves(side.body))
            assert 8 * stored == (bits + 0.5) * side.capacity * 128
    assert cache.stored_bits == ALLOCATION.mean_bits + 0.5
    with pytest.raises(ValueError, match="for 2 layers of tiny; this model has 3"):
        scheme.init(num_layers=3, batch=1, max_len=256, num_kv_heads=2, head_dim=64)


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    path, sizes = tmp_path / "a.json", dict(batch=1, max_len=256, num_kv_heads=2, head_dim=64)
    four = dict(budget=4, ladder=(4,), key_bits=(4, 4), value_bits=(4, 4))
    for allocation in (ALLOCATION, dataclasses.replace(ALLOCATION, **four)):
        allocation.save(path)
        scheme = nq.schemes.get(f"kvq:allocation={path}")
        assert scheme.abstract(num_layers=2, **sizes).stored_bits == allocation.mean_bits + 0.5
        assert nq.schemes.get(f"kvq:allocation={path}") is scheme


def test_an_allocation_of_another_model_is_refused(tmp_path):
    """Before anything is computed, and by whatever caches; the same weights are taken."""
    path = tmp_path / "a.json"
    kvq.calibrate(LM, TOKENS, budget=3, group_size=32).save(path)
    scheme = nq.schemes.get(f"kvq:allocation={path},group_size=32")
    other = TinyLM.random(seed=1, name="other")
    scheme.check_model(LM)
    scheme.check_model(dataclasses.replace(LM, name="the same under another name"))
    message = "kvq: the calibration was made on tiny, .*same weights; those of other are others"
    with pytest.raises(ValueError, match=message):
        scheme.check_model(other)
    with pytest.raises(ValueError, match="Run `nqkv calibrate kvq --model other"):
        perplexity(other, "Call me Ishmael. " * 5, scheme=scheme, window=32, progress=False)
    with pytest.raises(ValueError, match=message.replace("other are", "byte are")):
        lm = dataclasses.replace(BYTES, tokenizer=None)
        generate(lm, [[1, 2, 3]], scheme=scheme, max_new_tokens=2)


@pytest.mark.parametrize("backend, bits", [("quanto", 3.5), ("hqq", 3.5), ("nqkv", 3.25)])
def test_stored_bits_of_k4v2(backend, bits):
    sizes = dict(num_layers=1, batch=1, max_len=1024, num_kv_heads=32, head_dim=128)
    assert nq.schemes.get(f"kvq:backend={backend}").abstract(**sizes).stored_bits == bits


@pytest.mark.parametrize("spec, message", [
    ("kvq:backend=kivi", "kvq: backend: expected one of quanto, hqq, nqkv; got 'kivi'"),
    ("kvq:k_bits=6", "kvq: k_bits: expected one of 2, 3, 4, 8; got 6"),
    ("kvq:backend=nqkv,k_bits=8", "nqkv: bits: expected one of 2, 3, 4; got 8"),
    ("kvq:allocation=a.json,v_bits=4", "from the allocation or from k_bits and v_bits; got both"),
])  # fmt: skip
def test_wrong_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get(spec)


# Scores ------------------------------------------------------------------------------------------


def keys_and_values():
    """f64 [layers][2][tokens, 64] of `LM`, layer 0 only exact: it does not depend on attention."""
    x = np.asarray(LM.params["embed"], np.float64)[TOKENS]
    y = x / np.sqrt(np.mean(x**2, 1, keepdims=True) + 1e-6)
    kv = (y @ np.asarray(LM.params["layers"][0]["kv"], np.float64)).reshape(-1, 4, 32)
    return kv[:, :2], kv[:, 2:]


def test_recorded_keys_are_those_before_rope():
    keys, values = kvq.record(LM, TOKENS)
    assert len(keys) == len(values) == 2
    for found, expected in zip((keys[0], values[0]), keys_and_values(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
        mean = (expected**2).sum((1, 2)).mean()
        np.testing.assert_allclose(kvq.mean_square_norm(found), mean, rtol=1e-5)


def test_sensitivity_equals_quantizing_one_side_of_one_layer():
    """Against the exact model and `DecodedView` of a scheme that quantizes one side."""
    make = lambda bits: nq.BlockQuantizer(nq.codebooks.uniform(bits), block_size=32, scale="minmax")
    found = kvq.sensitivity(LM, TOKENS, [make(2), make(4)], progress=False)
    assert found.shape == (2, 2, 2) and np.all(found > 0)
    assert np.all(found[..., 0] > 3 * found[..., 1])  # two bits harm more than four

    def logits(which, side, bits):
        full = nq.FullPrecision()

        def layer(shape):
            sides = dict(key=full, value=full)
            if shape.layer == which:
                sides[side] = make(bits)
            return nq.schemes.LayerScheme(**sides)

        scheme = nq.schemes.Scheme("one", (), layer, "")
        view = nq.DecodedView(scheme=scheme, num_layers=2, dtype=jnp.dtype("float32"))
        out = jax.jit(lambda t: LM.apply(LM.params, t, view)[0])(jnp.asarray(TOKENS)[None])
        return np.asarray(jax.nn.log_softmax(out[0]), np.float64)

    exact = logits(-1, "key", 2)
    for at, (which, side) in {(0, 0): (0, "key"), (1, 1): (1, "value")}.items():
        moved = logits(which, side, 2)
        divergence = np.mean(np.sum(np.exp(exact) * (exact - moved), axis=-1))
        np.testing.assert_allclose(found[*at, 0], divergence, rtol=0.02)


def real_model(family):
    """Two layers, random weights, a token per byte."""
    config = families.presets["llama-3-8b" if family is Llama else "opt-125m"]
    config = dataclasses.replace(
        config, num_layers=2, hidden_size=64, num_heads=2, head_dim=32, ffn_size=64,
        vocab_size=256, max_positions=64,
        **(dict(num_kv_heads=1) if family is Llama else dict(num_kv_heads=2, embed_size=64)),
    )  # fmt: skip
    model = family(config, rngs=nnx.Rngs(0))
    return LanguageModel(
        model=model, config=config, tokenizer=ByteTokenizer(), name="byte", dtype=jnp.float32
    )


BYTES = real_model(Llama)


@pytest.mark.parametrize("family", [Llama, Opt])
def test_projections_are_what_makes_keys_and_values(family):
    lm = real_model(family)
    layer, model = lm.model.layers[0], lm.model
    x = model.embed(TOKENS[None])
    if family is Opt:
        x = x + model.positions(2 + np.arange(TOKENS.size))[None]
        layer.qkv.bias[...] = jnp.arange(3.0 * 64)
    y = np.asarray(layer.attention_norm(x))[0]
    for found, w, at in zip(kvq.record(lm, TOKENS), kvq.projections(lm)[0], (64, 128), strict=True):
        bias = np.arange(at, at + 64) if family is Opt else 0
        np.testing.assert_allclose(found[0].reshape(60, -1), y @ w + bias, rtol=1e-4, atol=1e-5)


def test_norms_of_weights():
    lm = real_model(Llama)
    for layer, factor in zip(lm.model.layers, (8, 4), strict=True):
        layer.qkv.kernel[...] = layer.qkv.kernel[...].at[:, 64:96].multiply(factor)  # keys
    weights = kvq.projections(lm)
    for score, kind in {"weight_frobenius": "fro", "weight_spectral": 2}.items():
        for law in ("paper", "measured"):
            found = kvq.calibrate(lm, budget=3, score=score, law=law, group_size=32)
            assert found.key_bits == (4, 4) and found.value_bits == (2, 2)
            assert (found.model, found.score, found.budget) == ("byte", score, 3)
        norms = [np.linalg.norm(w, kind) for pair in weights for w in pair]
        found = kvq.calibrate(lm, budget=4.6, score=score, law="paper", group_size=32)
        expected = of_norms(norms, budget=4.6, ladder=LADDER)
        assert [*found.key_bits, *found.value_bits] == expected[::2] + expected[1::2]


def test_the_measured_law():
    """kvq.md: MSE * 4^b of min–max, groups of 64, on N(0, 1)."""
    for bits, expected in {2: 3.24, 3: 2.37, 4: 2.06, 8: 1.83}.items():
        quantizer = nq.schemes.get(f"quanto:bits={bits}").layer(SHAPE).key
        error = kvq.normal_error(quantizer, 64)
        np.testing.assert_allclose(error / paper_error(bits), expected, rtol=0.015)


def test_calibrate_by_activations():
    found = kvq.calibrate(LM, TOKENS, budget=3, group_size=32)
    keys, values = kvq.record(LM, TOKENS)
    weights = [kvq.mean_square_norm(x) for pair in zip(keys, values, strict=True) for x in pair]
    error = lambda bits: kvq.normal_error(
        nq.schemes.get(f"quanto:bits={bits},group_size=32").layer(SHAPE).key, 32
    )
    expected = allocate(error_table(weights, LADDER, error), budget=3)
    assert [*found.key_bits, *found.value_bits] == expected[::2] + expected[1::2]


@pytest.mark.parametrize("options, message", [
    (dict(score="norm"), "score: expected one of activation, weight_frobenius"),
    (dict(law="cubic"), "law: expected one of measured, paper"),
    (dict(backend="kivi"), "backend: expected one of quanto, hqq, nqkv"),
    (dict(tokens=None), "score activation is measured on a text; got none"),
    (dict(score="weight_spectral"), "whose layers have a kernel `qkv`; got TinyLM.*Use score="),
    (dict(tokens=TOKENS[:1]), "expected 2 to 512 tokens, which tiny can read"),
    (dict(tokens=np.zeros(513, np.int32)), "expected 2 to 512 tokens"),
    (dict(budget=1), "at least the narrowest width, 2; got 1"),
    (dict(ladder=(2, 6)), "quanto: bits: expected one of 2, 3, 4, 8; got 6"),
])  # fmt: skip
def test_calibrate_refuses(options, message):
    options = dict(tokens=TOKENS, budget=3, group_size=32) | options
    with pytest.raises(ValueError, match=message):
        kvq.calibrate(LM, options.pop("tokens"), **options)


def test_spectra():
    layers = spectra(BYTES, TOKENS, progress=False)
    recorded, weights = zip(*kvq.record(BYTES, TOKENS), strict=True), kvq.projections(BYTES)
    for layer, xs, ws in zip(layers, recorded, weights, strict=True):
        for found, w in zip((layer.key_weight, layer.value_weight), ws, strict=True):
            np.testing.assert_allclose(found.spectral, np.linalg.norm(w, 2), rtol=1e-5)
            np.testing.assert_allclose(found.frobenius, np.linalg.norm(w), rtol=1e-5)
            assert 1 < found.stable_rank < 32 and np.all(np.diff(found.values) <= 0)
        for found, x in zip((layer.keys, layer.values), xs, strict=True):
            np.testing.assert_allclose(found.frobenius**2, kvq.mean_square_norm(x), rtol=1e-4)
            expected = np.linalg.norm(x.reshape(60, -1), 2) / np.sqrt(60)
            np.testing.assert_allclose(found.spectral, expected, rtol=1e-4)


# The command line --------------------------------------------------------------------------------


@pytest.fixture
def text(monkeypatch, tmp_path):
    monkeypatch.setattr("nqkv_jax.cli.options.load", lambda args, check: (check(BYTES), BYTES)[1])
    path = tmp_path / "text.txt"
    path.write_text("Call me Ishmael. " * 20)
    return str(path)


def test_command_allocates(text, tmp_path, capsys):
    out = tmp_path / "kvq.json"
    command = ["calibrate", "kvq", "--model", "byte", "--group-size", "32", "--out", str(out)]
    assert main([*command, "--budget", "3.5", "--text", text, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    tokens = np.frombuffer(b"Call me Ishmael. " * 4, np.uint8)[:64].astype(np.int32)
    assert Allocation.load(out) == kvq.calibrate(BYTES, tokens, budget=3.5, group_size=32)
    assert entry["key_bits"] == list(Allocation.load(out).key_bits) and not entry["uniform"]
    assert entry["mean_bits"] <= 3.5 and entry["stored_bits"] == entry["mean_bits"] + 1
    nq.schemes.get(entry["scheme"])

    assert main([*command, "--budget", "4", "--score", "weight_frobenius"]) == 0
    shown = capsys.readouterr().out
    assert "keys    44   mean 4.00\nvalues  44" in shown and "All layers got the same" in shown
    assert main([*command, "--budget", "9", "--score", "weight_frobenius"]) == 0
    assert "the budget is at an end of the ladder" in capsys.readouterr().out
    assert main([*command, "--budget", "3"]) == 2
    assert "give --text FILE" in capsys.readouterr().err


def test_command_analyzes(text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["analyze", "spectra", "--model", "byte", "--text", text, "--max-tokens", "32"]
    picture = tmp_path / "spectra.png"
    assert main([*command, "--plot", str(picture), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert len(entry["layers"]) == 2 and entry["tokens"] == 32
    first = entry["layers"][0]["keys"]
    norm = np.linalg.norm(first["singular_values"])
    np.testing.assert_allclose(norm, first["frobenius"], rtol=1e-5)
    assert picture.stat().st_size > 10_000
    assert main(command) == 0
    assert "||K|| > ||V|| in" in capsys.readouterr().out


# What it is for ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["quanto", "hqq", "nqkv"])
def test_bits_are_better_spent_on_keys(smollm2, shared_data, backend):
    """K4V2 beats K2V4 at the same number of bits."""
    text = (shared_data / "books" / "moby_dick.txt").read_text(encoding="utf-8")
    measure = lambda k, v: (
        perplexity(
            smollm2,
            text,
            scheme=f"kvq:k_bits={k},v_bits={v},backend={backend}",
            window=512,
            max_tokens=1024,
            progress=False,
        ).perplexity
    )
    assert 2 * measure(4, 2) < measure(2, 4)
