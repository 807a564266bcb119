"""The kernel for sinks and residual: in the interpreter, and in `attend`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_attention_cases import CASES, check

import nqkv_jax as nq
from nqkv_jax.pallas_kernels import exact_attention, triton_backend
from nqkv_jax.pallas_kernels.exact_attention import unsupported

HEADS, HEAD_DIM = 2, 64
MORE = functools.partial(pytest.param, marks=pytest.mark.more)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_oracle(case):
    check(case, interpret=True)


@pytest.fixture
def taken(monkeypatch):
    """`attend` takes the kernel here, in the interpreter; a list of what it was asked for."""
    calls, kernel = [], exact_attention.exact_attention

    def interpreted(*args, **options):
        calls.append(args)
        return kernel(*args, **options, interpret=True)

    monkeypatch.setattr(triton_backend, "ASKING", ("auto",))
    monkeypatch.setattr(exact_attention, "PLATFORMS", {"cpu"})
    monkeypatch.setattr(exact_attention, "exact_attention", interpreted)
    return calls


def decoded(scheme, dtype=jnp.bfloat16, **options):
    """What the last of 150 tokens sees, where the second sequence has fewer."""
    cache = nq.schemes.get(scheme).init(
        num_layers=1, batch=2, max_len=384, num_kv_heads=HEADS, head_dim=HEAD_DIM, dtype=dtype
    )
    run = jax.jit(functools.partial(nq.attend, layer=0, **options))
    rng = np.random.default_rng(0)
    for size, fewer in ((148, 60), (1, 0), (1, 1)):
        q, k, v = rng.normal(size=(3, 2, size, 2 * HEADS, HEAD_DIM))
        new = (jnp.asarray(a, dtype) for a in (q, k[:, :, :HEADS], v[:, :, :HEADS]))
        num_new = jnp.asarray([size, size - fewer], jnp.int32)
        out, cache = run(*new, cache, num_new=num_new)
    return np.asarray(out, np.float32)


@pytest.mark.parametrize(
    "scheme, options",
    [
        ("nqkv:residual=32,sinks=4", dict(window=20)), MORE("kivi", dict(soft_cap=1.0)),
        MORE("nqkv:residual=128", {}), MORE("nqkv:sinks=3", {}), MORE("nqkv-plus", {}),
    ],
)  # fmt: skip
def test_attend_gives_the_same_with_it(scheme, options, request):
    expected = decoded(scheme, **options)
    calls = request.getfixturevalue("taken")
    found = decoded(scheme, **options)
    assert len(calls) == 1  # traced once for one token, and not for more
    np.testing.assert_allclose(found, expected, atol=0.02, rtol=0)
    assert np.abs(found[0]).max() > 0.1


def test_other_types_are_left_to_xla(taken):
    decoded("nqkv:residual=128", dtype=jnp.float32)
    assert not taken


@pytest.mark.parametrize(
    "head_dim, dtype, other, reason",
    [
        (80, jnp.bfloat16, jnp.bfloat16, "64, 128 or 256; got 80"),
        (64, jnp.float32, jnp.float32, "float16; got queries of float32"),
        (64, jnp.bfloat16, jnp.float16, "and keys of float16"),
    ],
)
def test_what_it_would_need(head_dim, dtype, other, reason):
    q, keys = jnp.zeros((1, 2, 3, head_dim), dtype), jnp.zeros((1, 9, 2, head_dim), other)
    assert reason in unsupported(q, keys)
