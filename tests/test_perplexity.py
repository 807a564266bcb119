"""Perplexity in parallel against the decode loop, the windows, and resuming."""

import dataclasses
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_language_model import TinyLM

from nqkv_jax import schemes
from nqkv_jax.evaluation import decode_perplexity, perplexity

LM = TinyLM.random()
APPLY = jax.jit(LM.apply)
TOKENS = np.random.default_rng(1).integers(0, 256, 100)

SCHEMES = [
    "none", "int4", "fp8", "nqkv", "nqkv:sinks=3",
    "nqkv:bits=2,residual=16,centre=True,hadamard=True", "kivi:group_size=8,residual=16",
    "kivi:residual=32,sinks=2,keys=unrotated",
]  # fmt: skip


MODULE = importlib.import_module("nqkv_jax.evaluation.perplexity")  # not its function of that name


@pytest.fixture(autouse=True, scope="module")
def compile_once_per_setting():
    """Most tests here are not about the model: they share what it was compiled to."""
    parallel, known = MODULE._parallel, {}

    def shared(lm, scheme, dtype, window):
        key = (id(lm), scheme, dtype, window)
        if key not in known:
            # The model is kept too, as another one could get its id.
            known[key] = lm, parallel(lm, scheme, dtype, window)
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_parallel", shared)
        yield


def reference_nll(lm, tokens):
    """Float64 NLL of tokens 1.. of one window of up to 30, without a cache."""
    padded = np.zeros((1, 30), np.int32)  # one shape, one compilation
    padded[0, : len(tokens)] = tokens
    logits, _ = APPLY(lm.params, padded)
    logits = np.asarray(logits[0, : len(tokens) - 1], np.float64)
    top = logits.max(axis=1)
    log_total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return log_total - logits[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize(
    "scheme",
    [*(pytest.param(s, marks=pytest.mark.more) for s in SCHEMES[:4]), *SCHEMES[4:]],
)
def test_parallel_equals_decode_loop(scheme):
    # The last window is shorter: 40 + 40 + 20.
    parallel = perplexity(LM, TOKENS, scheme=scheme, window=40)
    loop = decode_perplexity(LM, TOKENS, scheme=scheme, window=40)
    assert parallel.tokens == loop.tokens == 97 and parallel.windows == loop.windows == 3
    # Not to the bit: matrix products of other shapes round differently, and a code may then flip.
    np.testing.assert_allclose(parallel.nll, loop.nll, rtol=1e-4)
    np.testing.assert_allclose(parallel.standard_error, loop.standard_error, rtol=1e-2)
    assert loop.through_cache and not parallel.through_cache
    if scheme != "none":
        full = perplexity(LM, TOKENS, window=40)
        # The agreement above says something only if the scheme changes more than it tolerates.
        assert abs(parallel.nll - full.nll) > 5e-4 * full.nll


def first_layers(lm, count):
    model = nnx.clone(lm.model)
    model.layers = nnx.List(list(model.layers)[:count])
    config = dataclasses.replace(lm.config, num_layers=count)
    return dataclasses.replace(lm, model=model, config=config)


@pytest.mark.parametrize("scheme, tolerance, layers", [
    pytest.param("none", 1e-5, 10, marks=pytest.mark.more),
    ("nqkv", None, 10),
    pytest.param("none", 1e-5, 30, marks=pytest.mark.slow),
    pytest.param("nqkv", None, 30, marks=pytest.mark.slow),
    pytest.param("kivi:residual=32", 2e-3, 30, marks=pytest.mark.slow),
    pytest.param("int4", None, 30, marks=pytest.mark.slow),
    pytest.param("fp8", None, 30, marks=pytest.mark.slow),
])  # fmt: skip
def test_parallel_equals_decode_loop_smollm2(smollm2, scheme, tolerance, layers):
    """Layers of the real model, which are rougher than those of the one above.

    Where every token is encoded at once, a rounding error in the last bit of the weights grows to
    about 1 % of the NLL (a code flips, and then others do). The two forms must then agree as far as
    either agrees with itself under such an error; the small model shows that they agree to four
    digits where there is no such noise.
    """
    text = "The tower is 324 metres tall, about the same height as an 81-storey building. " * 5
    options = dict(scheme=scheme, window=96, max_tokens=96)
    smollm2 = first_layers(smollm2, layers)
    parallel = perplexity(smollm2, text, **options)
    loop = decode_perplexity(smollm2, text, **options)
    assert parallel.tokens == loop.tokens == 95
    if tolerance is not None:
        np.testing.assert_allclose(parallel.nll, loop.nll, rtol=tolerance)
        return
    tokens = np.array(smollm2.tokenizer.encode(text, add_special_tokens=False)[:96], np.int32)
    score = MODULE._parallel(smollm2, schemes.get(scheme), jnp.dtype("float32"), 96)
    nudged = [float(jnp.mean(score(nudge(smollm2.params, seed), tokens, 96))) for seed in range(4)]
    noise = np.ptp([parallel.nll, *nudged])
    assert noise > 1e-3  # else the tolerance above should be used
    assert min(nudged) - noise < loop.nll < max(nudged) + noise


def nudge(params, seed):
    """`params`, some of the norms' scales changed by one unit in the last place."""
    rng = np.random.default_rng(seed)

    def one(a):
        if a.ndim != 1:
            return a
        return a * jnp.asarray(1 + 1.2e-7 * rng.integers(-1, 2, a.shape), a.dtype)

    return jax.tree.map(one, params)


def test_bfloat16_cache_is_seen():
    full = perplexity(LM, TOKENS, window=50)
    rounded = perplexity(LM, TOKENS, window=50, cache_dtype=jnp.bfloat16)
    assert (full.stored_bits, rounded.stored_bits) == (32, 16)
    assert full.cache_dtype == "float32" and rounded.cache_dtype == "bfloat16"
    assert 0 < abs(full.nll - rounded.nll) < 1e-2 * full.nll


def test_windows_match_float64():
    result = perplexity(LM, TOKENS, window=30)
    parts = [reference_nll(LM, TOKENS[i : i + 30]) for i in range(0, 100, 30)]
    nll = np.concatenate(parts)
    np.testing.assert_allclose(result.nll, nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(nll.mean()), rtol=1e-5)
    assert (result.tokens, result.text_tokens, result.windows) == (96, 100, 4)
    residual = np.array([part.sum() - nll.mean() * part.size for part in parts])
    expected = np.sqrt((residual**2).sum() * 4 / 3) / 96
    np.testing.assert_allclose(result.standard_error, expected, rtol=1e-3)
    low, high = result.interval
    assert low < result.perplexity < high


def test_stride_scores_every_token_once():
    result = perplexity(LM, TOKENS, window=30, stride=10)
    parts = [reference_nll(LM, TOKENS[:30])]
    parts += [reference_nll(LM, TOKENS[i : i + 30])[-10:] for i in range(10, 71, 10)]
    assert result.tokens == 99 and result.windows == 8
    np.testing.assert_allclose(result.nll, np.concatenate(parts).mean(), rtol=1e-6)


def test_rest_of_one_token_is_dropped():
    result = perplexity(LM, TOKENS, window=33)
    assert (result.windows, result.tokens) == (3, 96)  # token 99 is alone
    assert math.isnan(perplexity(LM, TOKENS[:20], window=33).standard_error)


def test_text_gets_no_bos_and_is_cut():
    text = "What is seen is what is scored. " * 4
    result = perplexity(LM, text, window=64, max_tokens=80)
    same = perplexity(LM, list(text.encode())[:80], window=64)
    assert result.text_tokens == 80 and result.nll == same.nll


def test_compiles_once(caplog):
    with jax.log_compiles():
        perplexity(LM, TOKENS, window=24, scheme="nqkv:bits=3")
    assert sum("Compiling jit(score)" in record.message for record in caplog.records) == 1


def test_nan_stays_visible():
    params = LM.params | dict(head=LM.params["head"].at[0, 0].set(jnp.nan))
    assert math.isnan(perplexity(TinyLM(params), TOKENS, window=50).perplexity)


def test_resume(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    whole = perplexity(LM, TOKENS, window=20, resume=path)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6 and json.loads(lines[0])["scheme"] == "none"

    # Killed in the third window, while its line was written.
    path.write_text("".join(lines[:3]) + lines[3][:10])
    starts = []
    parallel = MODULE._parallel

    def counting(*args):
        score = parallel(*args)
        return lambda params, tokens, length: (
            starts.append(tokens[0]) or score(params, tokens, length)
        )

    monkeypatch.setattr(MODULE, "_parallel", counting)
    again = perplexity(LM, TOKENS, window=20, resume=path)
    assert starts == [TOKENS[40], TOKENS[60], TOKENS[80]]
    assert (again.nll, again.standard_error, again.tokens) == (
        whole.nll, whole.standard_error, whole.tokens)  # fmt: skip
    assert path.read_text().splitlines()[:3] == "".join(lines[:3]).splitlines()
    assert len(path.read_text().splitlines()) == 6

    starts.clear()
    perplexity(LM, TOKENS, window=20, resume=path)
    assert not starts

    # A header that was torn is no run at all.
    path.write_text(lines[0][:20])
    assert perplexity(LM, TOKENS, window=20, resume=path).nll == whole.nll


@pytest.mark.parametrize("change", [
    dict(scheme="nqkv"), dict(window=25), dict(stride=10), dict(max_tokens=50),
    dict(cache_dtype="bfloat16"), dict(through_cache=True),
])  # fmt: skip
def test_resume_refuses_another_run(tmp_path, change):
    path = tmp_path / "run.jsonl"
    perplexity(LM, TOKENS, window=20, resume=path)
    before = path.read_bytes()
    name = next(iter(change)).replace("max_", "text_")
    with pytest.raises(ValueError, match=f"differ: .*{name}: .* there, .* now"):
        perplexity(LM, TOKENS, resume=path, **(dict(window=20) | change))
    with pytest.raises(ValueError, match="text_sha256"):
        perplexity(LM, TOKENS[::-1], window=20, resume=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content, message", [
    ("a diary\n", "one JSON object per line; line 1"),
    ("no line end", "something else"),
    ('{"a": 1}\n', "something else"),
    ("[]\n", "something else"),
])  # fmt: skip
def test_resume_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "diary.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        perplexity(LM, TOKENS, window=20, resume=path)
    assert path.read_text() == content


def test_resume_refuses_missing_windows(tmp_path):
    path = tmp_path / "run.jsonl"
    perplexity(LM, TOKENS, window=20, resume=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(ValueError, match="go on with window 1 in line 3"):
        perplexity(LM, TOKENS, window=20, resume=path)


@pytest.mark.parametrize("options, message", [
    (dict(window=1), "window must be between 2 and 512"),
    (dict(window=513), "window must be between 2 and 512, the positions that tiny has; got 513"),
    (dict(window="20"), "window must be a whole number; got '20'"),
    (dict(window=20, max_tokens=40.0), "max_tokens must be a whole number; got 40.0"),
    (dict(window=20, stride=True), "stride must be a whole number; got True"),
    (dict(window=20, stride=0), "stride must be between 1 and window=20; got 0"),
    (dict(window=20, stride=21), "got 21"),
    (dict(window=20, max_tokens=1), "max_tokens must be at least 2"),
    (dict(window=20, scheme="nqvk"), "unknown scheme 'nqvk'; there are: .*nqkv"),
    (dict(window=20, scheme="nqkv:block_size=48"), "48"),
])  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(LM, TOKENS, **options)


@pytest.mark.parametrize("text, message", [
    ("", "at least 2 tokens.*got 0"),
    ("a", "at least 2 tokens.*got 1"),
    ([1, 256, 3], r"\[0, 256\).*got 1 to 256"),
    ([1, -1], "got -1 to 1"),
    ([[1, 2], [3, 4]], r"integers \[tokens\]; got int64 of shape \(2, 2\)"),
    ([1.5, 2.5], "got float64"),
])  # fmt: skip
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=message):
        perplexity(LM, text, window=20)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer"):
        perplexity(TinyLM(LM.params, tokenizer=None), "some text", window=20)
