"""OTT: which tokens are kept, that they are exact and counted once, and what it does to others."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_cache, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import nqkv_jax as nq
from nqkv_jax.body import decode_groups
from nqkv_jax.quantizers import BlockQuantizer, OutlierTokens
from nqkv_jax.quantizers.tiled import in_tiles

SPEC = "ott:group_size=16,residual=8,outliers=2,buffer=3,skip_layers=0"
GROUP, KEEP, OUTLIERS, BUFFER = 16, 8, 2, 3
PLAIN = "ott:group_size=16,residual=8,outliers=0"
HEADS, DIM = 2, 32

attend = jax.jit(nq.attend, static_argnames=("window", "layer"))


def minmax(bits, size, axis="hidden"):
    return BlockQuantizer(nq.codebooks.uniform(bits), block_size=size, axis=axis, scale="minmax")


def small_tokens(tokens, seed=0, share=0.2):
    """Queries, keys of which some tokens are small in a head, and values."""
    rng = np.random.default_rng(seed)
    q, k, v = make_qkv(tokens, seed=seed, batch=1)
    factor = np.where(rng.random((1, tokens, HEADS, 1)) < share, rng.uniform(0, 0.3), 1)
    return q, k * jnp.asarray(factor, jnp.float32), v


def kept_by_definition(scores, group, outliers, buffer):
    """The tokens ever in the pool: the paper's pool and buffer as lists; scores [tokens]."""
    pool, overflow, kept = [], [], set()
    for start in range(0, len(scores) // group * group, group):
        block = [t for t in range(start, start + group) if np.isfinite(scores[t])]
        best = sorted(pool + block, key=lambda t: (scores[t], t))[:outliers]
        entering = [t for t in best if t >= start]
        # As many as there is room for, the smallest first.
        entering = entering[: outliers + buffer - len(pool) - len(overflow)]
        kept.update(entering)
        everyone = sorted(pool + entering, key=lambda t: (scores[t], t))
        pool, evicted = everyone[:outliers], everyone[outliers:]
        overflow += evicted
        assert len(overflow) <= buffer and len(pool) <= outliers
        if len(kept) < outliers + buffer:  # not frozen: the pool holds the smallest of all
            seen = [t for t in range(start + group) if np.isfinite(scores[t])]
            assert pool == sorted(seen, key=lambda t: (scores[t], t))[:outliers]
    return kept


@functools.partial(jax.jit, static_argnames=("quantizer", "group"))
def trace(quantizer, keys, group):
    """The state after all chunks of keys [tokens, heads, D]."""

    def one(state, chunk):
        x, positions = chunk
        return quantizer.observe(x, nq.Context(positions=positions, state=state)), None

    tokens = keys.shape[0]
    chunks = (keys.reshape(-1, group, *keys.shape[1:]), jnp.arange(tokens).reshape(-1, group))
    return jax.lax.scan(one, quantizer.init_state(*keys.shape[1:]), chunks)[0]


@given(
    seed=st.integers(0, 2**31),
    outliers=st.sampled_from([1, 3]),
    buffer=st.sampled_from([0, 4]),
    levels=st.sampled_from([3, 1000]),
    decay=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_pool_against_brute_force(seed, outliers, buffer, levels, decay):
    """Few levels: many ties. Decaying scores: every block has tokens that enter."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, levels + 1, (64, 3)).astype(np.float64)
    if decay:
        scores = np.floor(scores * np.linspace(4, 0.1, 64)[:, None])
    scores[rng.random(scores.shape) < 0.05] = rng.choice([np.nan, np.inf])
    quantizer = OutlierTokens(inner=minmax(2, 8, "tokens"), outliers=outliers, buffer=buffer)
    # Whole numbers: the sums of magnitudes are exact.
    keys = np.stack([scores, -scores], -1)
    state = trace(quantizer, jnp.asarray(keys, jnp.float32), 8)
    for head in range(3):
        expected = kept_by_definition(scores[:, head], 8, outliers, buffer)
        positions = np.asarray(state.positions)[:, head]
        assert sorted(positions[positions >= 0]) == sorted(expected)
        assert len(set(positions[positions >= 0])) == np.sum(positions >= 0)
        for slot, position in enumerate(positions):
            row = keys[position, head] if position >= 0 else np.zeros(2)
            np.testing.assert_array_equal(state.rows[slot, head], row)


def body(cache, side):
    side = getattr(cache.layers[0], side)
    zero = jnp.zeros((), jnp.int32)
    decode = lambda s: decode_groups(s, s.body, zero, rotary=None, dtype=jnp.float32, folded=False)
    return np.asarray(jax.jit(decode)(side)[0])


def test_kept_tokens_are_exact_on_both_sides_and_occur_once():
    tokens = 200
    q, k, v = small_tokens(tokens)
    _, cache = attend(q, k, v, make_cache(SPEC, max_len=tokens, batch=1))
    key, value = cache.layers[0].key, cache.layers[0].value
    np.testing.assert_array_equal(key.state.positions, value.state.positions)
    encoded = (tokens - KEEP) // GROUP * GROUP
    scores = np.abs(np.asarray(k[0], np.float64)).sum(-1)
    for name, exact in (("key", k[0]), ("value", v[0])):
        same = np.all(body(cache, name)[:encoded] == np.asarray(exact)[:encoded], axis=-1)
        for head in range(HEADS):
            kept = kept_by_definition(scores[:encoded, head], GROUP, OUTLIERS, BUFFER)
            assert len(kept) == OUTLIERS + BUFFER
            assert set(np.flatnonzero(same[:, head])) == kept
    # Every slot of the body has one weight in the softmax. With equal keys and values of one and
    # zero, the output is the share of the tokens that are seen.
    ones = jnp.ones_like(k)
    for at in (0, 77, tokens - 1):
        _, cache = attend(q, ones, ones.at[:, at].set(0), make_cache(SPEC, max_len=250, batch=1))
        out, _ = attend(q[:, :1], ones[:, :1], ones[:, :1], cache)
        np.testing.assert_allclose(out, tokens / (tokens + 1), rtol=1e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_kept_tokens_obey_positions(window):
    """Token by token, a prompt and then tokens, and the parallel form agree; a window hides."""
    tokens = 120
    q, k, v = small_tokens(tokens, seed=1)
    cache, outputs = make_cache(SPEC, max_len=tokens, batch=1), []
    for t in range(tokens):
        now = slice(t, t + 1)
        out, cache = attend(q[:, now], k[:, now], v[:, now], cache, window=window)
        outputs.append(out)
    outputs = np.concatenate(outputs, 1)
    view = nq.DecodedView(scheme=nq.schemes.get(SPEC), num_layers=1, dtype=jnp.dtype("float32"))
    parallel, _ = attend(q, k, v, view, window=window)
    np.testing.assert_allclose(parallel, outputs, atol=5e-6)
    bulk = make_cache(SPEC, max_len=tokens, batch=1)
    _, bulk = attend(q, k, v, bulk, window=window)
    chex.assert_trees_all_equal(bulk, cache)
    if window is not None:
        # What has left the window, kept tokens included, has no influence.
        hidden = tokens - window
        other = v.at[:, :hidden].multiply(7)
        out, _ = attend(q, k, other, view, window=window)
        np.testing.assert_allclose(out[:, -1], outputs[:, -1], atol=5e-6)


@pytest.mark.optimized
def test_without_outliers_it_is_kivi_in_blocks():
    """Bitwise: keys per channel over 128 tokens, values per token and head, flushed together."""
    _, k, v = make_qkv(300, batch=1)
    spec = "ott:outliers=0,skip_layers=0"
    _, cache = attend(k, k, v, make_cache(spec, max_len=300, batch=1))
    layer = cache.layers[0]
    quantizers = [in_tiles(q, 128, HEADS, DIM) for q in (minmax(2, 128, "tokens"), minmax(2, DIM))]
    for side, x, quantizer in zip((layer.key, layer.value), (k, v), quantizers, strict=True):
        encode = jax.jit(jax.vmap(lambda x, f=quantizer: f.quantize(x, nq.Context())))
        expected = encode(x[0, :256].reshape(-1, quantizer.group, HEADS, DIM))
        chex.assert_trees_all_equal(jax.tree.map(lambda a: a[0], side.body), expected)
        assert side.state == () and side.window.keep == 32
    # The layers that are skipped are just that, and the others are not.
    both = nq.schemes.get("ott:skip_layers=1").init(
        num_layers=2, batch=1, max_len=300, num_kv_heads=HEADS, head_dim=DIM
    )
    assert both.layers[0].key.state == () and both.layers[1].key.state != ()


@functools.partial(jax.jit, static_argnums=0)
def round_trip(quantizer, x, context):
    return quantizer.dequantize(quantizer.quantize(x, context), context)


def test_error_of_the_other_tokens_falls():
    """ott.md section 6: 128 x 128, 8 outlier channels (+-12), 3 tokens scaled by 0.05.

    How far the outlier channels scatter is not told: with 1/2 the error without tracing is the
    sheet's. With 1 it is 0.390 -> 0.246.
    """
    plain = minmax(2, 128, "tokens")
    traced = OutlierTokens(inner=plain, outliers=3, buffer=32)
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((128, 1, 128))
        large = rng.permutation(128)[:8]
        x[..., large] = 12 * rng.choice([-1, 1], 8) + 0.5 * x[..., large]
        small = rng.permutation(128)[:3]
        x[small] *= 0.05
        x = jnp.asarray(x, jnp.float32)
        state = trace(traced, x, 128)
        assert set(np.asarray(state.positions[:3, 0])) == set(small)
        context = nq.Context(positions=jnp.arange(128), state=state)
        for quantizer in (plain, traced):
            squares = np.square(np.float64(round_trip(quantizer, x, context)) - np.float64(x))
            errors.append(np.delete(squares, small, 0).mean())
    before, after = np.mean(np.reshape(errors, (-1, 2)), axis=0)
    np.testing.assert_allclose([before, after], [0.345, 0.232], rtol=0.05)


def test_a_bad_token_stays_visible_and_is_no_outlier():
    """It spoils its own channels in its own group and head, and no pool."""
    q, k, v = small_tokens(72)
    clean = attend(q, k, v, make_cache(SPEC, max_len=80, batch=1))[1]
    broken = k.at[0, 5, 0, 3].set(jnp.nan)
    spoilt = attend(q, broken, v, make_cache(SPEC, max_len=80, batch=1))[1]
    assert 5 not in np.asarray(spoilt.layers[0].key.state.positions[0, :, 0])
    found, expected = body(spoilt, "key"), body(clean, "key")
    assert np.isnan(found[:GROUP, 0, 3]).sum() >= GROUP - OUTLIERS
    np.testing.assert_array_equal(found[:, 1], expected[:, 1])
    assert np.isfinite(found[GROUP:]).all()
    np.testing.assert_array_equal(
        spoilt.layers[0].key.state.positions[..., 1], clean.layers[0].key.state.positions[..., 1]
    )
    # A bad value of a token that is kept is its own.
    at = int(clean.layers[0].key.state.positions[0, 0, 0])
    spoilt = attend(q, k, v.at[0, at, 0, 3].set(jnp.nan), make_cache(SPEC, max_len=80, batch=1))[1]
    assert np.argwhere(np.isnan(body(spoilt, "value"))).tolist() == [[at, 0, 3]]


@pytest.mark.parametrize(
    "spec, head_dim, key, value",
    [("ott:skip_layers=0", 128, 2.25, 2.25), ("ott:bits=4,skip_layers=0", 64, 4.25, 4.5)],
)
def test_stored_bits(spec, head_dim, key, value):
    sizes = dict(num_layers=1, batch=1, max_len=4096, num_kv_heads=8, head_dim=head_dim)
    cache = nq.schemes.get(spec).abstract(**sizes)
    assert cache.stored_bits == (key + value) / 2
    state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.layers[0].key.state))
    assert state == 8 * 35 * (head_dim * 4 + 8)  # rows, position and score of 35 tokens per head


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ott:bits=5", "ott: bits: expected one of 1, 2, 3, 4, 8; got 5"),
        ("ott:group_size=1", "group_size >= 2"),
        ("ott:outliers=128", "outliers between 0 and group_size - 1"),
        ("ott:buffer=-1", "option buffer must not be negative; got -1"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get(spec)


def test_values_alone_are_refused():
    quantizer = OutlierTokens(inner=minmax(2, DIM), outliers=1, buffer=0, of_values=True)
    with pytest.raises(ValueError, match=r"context\.keys must be the keys of the same tokens"):
        quantizer.observe(
            jnp.zeros((4, HEADS, DIM)), nq.Context(state=quantizer.init_state(HEADS, DIM))
        )
    with pytest.raises(ValueError, match="OutlierTokens encodes by the queries or keys"):
        nq.quantize(jnp.zeros((4, HEADS, DIM)), quantizer)
