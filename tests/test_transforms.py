"""Maps before coding: their inverses, and that folding them into attention changes nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special

from nqkv_jax import codebooks, hadamard
from nqkv_jax.quantize import quantize, stored_bits
from nqkv_jax.quantizers import (
    BlockQuantizer,
    Centre,
    Context,
    Hadamard,
    Rotation,
    Standardise,
    Transformed,
)

CHAINS = {
    "hadamard": (Hadamard(),),
    "signed-hadamard": (Hadamard(seed=3),),
    "rotation": (Rotation(seed=1),),
    "centre": (Centre(),),
    "standardise": (Standardise(),),
    "centre-hadamard": (Centre(), Hadamard(seed=0)),
    "rotation-standardise": (Rotation(), Standardise()),
    "all": (Standardise(), Rotation(seed=5), Centre(), Hadamard()),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
INT8 = BlockQuantizer(codebooks.uniform(8), block_size=64, scale="minmax", scale_dtype=jnp.float32)


def keys(tokens=48, heads=2, head_dim=64, seed=0):
    """Channels of different means and deviations, as keys have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, heads, head_dim))
    deviations = rng.lognormal(0, 0.5, (heads, head_dim))
    means = rng.standard_normal((heads, head_dim))
    return x * deviations + 4 * means


def fitted(chain, x, inner=INT8):
    quantizer = Transformed(inner, chain)
    state = quantizer.init_state(*x.shape[1:])
    return quantizer, observe(quantizer, jnp.asarray(x, jnp.float32), state)


@jax.jit
def observe(quantizer, x, state):
    return quantizer.observe(x, Context(state=state))


def encode(quantizer, state, x):
    rows = jnp.asarray(x, jnp.float32)[:, None]
    return jax.jit(jax.vmap(lambda r: quantizer.quantize(r, Context(state=state))))(rows)


def decode(method, payload, state):
    return jax.jit(jax.vmap(lambda p: method(p, Context(state=state))))(payload)[:, 0]


@chains
def test_folded_attention_is_attention(chain):
    """softmax(q K^T) V with decoded K, V, in float64, equals the folded computation."""
    k, v = keys(seed=1), keys(seed=2)
    q = np.random.default_rng(3).standard_normal((5, 2, 64)) / 8  # [queries, heads, head_dim]
    quantizer, k_state = fitted(chain, k)
    _, v_state = fitted(chain, v)
    k_coded, v_coded = encode(quantizer, k_state, k), encode(quantizer, v_state, v)

    k64 = np.float64(decode(quantizer.dequantize, k_coded, k_state))
    v64 = np.float64(decode(quantizer.dequantize, v_coded, v_state))
    scores = np.einsum("qhd,thd->qht", q, k64)
    expected = np.einsum("qht,thd->qhd", special.softmax(scores, axis=-1), v64)

    folded_q, shift = quantizer.fold_queries(jnp.asarray(q, jnp.float32), Context(state=k_state))
    folded_k = decode(quantizer.dequantize_folded, k_coded, k_state)
    folded_v = decode(quantizer.dequantize_folded, v_coded, v_state)
    folded = np.einsum("qhd,thd->qht", np.float64(folded_q), np.float64(folded_k))
    full = folded if shift is None else folded + np.float64(shift)[..., None]
    np.testing.assert_allclose(full, scores, rtol=0, atol=3e-5)
    # A shift of all scores of a query cancels.
    weights = special.softmax(folded, axis=-1)
    mixed = np.einsum("qht,thd->qhd", weights, np.float64(folded_v))
    out = quantizer.unfold_output(jnp.asarray(mixed, jnp.float32), Context(state=v_state))
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)


@chains
def test_inverse_and_error(chain):
    x = keys()
    quantizer, state = fitted(chain, x)
    y = jnp.asarray(x, jnp.float32)

    @jax.jit
    def there_and_back(transform, params, y):
        z = transform.apply(params, y)
        return z, transform.invert(params, z)

    for transform, params in zip(chain, state.params, strict=True):
        z, back = there_and_back(transform, params, y)
        np.testing.assert_allclose(back, y, rtol=0, atol=2e-5)
        y = z
    decoded = decode(quantizer.dequantize, encode(quantizer, state, x), state)
    assert np.mean((decoded - x) ** 2) / np.var(x) < 2e-4


@chains
def test_state_is_fitted_once(chain):
    first, second = keys(seed=4), keys(seed=5)
    quantizer, state = fitted(chain, first)
    later = observe(quantizer, jnp.asarray(second, jnp.float32), state)
    chex.assert_trees_all_equal(later, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(later, quantizer.init_state(2, 64))
    for leaf in jax.tree.leaves(state.params):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("name", ["signed-hadamard", "rotation", "standardise", "all"])
def test_works_mapped_over_sequences(name):
    chain = CHAINS[name]
    x = jnp.asarray(np.stack([keys(seed=s) for s in range(3)]), jnp.float32)
    quantizer = Transformed(INT8, chain)
    together = jax.jit(lambda x: quantize(x, quantizer))(x)
    for i in range(3):
        alone = jax.jit(lambda x: quantize(x, quantizer))(x[i])
        got = jax.tree.map(lambda a, i=i: a[i], together)
        if any(isinstance(t, Rotation) for t in chain):  # not bitwise: see its docstring
            chex.assert_trees_all_close(got.payload.scale, alone.payload.scale, rtol=1e-3)
        else:
            chex.assert_trees_all_equal(got, alone)


@pytest.mark.optimized
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("scale", ["minmax", "rms"])
def test_hadamard_stores_the_same_bits_for_one_token_or_many(scale, head_dim):
    book = codebooks.uniform(4) if scale == "minmax" else codebooks.lloyd_max_normal(4)
    quantizer = Transformed(
        BlockQuantizer(book, block_size=32, scale=scale), (Hadamard(seed=1), Centre())
    )
    x = jnp.asarray(keys(200, 2, head_dim), jnp.float32)
    state = jax.jit(quantizer.observe)(x, Context(state=quantizer.init_state(2, head_dim)))
    one = jax.jit(lambda r, state: quantizer.quantize(r, Context(state=state)))
    many = jax.jit(jax.vmap(one, (0, None)))(x[:, None], state)
    for i in (0, 77, 199):
        alone = one(x[i : i + 1], state)
        chex.assert_trees_all_equal(jax.tree.map(lambda a, i=i: a[i], many), alone)


def test_hadamard_is_sylvesters_matrix():
    x = keys(5)
    expected = x @ linalg.hadamard(64) / 8
    transformed = Hadamard().apply((), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(transformed, expected, atol=1e-5)
    signs = Hadamard(seed=2).apply((), jnp.eye(64, dtype=jnp.float32)[:, None])
    np.testing.assert_allclose(np.abs(signs), 1 / 8, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [12, 36, 80, 96, 112])
def test_hadamard_with_a_core(head_dim):
    """Cores of 12, 20 and 28 by Paley's first construction, not symmetric; of 36 by his second."""
    x = keys(5, head_dim=head_dim)
    y = jax.jit(lambda x: Hadamard().apply((), x))(jnp.asarray(x, jnp.float32))
    matrix = hadamard.matrix(head_dim) / np.sqrt(head_dim)
    np.testing.assert_allclose(y, x @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(Hadamard().invert((), y), x, atol=1e-5)


@settings(deadline=None)
@given(size=st.integers(1, 512))
def test_hadamard_matrices(size):
    if hadamard.core_size(size) is None:
        with pytest.raises(ValueError, match=f"known Hadamard matrix; got {size}. Give a size"):
            Hadamard().check(3, size)
        assert size % 16  # all multiples of which are served
        size = hadamard.largest_hadamard(size)
    matrix = hadamard.matrix(size)
    np.testing.assert_array_equal(np.abs(matrix), 1)
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))
    Hadamard().check(3, size)


def test_rotation_is_orthogonal_for_any_head_dim():
    eye = jnp.eye(90, dtype=jnp.float32)[:, None]
    matrix = np.float64(Rotation(seed=7).apply((), eye))[:, 0]
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(90), atol=1e-6)
    Rotation().check(3, 90)
    with pytest.raises(ValueError, match=r"matrix; got 90. Give a size that .*, such as 2, or use"):
        Transformed(INT8, (Hadamard(),)).check(3, 90)


def test_parameters_are_those_of_the_channels():
    x = keys()
    _, state = fitted((Standardise(),), x)
    mean, deviation = state.params[0]
    np.testing.assert_allclose(mean, x.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(deviation, x.std(0), rtol=1e-5)
    _, state = fitted((Centre(),), x)
    np.testing.assert_allclose(state.params[0], x.mean(0), rtol=0, atol=1e-5)


def test_constant_channels_have_deviation_one():
    x = keys(47)
    x[:, 0, :8] = 0.1 * np.arange(1, 9)
    x[:, 1, 3] = 0
    _, state = fitted((Standardise(),), x)
    _, deviation = state.params[0]
    np.testing.assert_array_equal(deviation[0, :8], np.ones(8))
    assert deviation[1, 3] == 1
    assert np.all(np.isfinite(deviation)) and np.all(np.asarray(deviation) > 0)


def test_centring_restores_keys_with_offset_channels():
    """Means of 20 deviations ruin an absmax code; without them the error is that of the noise."""
    rng = np.random.default_rng(6)
    noise = rng.standard_normal((256, 2, 64))
    x = noise + 20 * rng.standard_normal((2, 64))
    nf4 = BlockQuantizer(codebooks.normal_float(4), block_size=64)
    errors = []
    for chain in ((), (Centre(),)):
        quantizer, state = fitted(chain, x, nf4)
        decoded = decode(quantizer.dequantize, encode(quantizer, state, x), state)
        errors.append(np.mean((decoded - x) ** 2) / noise.var())
    assert errors[0] > 0.5 and errors[1] == pytest.approx(0.00846, rel=0.05)


def test_fixed_transforms_keep_no_state():
    quantizer = Transformed(INT8, (Hadamard(seed=1), Rotation()))
    assert jax.tree.leaves(quantizer.init_state(2, 64)) == []
    x = jnp.asarray(keys(1), jnp.float32)
    trip = jax.jit(lambda x: quantizer.dequantize(quantizer.quantize(x, Context()), Context()))
    np.testing.assert_allclose(trip(x), x, atol=0.1)  # an empty state will do
    coded = jax.jit(quantize)(jnp.asarray(keys(), jnp.bfloat16), quantizer)
    assert stored_bits(coded) == 8 + 64 / 64


def test_state_is_required_where_something_depends_on_the_sequence():
    with pytest.raises(ValueError, match="init_state and observe"):
        Transformed(INT8, (Centre(),)).quantize(jnp.zeros((1, 2, 64)), Context())


def test_nested_quantizers_fold_too():
    x = keys()
    inner = Transformed(INT8, (Centre(),))
    quantizer, state = fitted((Standardise(), Hadamard()), x, inner)
    assert len(jax.tree.leaves(state.inner.params)) == 1
    q = jnp.asarray(keys(3, seed=9), jnp.float32)
    folded_q, shift = quantizer.fold_queries(q, Context(state=state))
    coded = encode(quantizer, state, x)
    plain = np.einsum("qhd,thd->qht", np.float64(q), decode(quantizer.dequantize, coded, state))
    folded_k = np.float64(decode(quantizer.dequantize_folded, coded, state))
    folded = np.einsum("qhd,thd->qht", np.float64(folded_q), folded_k)
    np.testing.assert_allclose(folded + np.float64(shift)[..., None], plain, rtol=2e-5, atol=1e-3)
