"""Scores that are capped (Gemma 2): through every kind of cache, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import oracle_outputs
from cases import BATCH, COMMVQ_FILE, ROTARY, make_cache, make_qkv
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from tiny_generators import tiny

import nqkv_jax as nq
from nqkv_jax.analysis.errors import scheme_errors
from nqkv_jax.calibration.recorder import AttentionRecorder, Recorder
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu
from nqkv_jax.rotary import Rotary

TOKENS, PROMPT = 70, 41
CAP = 2.0  # where scores have a deviation of 2

MORE = functools.partial(pytest.param, marks=pytest.mark.more)
UNROTATED = "nqkv:residual=16,centre=True,keys=unrotated"
BY_CHANNEL = "nqkv-plus:fused=False,group_size=16,recent=8"
SCHEMES = [
    ("none", True), MORE("nqkv:residual=16,centre=True,hadamard=True,sinks=4", True),
    MORE(UNROTATED, True), (UNROTATED, False), MORE("kivi:residual=32", True), (BY_CHANNEL, True),
    MORE(BY_CHANNEL, False), MORE("nsnquant:window=16,residual=32", True),
    MORE(f"commvq:bits=1,residual=8,calibration={COMMVQ_FILE}", True),
]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("rotary", "window", "soft_cap"))
def attend(q, k, v, cache, *, rotary=True, window=None, soft_cap=CAP):
    rotary = ROTARY if rotary else None
    return nq.attend(q, k, v, cache, rotary=rotary, window=window, soft_cap=soft_cap)


def view(spec):
    return nq.DecodedView(scheme=nq.schemes.get(spec), num_layers=1, dtype=jnp.dtype(jnp.float32))


@pytest.mark.parametrize("spec, rotary", SCHEMES)
def test_prompt_then_decode_matches_the_oracle(spec, rotary):
    qkv, window = [np.asarray(a) for a in make_qkv(TOKENS)], 50
    run = functools.partial(attend, rotary=rotary, window=window)
    out, cache = run(*(a[:, :PROMPT] for a in qkv), make_cache(spec, max_len=TOKENS))
    outputs = [out]
    for t in range(PROMPT, TOKENS):
        out, cache = run(*(a[:, t : t + 1] for a in qkv), cache)
        outputs.append(out)
    found = np.concatenate(outputs, axis=1)
    settings = dict(window=window, rotary=ROTARY if rotary else None)
    expect = functools.partial(oracle_outputs, spec, **settings)
    for b in range(BATCH):
        own = [a[b] for a in qkv]
        np.testing.assert_allclose(found[b], expect(*own, prompt=PROMPT, soft_cap=CAP), atol=5e-6)
    # Evaluation sees every token as decoding does, prompts included.
    parallel, _ = run(*qkv, view(spec))
    np.testing.assert_allclose(parallel[0], expect(*(a[0] for a in qkv), soft_cap=CAP), atol=5e-6)
    without, _ = run(*qkv, view(spec), soft_cap=None)
    assert np.abs(without - parallel).max() > 0.1


@pytest.mark.parametrize("kind", [Recorder, AttentionRecorder])
def test_what_records_keys_and_values_attends_with_the_cap(kind):
    qkv = make_qkv(TOKENS)
    expected = oracle_outputs("none", *(np.asarray(a[0]) for a in qkv), soft_cap=CAP)
    np.testing.assert_allclose(attend(*qkv, kind())[0][0], expected, atol=5e-6)
    np.testing.assert_allclose(attend(*qkv, None)[0][0], expected, atol=5e-6)


def test_errors_of_attention_are_measured_with_the_cap():
    lm = tiny("gemma2", head_dim=16, sliding_window=20, attn_logit_softcapping=0.5)
    (int8,) = scheme_errors(lm, np.arange(60), ["int8"], progress=False)
    assert all(0 < layer.output < 1e-3 for layer in int8.layers)


# Keys of 64 channels, all of which RoPE turns; and fewer.
FREQUENCIES = np.float32(100.0) ** -np.arange(0, 1, 1 / 32, dtype=np.float32)
WHOLE, PART = (Rotary(inverse_frequencies=FREQUENCIES[:n]) for n in (32, 24))
TILED = ["nqkv:residual=128,sinks=4", "nqkv-plus:bits=2"]


def decoder(spec, rotary):
    """decode(implementation): what one token sees of 420 others."""
    run = functools.partial(nq.attend, rotary=rotary, soft_cap=CAP)
    cache, new = make_cache(spec, max_len=640, head_dim=64), make_qkv(1, seed=1, head_dim=64)
    cache = jax.jit(run)(*make_qkv(420, head_dim=64), cache)[1]
    return lambda name: jax.jit(functools.partial(run, implementation=name))(*new, cache)[0]


@pytest.mark.parametrize("spec", [MORE(TILED[0]), TILED[1], MORE("nsnquant:bits=1")])
def test_kernels_for_tpus(spec):
    decode = decoder(spec, WHOLE)
    with pltpu.force_tpu_interpret_mode():
        found = decode("mosaic_tpu")
    np.testing.assert_allclose(found, decode("xla"), rtol=0, atol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel for GPUs needs jax 0.11")
@pytest.mark.parametrize("spec", TILED)
def test_kernel_for_gpus(spec, monkeypatch):
    interpreted = functools.partial(
        mosaic_gpu.decode_attention, interpret=plgpu.InterpretGPUParams()
    )
    monkeypatch.setattr(mosaic_gpu, "decode_attention", interpreted)
    decode = decoder(spec, WHOLE)
    # Its products are in float16.
    np.testing.assert_allclose(decode("mosaic_gpu"), decode("xla"), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rotary", [PART, None], ids=["part", "no rope"])
def test_kernels_leave_shifted_scores_to_xla(rotary):
    """Means of channels that are not turned shift all scores, which kernels do after the cap."""
    cache, new = make_cache("nqkv-plus:bits=2", max_len=1024, head_dim=64), make_qkv(1, head_dim=64)
    run = functools.partial(nq.attend, *new, cache, rotary=rotary)
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs no soft_cap where means"):
        run(soft_cap=CAP, implementation="mosaic_tpu")

    def kernels(**options):
        """Calls of kernels in what is compiled for a TPU."""
        traced = jax.jit(lambda: run(**options)).trace()
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert kernels(soft_cap=CAP) < kernels()


@pytest.mark.parametrize("cap", [0, -1.0, float("inf"), float("nan"), "50", True])
def test_a_cap_is_a_positive_number(cap):
    q, k, v = make_qkv(1)
    with pytest.raises(ValueError, match=r"expected soft_cap > 0, a number, or None; got"):
        nq.attend(q, k, v, soft_cap=cap)
