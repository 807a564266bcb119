"""What `attend` asks of its arguments."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, ROTARY, make_cache, make_qkv

import nqkv_jax as nq

GOOD = dict(q=(BATCH, 1, NUM_HEADS, HEAD_DIM), k=(BATCH, 1, NUM_KV_HEADS, HEAD_DIM))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=(1, NUM_HEADS, HEAD_DIM)), r"expected q \[batch, tokens, num_heads, head_dim\]"),
        (dict(k=(BATCH, 2, NUM_KV_HEADS, HEAD_DIM)), "agree in batch, tokens and head_dim"),
        (dict(q=(BATCH, 1, 5, HEAD_DIM)), "multiple of num_kv_heads"),
        (
            dict(q=(3, 1, NUM_HEADS, HEAD_DIM), k=(3, 1, NUM_KV_HEADS, HEAD_DIM)),
            r"cache was made for .*\(2, 2, 32\)",
        ),
        (dict(dtype=jnp.int32), "floating-point q, k, v; got int32"),
        (dict(layer=1), r"layers 0..0; got layer=1"),
        (dict(window=0), "window >= 1"),
        (dict(num_new=jnp.zeros((), jnp.int32)), r"num_new of shape \(2,\)"),
        (dict(num_new=[1.0, 1.0]), "one whole number per sequence; got float32"),
        (dict(window=2.5), "a whole number, or None; got 2.5"),
        (
            dict(q=(BATCH, 0, NUM_HEADS, HEAD_DIM), k=(BATCH, 0, NUM_KV_HEADS, HEAD_DIM)),
            "at least one",
        ),
        (dict(cache="nqkv"), "expected cache to be a KVCache .*; got str"),
        (dict(layer=np.int64(1)), r"layers 0..0; got layer=1"),
        (dict(layer=jnp.int32(0)), r"layer to be a whole number, and no array.* of type Array"),
        (dict(layer=False), "layer to be a whole number.* of type bool"),
        (dict(layer="0"), "layer to be a whole number.* of type str"),
        (dict(window=True), "window >= 1, a whole number, or None; got True"),
        (dict(window=np.int64(0)), "window >= 1, a whole number, or None; got "),
        (dict(soft_cap=True), "soft_cap > 0, a number, or None; got True"),
        (dict(soft_cap=np.float32(np.nan)), "soft_cap > 0, a number, or None; got "),
        *[
            (dict(scale=scale), "scale > 0, a finite number or an array of shape .*; got ")
            for scale in (
                0,
                -1.0,
                np.nan,
                np.inf,
                True,
                "0.1",
                np.float32(0),
                np.bool_(True),
                jnp.ones(1),
                jnp.ones(HEAD_DIM),
                jnp.float32(-1),
                jnp.bool_(True),
                np.array("a"),
                [0.1],
            )
        ],
        (dict(k=None), "q, k, v to be arrays; got ArrayImpl, NoneType, NoneType"),
        (dict(rotary=jnp.cos), "expected rotary to be a Rotary or None; got <"),
        *[
            (dict(rotary=nq.Rotary(inverse_frequencies=frequencies)), f"attend: rotary: {message}")
            for frequencies, message in (
                (jnp.ones(HEAD_DIM), f"expected at most {HEAD_DIM // 2} frequencies.*; got 32"),
                (jnp.ones((2, 4)), r"expected inverse_frequencies .*; got float32\[2, 4\]"),
                (jnp.ones(()), r"expected inverse_frequencies .*; got float32\[\]"),
                (jnp.arange(4), r"expected inverse_frequencies .*; got int32\[4\]"),
                ([1.0, 0.1], r"expected inverse_frequencies .*; got \[1.0, 0.1\]"),
                (10000.0, r"expected inverse_frequencies .*; got 10000.0"),
                (jnp.ones(0), "expected at least one frequency; got none.*rotary=None"),
                (
                    jnp.array([1, jnp.nan]),
                    r"expected inverse_frequencies to be finite; got \[ 1. nan\]",
                ),
            )
        ],
        (dict(implementation="mosaic"), "one of .*xla.*; got 'mosaic'"),
    ],
)
def test_bad_calls_are_refused(changes, message):
    shapes = GOOD | {n: changes[n] for n in ("q", "k") if n in changes}
    dtype = changes.get("dtype", jnp.float32)
    q, k = (None if shapes[n] is None else jnp.zeros(shapes[n], dtype) for n in ("q", "k"))
    changes = {n: a for n, a in changes.items() if n not in ("q", "k", "dtype")}
    with pytest.raises(ValueError, match=message):
        nq.attend(q, k, k, changes.pop("cache", make_cache("nqkv", max_len=8)), **changes)


@pytest.mark.parametrize("name", ["q", "k", "v", "cache", "num_new"])
def test_meshes_that_the_compiler_does_not_partition_are_refused(name):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    arguments = dict(zip("qkv", make_qkv(tokens=1), strict=True), num_new=jnp.ones(BATCH, int))
    arguments["cache"] = make_cache("nqkv", max_len=8)
    arguments[name] = jax.device_put(arguments[name], there)
    with pytest.raises(ValueError, match=f"axes of type Auto.*; got Explicit ones, of {name}"):
        nq.attend(**arguments)


def test_numbers_may_be_those_of_numpy_and_the_scale_an_array():
    q, k, v = make_qkv(tokens=4)
    cache = make_cache("nqkv", max_len=8, num_layers=2)
    attend = lambda scale=0.5, **numbers: nq.attend(q, k, v, cache, scale=scale, **numbers)
    out, expected = attend(layer=1, window=2, soft_cap=2.0)
    given = dict(layer=np.int64(1), window=np.int32(2), soft_cap=np.float32(2))
    chex.assert_trees_all_equal(attend(**given), (out, expected))
    chex.assert_trees_all_equal(attend(layer=1, window=2, soft_cap=2), (out, expected))
    for scale in (np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        chex.assert_trees_all_equal(attend(scale, **given), (out, expected))
    traced = jax.jit(functools.partial(attend, **given))(jnp.float32(0.5))
    chex.assert_trees_all_close(traced, (out, expected), atol=1e-6)


@pytest.mark.parametrize("name", ["window", "soft_cap"])
def test_what_must_be_static_is_said(name):
    q, k, v = make_qkv(tokens=1)
    with pytest.raises(ValueError, match=f"{name} .*; got .*Name it in static_argnames of jax.jit"):
        jax.jit(lambda number: nq.attend(q, k, v, **{name: number}))(3)


def test_any_leaf_may_be_in_the_place_of_frequencies():
    """Trees are unflattened with what functions of leaves return; arrays may have more axes."""
    for leaf in (None, 0, "name", object(), jnp.ones((2, 3)), jax.ShapeDtypeStruct((3,), int)):
        tree = jax.tree.map(lambda _, leaf=leaf: leaf, ROTARY)
        assert tree.inverse_frequencies is leaf
    q, k, v = make_qkv(tokens=2)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), ROTARY)
    attend = jax.jit(jax.vmap(lambda rotary: nq.attend(q, k, v, rotary=rotary)[0], in_axes=(0,)))
    chex.assert_trees_all_close(attend(both)[0], nq.attend(q, k, v, rotary=ROTARY)[0], atol=1e-6)


@pytest.mark.parametrize("factor", [0, -1.0, np.nan, np.inf, True, None, "1", jnp.ones(())])
def test_attention_factors_are_numbers(factor):
    with pytest.raises(ValueError, match="attention_factor > 0, a finite number; got "):
        dataclasses.replace(ROTARY, attention_factor=factor)
    assert (
        type(dataclasses.replace(ROTARY, attention_factor=np.float64(2)).attention_factor) is float
    )


@pytest.mark.parametrize("frequencies", [jnp.ones((1, 2)), jnp.arange(2), jnp.ones(HEAD_DIM)])
def test_frequencies_are_checked_where_they_are_used(frequencies):
    q, _, _ = make_qkv(tokens=2)
    with pytest.raises(ValueError, match=r"^Rotary: expected "):
        nq.Rotary(inverse_frequencies=frequencies)(q, jnp.arange(2)[None])
