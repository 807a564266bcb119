"""Attention over the body as GPUs have it in plain XLA: in few large steps, or in one."""

import functools

import jax
import numpy as np
import pytest
from cases import ROTARY, SCHEMES, make_cache, make_qkv

import nqkv_jax as nq
from nqkv_jax import body

TOKENS = 90
BEGINNINGS = ("nqkv", "kivi:r", "kvquant:c", "turboquant", "squat:b", "nsnquant")
# One of each kind: keys that are rotated when they are read, sides with different windows, shifts.
SPECS = [next(spec for spec in SCHEMES if spec.startswith(start)) for start in BEGINNINGS]


def last_output(spec: str, new: int, window: int | None, lengths) -> np.ndarray:
    """Of `new` tokens after the others of a ragged batch."""
    q, k, v = make_qkv(TOKENS)
    run = lambda: jax.jit(functools.partial(nq.attend, rotary=ROTARY, window=window))
    before, after = (lambda a: a[:, :-new]), (lambda a: a[:, -new:])
    cache = make_cache(spec, max_len=TOKENS + 5)
    _, cache = run()(*map(before, (q, k, v)), cache, num_new=np.asarray(lengths))
    return np.asarray(run()(*map(after, (q, k, v)), cache)[0])


@pytest.mark.parametrize(
    "spec, new, window",
    [
        (SPECS[0], 1, None), (SPECS[1], 3, 40),
        *(pytest.param(s, 1, None, marks=pytest.mark.more) for s in SPECS[1:]),
    ],
)  # fmt: skip
def test_few_large_steps_give_what_many_small_ones_do(spec, new, window, monkeypatch):
    lengths = (TOKENS - new, 20)
    expected = last_output(spec, new, window, lengths)
    monkeypatch.setattr(body, "GPUS", ("cpu",))
    once = last_output(spec, new, window, lengths)
    monkeypatch.setattr(body, "ONCE_BYTES", 0)
    monkeypatch.setattr(body, "TILE", 1)
    monkeypatch.setattr(body, "STEP_BYTES", 20_000)  # 18 to 39 tokens of this batch
    steps = last_output(spec, new, window, lengths)
    np.testing.assert_allclose(once, expected, atol=3e-6)
    np.testing.assert_allclose(steps, expected, atol=3e-6)


@pytest.mark.optimized
def test_steps_do_not_grow_with_the_room(monkeypatch):
    """And are large, so that these are what is taken: loops decode about as many bytes."""
    monkeypatch.setattr(body, "GPUS", ("cpu",))
    monkeypatch.setattr(body, "ONCE_BYTES", 2**18)
    monkeypatch.setattr(body, "STEP_BYTES", 2**20)
    q, k, v = make_qkv(1)
    temporary = []
    for max_len in (512, 16384, 65536):
        step = jax.jit(functools.partial(nq.attend, rotary=ROTARY), donate_argnums=3)
        compiled = step.lower(q, k, v, make_cache("nqkv", max_len=max_len)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[0] < temporary[1] == temporary[2] < 2 * body.STEP_BYTES, temporary
    assert temporary[1] > body.STEP_BYTES / 4
