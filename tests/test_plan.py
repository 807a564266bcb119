"""Plans against caches that are really allocated."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from nqkv_jax import schemes
from nqkv_jax.models.families import num_params, presets
from nqkv_jax.plan import AbstractCaches, format_size, largest, parse_size, plan

SMALL = types.SimpleNamespace(num_layers=3, num_kv_heads=2, head_dim=64, max_positions=256)
SIZES = dict(num_layers=3, num_kv_heads=2, head_dim=64)
SCHEMES = ["none", "fp8", "int2", "nqkv", "nqkv:bits=3,sinks=4,residual=16", "kivi:residual=64"]


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_those_of_live_arrays(name):
    scheme = schemes.get(name)
    caches = AbstractCaches(SMALL, scheme)
    before = {id(a) for a in jax.live_arrays()}
    cache = jax.block_until_ready(jax.jit(lambda: scheme.init(**SIZES, batch=3, max_len=201))())
    alive = sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    assert alive == cache.nbytes == caches(batch=3, max_len=201).nbytes
    assert alive == scheme.abstract(**SIZES, batch=3, max_len=201).nbytes
    assert caches.stored_bits == scheme.abstract(**SIZES, batch=1, max_len=1 << 16).stored_bits


@pytest.mark.parametrize("name", SCHEMES)
def test_answers_fit_and_one_more_does_not(name):
    budget = 3_000_000
    result = plan(
        SMALL,
        [name],
        memory=budget + 1000,
        weights=600,
        reserve=400,
        contexts=[1, 100, 256],
        batches=[1, 5],
    )
    assert result.budget == budget
    row, scheme = result.rows[0], schemes.get(name)

    def nbytes(batch, max_len):
        return scheme.abstract(**SIZES, batch=batch, max_len=max_len).nbytes

    for context, batch in row.largest_batch.items():
        assert nbytes(batch, context) <= budget < nbytes(batch + 1, context)
    for batch, context in row.largest_context.items():
        assert nbytes(batch, context) <= budget < nbytes(batch, context + 1)


def test_nothing_fits():
    row = plan(SMALL, ["none"], memory=500, contexts=[256], batches=[64]).rows[0]
    assert row.largest_batch == {256: 0} and row.largest_context == {64: 0}


def test_opt_6_7b():
    config = presets["opt-6.7b"]
    assert 2 * num_params(config) == 13_316_947_968
    result = plan(
        config,
        ["none", "nqkv"],
        memory=parse_size("80GiB"),
        weights=2 * num_params(config),
        contexts=[2048],
        batches=[1],
    )
    full, coded = result.rows
    # Per token: 32 layers x 2 sides x 4096 elements, and 16 scales of 2 bytes for each 4096.
    assert full.stored_bits == 16 and full.token_bytes == 32 * 2 * 4096 * 2
    assert coded.stored_bits == 4.0625 and coded.token_bytes == 32 * 2 * (4096 // 2 + 16 * 2)
    # Beside the tokens a sequence has its length and its overflow, for each layer.
    assert full.sequence_bytes == coded.sequence_bytes == 32 * 2 * 4
    for row in result.rows:
        fits = result.budget // int(2048 * row.token_bytes + row.sequence_bytes)
        assert row.largest_batch == {2048: fits}
    assert result.max_positions == 2048 < coded.largest_context[1]


def test_residual_is_no_token():
    row = plan(SMALL, ["kivi:bits=2,group_size=32,residual=128"], memory=10**7).rows[0]
    assert row.stored_bits == 3
    assert row.token_bytes == 3 * 2 * 128 * 3 / 8
    # 128 keys and 129 values in bfloat16 wait in the residual, less what the body does not hold.
    assert row.sequence_bytes > 3 * 128 * 128 * 2


def test_layers_that_differ_are_counted_one_by_one():
    none, int4 = schemes.get("none"), schemes.get("int4")
    mixed = dataclasses.replace(
        none, layer=lambda shape: (int4 if shape.layer == 1 else none).layer(shape)
    )
    assert (
        AbstractCaches(SMALL, mixed)(batch=2, max_len=64).nbytes
        == mixed.abstract(**SIZES, batch=2, max_len=64).nbytes
    )


@pytest.mark.parametrize("answer", [0, 1, 2, 5, 17, 1000, 123456])
@pytest.mark.parametrize("guess", [0, 1, 5, 1000, 10**6])
def test_largest(answer, guess):
    assert largest(lambda n: n <= answer, guess) == answer


@pytest.mark.parametrize("text, size", [
    ("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("24G", 24 * 10**9), (" 1.5 tib ", 3 * 2**39),
    ("512mib", 2**29), ("4096", 4096), ("7B", 7), (".5KiB", 512), ("2Gi", 2**31),
])  # fmt: skip
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 apples", "-5GB", "1e9", "80GiBB", "0", "0.1B"])
def test_parse_size_refuses(text):
    with pytest.raises(ValueError, match="a size must be"):
        parse_size(text)


def test_format_size():
    sizes = (12, 1536, 133120, 2**20, 80 * 2**30, 1000)
    assert [format_size(n) for n in sizes] == [
        "12 B", "1.50 KiB", "130 KiB", "1.00 MiB", "80.0 GiB", "0.98 KiB"]  # fmt: skip


@pytest.mark.parametrize("options, message", [
    (dict(memory=100, weights=80, reserve=20), "must leave memory for a cache; they take 80 B"),
    (dict(memory=0), "expected memory > 0"),
    (dict(memory=10**6, contexts=[1.5]), "size must be a whole number; got 1.5"),
    (dict(memory=10**6, contexts=[0]), r"must be positive; got \[0\]"),
    (dict(memory=10**6, batches=[-1]), r"must be positive; got \[-1\]"),
    (dict(memory=10**6, names=["nqvk"]), "unknown scheme 'nqvk'"),
    (dict(memory=10**6, names=["nqkv:block_size=48"]), "48"),
    (dict(memory=10**6, dtype=jnp.int8), "expected dtype to be one of float16, bfloat16, float32"),
])  # fmt: skip
def test_wrong_settings(options, message):
    names = options.pop("names", ["none"])
    with pytest.raises(ValueError, match=message):
        plan(SMALL, names, **dict(dtype=jnp.bfloat16) | options)
