"""Quantizing whole trees: shapes, dtypes, transformations, and bytes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nqkv_jax as nq
from nqkv_jax import codebooks
from nqkv_jax.quantize import QuantizedArray, dequantize, quantize, stored_bits
from nqkv_jax.quantizers import (
    BlockQuantizer,
    Centre,
    Context,
    DigitQuantizer,
    FullPrecision,
    Transformed,
)

NF4 = BlockQuantizer(codebooks.normal_float(4), block_size=64)
KIVI = BlockQuantizer(codebooks.uniform(2), block_size=32, axis="tokens", scale="minmax")
FP8 = BlockQuantizer(codebooks.Float8(), block_size=32)
CENTRED = Transformed(NF4, (Centre(),))
QUANTIZERS = {"nf4": NF4, "kivi": KIVI, "centred": CENTRED, "fp8": FP8,
              "none": FullPrecision()}  # fmt: skip
every = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def tree(seed=0, batch=2, tokens=64):
    rng = np.random.default_rng(seed)
    make = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape) + 1, dtype)
    return {
        "k": make((batch, tokens, 2, 32), jnp.float32),
        "v": [make((batch, 3, tokens, 2, 32), jnp.bfloat16), make((batch, 32, 1, 64), jnp.float16)],
    }


@every
def test_shapes_dtypes_and_values(quantizer):
    kv = tree()
    coded = jax.jit(quantize)(kv, quantizer)
    decoded = jax.jit(dequantize)(coded)
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, kv)
    for x, x2 in zip(jax.tree.leaves(kv), jax.tree.leaves(decoded), strict=True):
        error = np.mean((np.float32(x) - np.float32(x2)) ** 2) / np.var(np.float32(x))
        assert error < (0.2 if quantizer is KIVI else 0.03)
    assert coded["k"].shape == (2, 64, 2, 32) and coded["k"].dtype == jnp.float32


@every
def test_a_batch_is_its_sequences(quantizer):
    kv, encode = tree()["k"], jax.jit(quantize)
    together = encode(kv, quantizer)
    for i in range(2):
        alone = encode(kv[i], quantizer)
        chex.assert_trees_all_equal(jax.tree.map(lambda a, i=i: a[i], together), alone)
    mapped = jax.jit(jax.vmap(quantize, (0, None)))(kv, quantizer)
    chex.assert_trees_all_equal(mapped, together)
    decoded = jax.jit(dequantize)(together)
    mapped = jax.jit(jax.vmap(dequantize))(together)
    chex.assert_trees_all_close(mapped, decoded, rtol=1e-6, atol=1e-6)


@every
def test_groups_are_what_the_quantizer_makes_of_them(quantizer):
    x = tree()["k"]
    coded = jax.jit(quantize)(x, quantizer)
    state = jax.tree.map(lambda a: a[1], coded.state)
    g = quantizer.group
    alone = quantizer.quantize(
        x[1, g : 2 * g], Context(positions=jnp.arange(g, 2 * g, dtype=jnp.int32), state=state)
    )
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1, 1], coded.payload), alone)


def test_scan_over_layers():
    layers = jnp.stack([tree(seed)["k"] for seed in range(3)])
    coded = jax.jit(quantize)(layers, NF4)

    def step(carry, layer):
        assert layer.shape == (2, 64, 2, 32)
        return carry + jnp.sum(dequantize(layer)), quantize(dequantize(layer), NF4)

    total, again = jax.lax.scan(step, jnp.float32(0), coded)
    assert float(total) == pytest.approx(float(jnp.sum(dequantize(coded))), rel=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, coded)


def test_traces_once():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def trip(kv):
        return dequantize(quantize(kv, NF4))

    for seed in range(2):
        trip(tree(seed))


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (NF4, 4 + 16 / 64),
        (KIVI, 2 + 32 / 32),
        (BlockQuantizer(codebooks.normal_float(3), block_size=64), 3 + 16 / 64),
        (FP8, 8 + 16 / 32),
        (FullPrecision(), 32),
        (CENTRED, 4 + 16 / 64 + (32 + 8 / 64) / 64),  # + one mean per channel and a flag, 64 tokens
    ],
)
def test_stored_bits(quantizer, bits):
    coded = jax.jit(quantize)({"k": tree()["k"], "v": tree(1)["k"]}, quantizer)
    assert stored_bits(coded) == pytest.approx(bits, rel=1e-12)
    live = sum(a.nbytes for a in jax.tree.leaves(coded))
    assert stored_bits(coded) == pytest.approx(8 * live / (2 * 2 * 64 * 64))


def test_stored_bits_of_mixed_trees():
    x = jnp.zeros((64, 2, 32), jnp.bfloat16)
    assert stored_bits(x) == 16
    assert stored_bits([quantize(x, NF4), x]) == (4.25 + 16) / 2
    assert stored_bits([x, 1.0]) == pytest.approx(16, rel=1e-2)
    assert stored_bits(np.ones(3)) == 64 and stored_bits(jax.ShapeDtypeStruct((3,), "f2")) == 16
    with pytest.raises(ValueError, match="no elements"):
        stored_bits({})
    cache = nq.schemes.get("int4").init(
        num_layers=1, batch=1, max_len=8, num_kv_heads=2, head_dim=64
    )
    with pytest.raises(ValueError, match=r"got uint8\[1, 8, .*see cache\.stored_bits"):
        stored_bits(cache)


def test_the_form_of_the_readme():
    kv = {"k": jnp.ones((1, 16, 4, 64)), "v": jnp.ones((1, 16, 4, 64))}
    coded = quantize(kv, BlockQuantizer(codebooks.normal_float(4), block_size=256))
    assert isinstance(coded["k"], QuantizedArray)
    assert stored_bits(coded) == 4.0625
    chex.assert_trees_all_equal(dequantize(coded), kv)


@pytest.mark.parametrize(
    ("x", "quantizer", "message"),
    [
        (jnp.zeros((64, 64)), NF4, r"\[..., tokens, heads, head_dim\]; got float32\[64, 64\]"),
        (jnp.zeros((64, 2, 32), jnp.int8), NF4, r"got int8\[64, 2, 32\]"),
        (jnp.zeros((70, 2, 32)), KIVI, r"group of 32; got 70 .* Keep the last 6 tokens apart"),
        (jnp.zeros((0, 2, 32)), NF4, "positive multiple"),
        (jnp.zeros((8, 3, 32)), NF4, "= 96: one of"),
        (jnp.zeros((128, 2, 32)), DigitQuantizer(2), "DigitQuantizer encodes by the queries"),
        ("a text", NF4, "every leaf must be floats .*; got 'a text'"),
        (1.0, NF4, "every leaf must be floats .*; got 1.0"),
        (jnp.zeros((64, 2, 32)), "nqkv", "expected a quantizer .*; got 'nqkv'. Schemes are for"),
    ],
)
def test_errors(x, quantizer, message):
    with pytest.raises(ValueError, match=message):
        quantize({"k": x}, quantizer)


def test_only_what_was_quantized_is_decoded():
    x = jnp.ones((1, 64, 2, 32))
    coded = jax.jit(quantize)(x, NF4)
    cache = nq.schemes.get("int4").init(
        num_layers=1, batch=1, max_len=8, num_kv_heads=2, head_dim=64
    )
    for wrong, got in (("nqkv", "'nqkv'"), (cache, "uint8"), (coded.payload, "uint8"), (4, "4")):
        with pytest.raises(ValueError, match=f"^dequantize: expected a tree of .*; got {got}"):
            dequantize({"k": wrong})
    # Beside what was, anything may be; and arrays that never were are what they would decode to.
    decoded = dequantize({"k": coded, "step": 3, "v": x})
    chex.assert_trees_all_equal(decoded, {"k": x, "step": 3, "v": x})
    chex.assert_trees_all_equal(dequantize([x, 1.0]), [x, 1.0])
    assert dequantize({}) == {}
    with pytest.raises(ValueError, match="got 'nqkv'"):
        stored_bits("nqkv")
