"""Calibration: recorded keys and gradients, percentiles, codebooks, files that go on and refuse."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KVQUANT_FILE
from flax import nnx
from safetensors.numpy import save_file
from tiny_language_model import TinyLM

import nqkv_jax as nq
from nqkv_jax.calibration import Recorder, artifact
from nqkv_jax.calibration import kvquant as kvquant_calibration
from nqkv_jax.calibration.kvquant import BINS, calibrate, fit_levels, key_ranges, normalised_levels
from nqkv_jax.calibration.recorder import loss_and_gradients, windows
from nqkv_jax.cli import main
from nqkv_jax.evaluation import perplexity
from nqkv_jax.lloyd import lloyd
from nqkv_jax.models import LanguageModel, families, generate
from nqkv_jax.models.llama import Llama
from nqkv_jax.quantizers.dense_sparse import slots_per_side, token_range

SAMPLES, SEQLEN = 3, 128
TOKENS = np.random.default_rng(0).integers(0, 256, 1000)


@functools.cache
def language_model(seed=0):
    return TinyLM.random(seed=seed)


@functools.cache
def gradients_of(seed=0):
    lm = language_model(seed)
    return jax.jit(lambda tokens: loss_and_gradients(lm, lm.params, tokens))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(file, statistics) by weights."""
    folder, made = tmp_path_factory.mktemp("calibrated"), {}

    def make(weights="scaled_fisher"):
        if weights not in made:
            path = folder / f"{weights}.safetensors"
            made[weights] = path, run(path, weights=weights)
        return made[weights]

    return make


def run(path, **options):
    options = dict(samples=SAMPLES, seqlen=SEQLEN) | options
    return calibrate(language_model(), TOKENS, out=path, **options)


def test_recorder_attends_exactly_and_keeps_keys_before_rope():
    lm = language_model()
    apply = jax.jit(lm.apply)
    tokens = TOKENS[None, :40]
    plain, _ = apply(lm.params, tokens)
    logits, recorder = apply(lm.params, tokens, Recorder())
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    x = np.asarray(lm.params["embed"])[TOKENS[:40]].astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    kv = (x @ np.asarray(lm.params["layers"][0]["kv"], np.float64)).reshape(40, 4, 32)
    for found, expected in zip(recorder.layers[0], (kv[:, :2], kv[:, 2:]), strict=True):
        np.testing.assert_allclose(found[0], expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected layer 2 to come next; got layer=0"):
        lm.apply(lm.params, tokens, recorder)


def test_gradients_match_finite_differences():
    lm = language_model()
    tokens = jnp.asarray(TOKENS[:48], jnp.int32)
    loss, recorded, gradients = gradients_of()(tokens)

    @jax.jit
    def perturbed(deltas):
        logits, _ = lm.apply(lm.params, tokens[None], Recorder(deltas=deltas))
        log_p = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.mean(log_p[jnp.arange(47), tokens[1:]])

    zeros = [[np.zeros((1, *a.shape), np.float32) for a in pair] for pair in recorded]
    np.testing.assert_allclose(perturbed(zeros), loss, rtol=1e-5)
    assert len(gradients) == 2 and np.isfinite(loss)
    for layer in (0, 1):
        for side in (0, 1):
            gradient = np.asarray(gradients[layer][side])
            assert gradient.shape == recorded[layer][side].shape == (48, 2, 32)
            # Nothing comes after the last token that its key and value could change.
            at = np.unravel_index(np.abs(gradient[1:]).argmax(), gradient[1:].shape)
            at = (at[0] + 1, *at[1:])
            step, ends = 1e-2, []
            for sign in (1, -1):
                zeros[layer][side][(0, *at)] = sign * step
                ends.append(float(perturbed(zeros)))
            zeros[layer][side][(0, *at)] = 0
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(slope, gradient[at], rtol=0.05)


def test_the_loss_in_blocks_is_the_loss_at_once(monkeypatch):
    tokens = jnp.asarray(TOKENS[:48], jnp.int32)
    whole = gradients_of()(tokens)
    lm = language_model()
    monkeypatch.setattr("nqkv_jax.calibration.recorder.TOKEN_BLOCK", 20)  # 20, 20 and 7 of 47
    blocks = jax.jit(lambda tokens: loss_and_gradients(lm, lm.params, tokens))(tokens)
    chex.assert_trees_all_close(blocks, whole, rtol=1e-4, atol=1e-7)
    assert (
        max(np.abs(a).max() for a in jax.tree.leaves(whole[2])) > 1e-4
    )  # what atol is to be seen against


def test_the_logits_of_a_text_are_never_held_at_once():
    """The temporaries of a pass are smaller than its logits alone would be."""
    config = dataclasses.replace(
        families.presets["llama-3-8b"], num_layers=1, hidden_size=32, num_heads=1, num_kv_heads=1,
        head_dim=32, ffn_size=32, vocab_size=50_000, max_positions=1024,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    lm = LanguageModel(
        model=model, config=config, tokenizer=None, name="wide", dtype=np.dtype("float32")
    )
    tokens = jax.ShapeDtypeStruct((1024,), jnp.int32)
    compiled = jax.jit(functools.partial(loss_and_gradients, lm)).lower(lm.params, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 50_000 * 4 / 2


def record(window):
    """[layers][2] of f32[tokens - 1, hidden] and of gradients, without the sink."""
    _, recorded, gradients = gradients_of()(jnp.asarray(window, jnp.int32))
    flat = lambda tree: [[np.asarray(a)[1:].reshape(SEQLEN - 1, -1) for a in x] for x in tree]
    return flat(recorded), flat(gradients)


def test_ranges_are_percentiles_over_all_tokens_but_sinks(calibrated):
    path, _ = calibrated()
    arrays, made = artifact.load(path, "kvquant 1")
    recorded = [record(w)[0] for w in windows(language_model(), TOKENS, SAMPLES, SEQLEN)]
    assert (made["num_layers"], made["num_kv_heads"], made["head_dim"]) == (2, 2, 32)
    for layer in (0, 1):
        keys = np.concatenate([r[layer][0] for r in recorded]).astype(np.float64)
        for variant, tail in (("sparse", 0.005), ("full", 0)):
            low, high = np.quantile(keys, [tail, 1 - tail], axis=0)
            zero, scale = (arrays[f"key.{n}.{variant}"][layer].ravel() for n in ("zero", "scale"))
            np.testing.assert_allclose(zero + scale, high, atol=1e-4)
            np.testing.assert_allclose(zero - scale, low, atol=1e-4)


def test_histograms_hold_the_weighted_normalised_values(calibrated):
    """Of the last layer, against NumPy on everything at once."""
    _, statistics = calibrated()
    m = slots_per_side(0.01, 64)
    setting = dict(samples=SAMPLES, seqlen=SEQLEN, sinks=1, outliers=0.01)
    zero, scale = (a[0, 1] for a in key_ranges(statistics, setting))
    rows = [record(w) for w in windows(language_model(), TOKENS, SAMPLES, SEQLEN)]
    keys, values, dk, dv = (
        np.concatenate([row[which][1][side] for row in rows]).astype(np.float64)
        for which, side in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    x = (keys - zero) / scale
    inside = np.abs(x) <= 1 + 1e-5
    check_sums(statistics.histograms[1, 0, 0], x[inside], np.square(dk * scale)[inside])

    ranges = jax.jit(jax.vmap(lambda v: token_range(v, m)))
    zero, scale, index = map(np.asarray, ranges(values.astype(np.float32)))
    inside = np.ones(values.shape, bool)
    np.put_along_axis(inside, index, False, axis=1)
    scale = scale[:, None].astype(np.float64)
    x = (values - zero[:, None]) / scale
    assert inside.sum() == statistics.histograms[1, 1, 0, 0].sum()
    check_sums(statistics.histograms[1, 1, 0], x[inside], np.square(dv * scale)[inside])


def check_sums(histogram, x, weight):
    assert histogram[0].sum() == x.size
    np.testing.assert_allclose(histogram[1].sum(), weight.sum(), rtol=1e-4)
    np.testing.assert_allclose(histogram[2].sum(), np.sum(weight * x), rtol=1e-3)
    half = x > 0.25
    np.testing.assert_allclose(histogram[1][5 * BINS // 8 :].sum(), weight[half].sum(), rtol=0.02)


def objective(histogram, levels):
    """sum w (x - Q(x))^2 of the bins' centres of mass."""
    _, weight, first = histogram
    x = first[weight > 0] / weight[weight > 0]
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return np.sum(weight[weight > 0] * (x - nearest) ** 2)


def test_scaled_fisher_weights_give_the_least_of_their_objective(calibrated):
    """kvquant.md: of F s^2, F and none; for every layer, side and width."""
    by_weights = {w: calibrated(w)[1].histograms for w in ("scaled_fisher", "fisher", "none")}
    np.testing.assert_array_equal(
        by_weights["none"][..., 0, :], by_weights["scaled_fisher"][..., 0, :]
    )
    losses = {w: [] for w in by_weights}
    for layer in (0, 1):
        for side in (0, 1):
            target = by_weights["scaled_fisher"][layer, side, 0]
            for bits in (2, 3, 4):
                for w, histograms in by_weights.items():
                    levels = fit_levels(histograms[layer, side, 0], bits)
                    losses[w].append(objective(target, levels))
    own = np.array(losses["scaled_fisher"])
    for w in ("fisher", "none"):
        # Lloyd's algorithm finds local optima.
        assert np.all(own <= 1.01 * np.array(losses[w])) and own.sum() < np.sum(losses[w])


def test_the_objective_never_increases(calibrated):
    histogram = calibrated()[1].histograms[1, 0, 0]
    _, weight, first = histogram
    chosen = weight > 0
    x, w = first[chosen] / weight[chosen], weight[chosen]
    trace = []

    def moments(thresholds):
        at = np.searchsorted(thresholds, x)
        return np.bincount(at, w, 8), np.bincount(at, w * x, 8)

    def note(mass, centroid):
        trace.append(objective(histogram, centroid))
        return centroid

    start = np.linspace(-0.9, 0.9, 8)
    levels = lloyd(moments, start, note)
    assert len(trace) > 3
    trace = np.array([objective(histogram, start), *trace])
    assert np.all(np.diff(trace) <= 1e-12 * trace[0])
    assert objective(histogram, fit_levels(histogram, 3)) <= 1.02 * objective(histogram, levels)


def test_q_norm_keeps_mean_and_deviation(calibrated):
    histogram = calibrated()[1].histograms[0, 1, 0]
    levels = fit_levels(histogram, 2)
    moved = normalised_levels(histogram, levels)
    x = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    moment = lambda y, power: np.average(y**power, weights=histogram[0])
    for power in (1, 2):
        np.testing.assert_allclose(moment(moved[codes], power), moment(x, power), rtol=1e-9)
    assert abs(moment(levels[codes], 2) / moment(x, 2) - 1) > 0.02


def test_an_interrupted_calibration_goes_on(calibrated, tmp_path, monkeypatch):
    path, _ = calibrated()
    again, partial = tmp_path / "again.safetensors", tmp_path / "again.safetensors.partial"
    collect, calls = kvquant_calibration._Collector.__call__, []

    def failing(self, statistics, tokens):
        calls.append(statistics.done)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return collect(self, statistics, tokens)

    monkeypatch.setattr(kvquant_calibration._Collector, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    assert partial.exists() and not again.exists()
    with pytest.raises(ValueError, match=r"left by another call; these differ: seqlen: 128 there,"):
        run(again, seqlen=64)
    run(again)
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    assert not partial.exists() and again.read_bytes() == path.read_bytes()


def test_another_model_is_refused(calibrated):
    path, _ = calibrated()
    scheme = f"kvquant:bits=4,calibration={path}"
    result = perplexity(language_model(), TOKENS[:200], scheme=scheme, window=100)
    exact = perplexity(language_model(), TOKENS[:200], window=100)
    assert abs(result.nll - exact.nll) < 0.1
    with pytest.raises(ValueError, match=r"made on tiny, .* the same weights; those of tiny are"):
        perplexity(language_model(1), TOKENS[:200], scheme=scheme, window=100)


@functools.cache
def decoder(seed):
    config = families.config_from_hf(dict(
        model_type="llama", vocab_size=256, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=48,
        max_position_embeddings=160, eos_token_id=255,
    ))  # fmt: skip
    return LanguageModel(
        model=families.build(config, seed=seed), config=config, tokenizer=None, name=f"llama{seed}",
        dtype=np.dtype(np.float32),
    )  # fmt: skip


def test_generate_through_a_calibrated_cache(tmp_path):
    path = tmp_path / "llama.safetensors"
    calibrate(decoder(0), TOKENS, out=path, samples=2, seqlen=64, weights="none")
    scheme = f"kvquant:calibration={path}"
    options = dict(scheme=scheme, max_new_tokens=4, max_len=32)
    first = generate(decoder(0), [[1, 2, 3, 4]], **options)
    # The arrays of the calibration outlive the donated cache.
    second = generate(decoder(0), [[1, 2, 3, 4]], **options)
    assert first.tokens == second.tokens and first.stored_bits == 4.25
    with pytest.raises(ValueError, match=r"made on llama0, .* those of llama1 are others"):
        generate(decoder(1), [[1, 2]], **options)


def test_fingerprints_do_not_depend_on_the_dtype():
    params = decoder(0).params
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert artifact.fingerprint(params) == artifact.fingerprint(half)
    assert artifact.fingerprint(params) != artifact.fingerprint(decoder(1).params)


def test_files_of_something_else_are_refused(calibrated, tmp_path):
    path = tmp_path / "a.safetensors"
    artifact.save(path, "other 1", {"x": np.arange(3)}, dict(note="é"))
    arrays, about = artifact.load(path, "other 1")
    np.testing.assert_array_equal(arrays["x"], np.arange(3))
    assert about == dict(kind="other 1", note="é")
    with pytest.raises(ValueError, match="of kind 'kvquant 1'; got 'other 1'"):
        artifact.load(path, "kvquant 1")
    save_file({"x": np.arange(3)}, path)
    with pytest.raises(ValueError, match="it is a safetensors file of something else"):
        artifact.load(path, "other 1")
    path.write_text("no")
    with pytest.raises(ValueError, match="made by `nqkv calibrate other`; it is no safetensors"):
        artifact.load(path, "other 1")
    with pytest.raises(OSError, match="expected a regular file to replace, or none yet; got"):
        artifact.save(tmp_path, "other 1", {}, {})
    assert list(tmp_path.parent.glob(f"{tmp_path.name}*")) == [tmp_path]
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        artifact.load(tmp_path / "none", "other 1")


@pytest.mark.parametrize(
    "header, message",
    [
        ("{", r"its header is no JSON \(Expecting"),
        ("[1]", r"its header is no JSON object, but \[1\]"),
        ("{}", "it has no 'kind'. Calibrate again"),
        ('{"kind": "kvquant 1"}', "it has no 'num_kv_heads'"),
        ('{"kind": "kvquant 1", "num_kv_heads": 2, "head_dim": 32, "num_layers": 1, "outliers": 0}',
         r"it has no 'key.zero.full'"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(header, message, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.arange(3)}, path, {"nqkv_calibration": header})
    scheme = nq.schemes.get(f"kvquant:outliers=0,calibration={path}")
    with pytest.raises(ValueError, match=f"^kvquant: .*a.safetensors must be .*; {message}"):
        scheme.abstract(num_layers=1, batch=1, max_len=16, num_kv_heads=2, head_dim=32)


SIZES = dict(num_layers=2, batch=1, max_len=16, num_kv_heads=2, head_dim=32)


def damaged(path, source, changes=(), **header):
    """A copy of a calibration, {name: change of that array, None to leave it out}; its path."""
    arrays, made = artifact.load(source, f"{source.stem} 1")
    changed = {name: change and change(arrays[name]) for name, change in dict(changes).items()}
    arrays = {name: a for name, a in (arrays | changed).items() if a is not None}
    about = dict(made) | header
    artifact.save(path, about.pop("kind"), arrays, about)
    return path


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("key.zero.sparse", lambda a: a[:1],
         r"float32 \(2, 2, 32\) and finite; got float32 \(1, 2, 32\)"),
        ("key.zero.sparse", lambda a: a.astype(np.int32), "and finite; got int32"),
        ("key.scale.sparse", lambda a: a[..., :-1], r"and positive; got float32 \(2, 2, 31\)"),
        ("key.scale.sparse", lambda a: 0 * a, "and positive; in layer 0 it is not"),
        ("key.levels3.sparse", lambda a: a[0], r"float32 \(2, 8\) and ascending; got float32 \(8,"),
        ("value.levels3.sparse", lambda a: -a, "and ascending; in layer 0 it is not"),
        ("value.levels3.sparse", lambda a: a * np.nan, "and ascending; in layer 0 it is not"),
    ],
)  # fmt: skip
def test_wrong_contents_are_refused(name, change, message, tmp_path):
    path = damaged(tmp_path / "a.safetensors", KVQUANT_FILE, {name: change})
    with pytest.raises(ValueError, match=f"{name}' must be .*{message}.* Calibrate again"):
        nq.schemes.get("kvquant", calibration=path).init(**SIZES)


@pytest.mark.parametrize("size", ["2", None, 2.0, 0])
def test_sizes_that_are_no_numbers_are_refused(size, tmp_path):
    path = damaged(tmp_path / "a.safetensors", KVQUANT_FILE, num_layers=size)
    with pytest.raises(ValueError, match=f"its num_layers is no number >= 1, but {size!r}"):
        nq.schemes.get("kvquant", calibration=path).init(**SIZES)


@pytest.mark.parametrize("tokens", [[1.5] * 600, [[1] * 600], [256] * 600, [-1] * 600])
def test_ids_are_checked(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"calibrate: .*(token ids|integers)"):
        calibrate(language_model(), tokens, out=tmp_path / "a.safetensors", samples=2, seqlen=64)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weights="f"), "weights: expected one of scaled_fisher, fisher, none; got 'f'"),
        (dict(outliers=0.5), "expected 0 < outliers < 0.5 and 0 <= sinks < seqlen - 1; got"),
        (dict(samples=1.5), "samples must be a whole number; got 1.5"),
        (dict(seqlen=1024), "seqlen must be at most 512, the positions that tiny has; got 1024"),
        (
            dict(samples=8),
            "samples=8 of seqlen=128 tokens each need 1,024 .*; got 1,000. Give",
        ),
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
    argv = ["calibrate", "kvquant", "--model", "tiny", "--text", text, "--out", out, "--samples", 2]
    argv = [str(a) for a in [*argv, "--seqlen", 64, "--weights", "none", "--json"]]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "tiny" and result["bytes"] == out.stat().st_size
    assert result["scheme"] == f"kvquant:calibration={out}"
    assert (
        nq.schemes.get(result["scheme"])
        .abstract(num_layers=2, batch=1, max_len=16, num_kv_heads=2, head_dim=32)
        .stored_bits
        == (4.0 + 4.5) / 2
    )
    # A scheme with the defaults could not use this one.
    other = tmp_path / "other.safetensors"
    argv[argv.index("--out") + 1] = str(other)
    assert main([*argv, "--outliers", "0.1", "--sinks", "3"]) == 0
    scheme = json.loads(capsys.readouterr().out)["scheme"]
    assert scheme == f"kvquant:outliers=0.1,calibration={other},sinks=3"
    nq.schemes.get(scheme).abstract(**SIZES)
