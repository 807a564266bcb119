"""Decode attention where numbers are unusual: those of unseen tokens, of sinks, of small values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import CASES, arguments, dense, oracle
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from nqkv_jax.pallas_kernels.decode_attention import decode_attention, mosaic_gpu

STRICT = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True
)


@pytest.fixture(params=["xla", "mosaic_tpu", "mosaic_gpu"])
def run(request, monkeypatch):
    """`decode_attention` by one implementation, kernels in their interpreters."""
    attend = jax.jit(functools.partial(decode_attention, implementation=request.param))
    if request.param == "mosaic_tpu":
        with pltpu.force_tpu_interpret_mode(STRICT):
            yield attend
        return
    if request.param == "mosaic_gpu":
        if jax.__version_info__ < (0, 11):
            pytest.skip("the kernel and its interpreter need jax 0.11")
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        kernel = functools.partial(mosaic_gpu.decode_attention, interpret=interpret)
        monkeypatch.setattr(mosaic_gpu, "decode_attention", kernel)
    yield attend


def bits(x: float) -> np.int16:
    return np.float16(x).view(np.int16)


def test_what_is_stored_for_unseen_tokens_does_not_matter(run):
    """It may be NaN."""
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (100,), num_tiles=2)
    spoil = lambda a: a.at[:, :, :, 100:].set(bits(np.nan)).at[:, 1:].set(bits(np.nan))
    spoilt = [dataclasses.replace(side, scale=spoil(side.scale)) for side in (key, value)]
    clean, dirty = run(q, key, value, lengths), run(q, *spoilt, lengths)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    # What is seen stays visible.
    seen = dataclasses.replace(value, scale=value.scale.at[:, 0, 0, 7].set(bits(np.nan)))
    numerator = np.asarray(run(q, key, seen, lengths)[0])
    assert np.isnan(numerator[:, 0]).all() and np.isfinite(numerator[:, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cubic4-d64", "plus2-d64"])
def test_a_million_tokens(run, name):
    """Of which few are seen: places and lengths are numbers of 32 bits."""
    case, count = dataclasses.replace(CASES[name], heads=1, block=1.0), 2**13
    q, key, value, *_ = arguments(case, (1,), num_tiles=count)
    last = lambda tiles: 128 * tiles - 7
    part = functools.partial(run, q)
    whole = part(key, value, jnp.array([last(count)]), first=jnp.array([last(count) - 300]))

    def end(side, tiles=8):
        arrays = {name: getattr(side, name) for name in ("words", "scale", "zero")}
        cut = {name: a[:, -tiles:] for name, a in arrays.items() if a is not None}
        if side.waves is not None:
            starts = jax.tree.map(lambda a: a[-tiles:], side.waves.starts)
            cut["waves"] = dataclasses.replace(side.waves, starts=starts)
        return dataclasses.replace(side, **cut)

    seen = part(end(key), end(value), jnp.array([last(8)]), first=jnp.array([last(8) - 300]))
    outputs = [np.asarray(n) / np.asarray(d)[..., None] for n, d, _ in (whole, seen)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)


def test_a_side_with_room_for_more(run):
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (200,), num_tiles=2)
    roomy = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), value)
    jax.tree.map(
        np.testing.assert_array_equal, run(q, key, value, lengths), run(q, key, roomy, lengths)
    )


@pytest.mark.parametrize("name", ["cubic4", "cubic4-signed", "uniform2-minmax-parts"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_token_that_has_nearly_all_of_the_weight(run, name, size):
    """What models do with their first token, whose values are next to nothing: the output is that
    of other tokens, with a weight of exp(-18) each, and as exact as without it."""
    q, key, value, lengths, _ = arguments(CASES[name], (300,), num_tiles=4)
    # Numbers that float16 has, too: an error in a score of 18 would be one in all weights.
    q = jnp.broadcast_to(q[:, :, :1], q.shape).astype(jnp.bfloat16).astype(jnp.float32)
    scores = np.einsum("hd,thd->th", np.asarray(q[0, :, 0], np.float64), dense(key)[0, :100])
    sink = np.argmax(np.abs(scores).min(-1))  # the one that has to become larger by least
    of_block = np.repeat(18 / scores[sink], key.blocks_per_head)

    def scaled(a, by):
        return jnp.asarray((np.asarray(a).view(np.float16) * np.float16(by)).view(np.int16))

    def with_sink(side, size, sink_size):
        arrays = {name: a for name in ("scale", "zero") if (a := getattr(side, name)) is not None}
        of_sink = lambda a: a.at[0, 0, :, sink].set(scaled(a[0, 0, :, sink], sink_size))
        return dataclasses.replace(
            side, **{name: of_sink(scaled(a, size)) for name, a in arrays.items()}
        )

    key, value = with_sink(key, 1, of_block), with_sink(value, size, 0)
    numerator, denominator, maximum = map(np.asarray, run(q, key, value, lengths))
    expected, total = oracle(q, key, value, lengths, None, None)
    out = numerator / denominator[..., None]
    weight = 300 * np.exp(-18)  # about that of the others
    tolerance = 2e-3 * np.abs(dense(value)).max()
    np.testing.assert_allclose(out / weight, expected / weight, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.log(denominator) + maximum, total, rtol=1e-3)
