"""Heads of any size: every scheme serves them, or says what to take, and that does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nqkv_jax as nq
from nqkv_jax.quantizers import Hadamard

# Whose defaults, or whose options, do not fit every head.
SPECS = [
    "int4", "int4:group_size=64", "int8:group_size=256", "fp8", "ott",
    "nqkv", "nqkv:bits=3,block_size=64", "nqkv:block_size=256", "nqkv:hadamard=True,residual=64",
    "nqkv-plus", "nqkv-plus:bits=3", "nqkv-plus:group_size=64", "nqkv-plus:fused=False,bits=2",
    "kivi", "kivi:bits=4,group_size=64", "kivi:group_size=80", "kivi:residual=100",
    "kivi:group_size=1", "squat", "squat:group_size=64,residual=64",
    "quanto", "quanto:group_size=100", "quanto:axis=tokens,residual=100", "hqq", "kvq",
    "kvq:backend=hqq,group_size=128", "kvq:backend=nqkv", "kvq:backend=nqkv,group_size=256",
    "quarot", "quarot:bits=8", "quarot:heads_per_group=2", "quarot:heads_per_group=3",
    "turboquant", "turboquant:variant=prod,bits=3", "turboquant:bits=1",
    "nsnquant", "nsnquant:bits=1", "nsnquant:hadamard=False", "nsnquant:window=63",
    "nsnquant:residual=100",
]  # fmt: skip
PHI, OTHERS = (4, 80), [(1, 80), (3, 80), (4, 96), (1, 112), (3, 112), (1, 256), (3, 256), (3, 160)]


def sizes(heads, head_dim):
    return dict(num_layers=1, batch=1, max_len=200, num_kv_heads=heads, head_dim=head_dim)


ADVICE = r".*; got .*\. Take ([^ ]+?)(?: or ([^ ]+))?(, which .*)?"


def with_options(spec, options):
    name, _, given = spec.partition(":")
    merged = dict(item.split("=") for item in f"{given},{options}".split(",") if item)
    return f"{name}:{','.join('='.join(item) for item in merged.items())}"


def followed(spec, heads, head_dim):
    """What serves heads of this size, by the advice of messages, each of which may be the last."""
    todo, found = [spec], []
    for _ in range(8):
        if not todo:
            break
        spec = todo.pop()
        try:
            nq.schemes.get(spec).abstract(**sizes(heads, head_dim))
        except ValueError as error:
            assert str(error).startswith(spec.partition(":")[0])
            given = re.fullmatch(ADVICE, str(error))
            assert given, error
            for advice in filter(None, given.groups()[:2]):
                name = advice.partition(":")[0]
                known = name in nq.schemes.names()
                todo.append(advice if known else with_options(spec, advice))
        else:
            found.append(spec)
    assert found and not todo
    return found


@pytest.mark.parametrize("heads, head_dim", [PHI, *OTHERS])
def test_advice_works(heads, head_dim):
    for spec in SPECS:
        assert followed(spec, heads, head_dim)


def test_advice_is_for_the_scheme_and_its_options():
    get = lambda spec: followed(spec, *PHI)
    assert get("nqkv") == ["nqkv"] and get("nqkv-plus") == ["nqkv-plus"]
    assert get("kivi:bits=4") == ["kivi:bits=4,group_size=16"]
    assert get("kvq:backend=nqkv,group_size=256") == ["kvq:backend=nqkv,group_size=160"]
    assert get("turboquant:bits=3") == ["turboquant:bits=3"]
    # There is no Hadamard matrix of 184 here.
    assert followed("turboquant:bits=3", 4, 184) == ["turboquant:bits=3,rotation=haar"]
    assert followed("quarot:bits=3", 4, 184) == ["turboquant:rotation=haar,bits=3"]
    # Where no group of eight or more divides head and residual, the residual goes with the group.
    assert followed("kivi:bits=8", 4, 81) == ["kivi:bits=8,group_size=27,residual=135"]
    assert followed("kivi:bits=8", 4, 83) == ["kivi:bits=8,group_size=83,residual=166"]


# What is taken at 80 in place of something else, and what has a Hadamard transform of 4 * 20.
TAKEN = [
    "kivi:group_size=16", "squat:group_size=16", "quanto:group_size=40", "hqq:group_size=40",
    "kvq:group_size=40", "nqkv:block_size=160", "int4:group_size=160", "turboquant:rotation=haar",
    "turboquant:rotation=haar,bits=3", "turboquant", "quarot", "nqkv-plus", "nsnquant",
    "nqkv:hadamard=True,residual=64",
]  # fmt: skip


MORE = functools.partial(pytest.param, marks=pytest.mark.more)
QUICK = "kivi:group_size=16", "nqkv:block_size=160", "turboquant", "nsnquant"


@pytest.mark.parametrize("spec", [s if s in QUICK else MORE(s) for s in TAKEN])
def test_what_is_taken_decodes(spec):
    heads, head_dim = PHI
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 131, heads, head_dim)), "f4") for _ in range(3))
    cache = nq.schemes.get(spec).init(**sizes(*PHI), dtype=jnp.float32)
    attend = jax.jit(nq.attend)
    _, cache = attend(*(a[:, :130] for a in (q, k, v)), cache)
    out, _ = attend(*(a[:, 130:] for a in (q, k, v)), cache)
    exact, _ = attend(q, k, v)
    error = jnp.linalg.norm(out[:, 0] - exact[:, -1]) / jnp.linalg.norm(exact[:, -1])
    assert error < 0.7  # of 2 bits; of what has nothing to do with it, 1.4


def test_quantizers_speak_of_their_own_attributes():
    with pytest.raises(ValueError, match=r"got 90. Give a size .*2, or use Rotation\(seed=0\)"):
        Hadamard().check(4, 90)
    quantizer = nq.BlockQuantizer(nq.codebooks.normal_float(3), block_size=4)
    with pytest.raises(ValueError, match=r"3 bits .*; got 100, which is one for codes of 2, 4, 6"):
        quantizer.check(4, 100)
