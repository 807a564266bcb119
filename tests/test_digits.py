"""Keys of several digits: against a float64 oracle, as a kernel reads them, and in a cache."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranked_cases
from hypothesis import strategies as st
from ranked_cases import DIM, HEADS, context, decode
from ranked_cases import encode as run

import nqkv_jax as nq
from nqkv_jax.quantizers.digits import CLIPS, LEFT_BY_DIGIT, DigitQuantizer
from nqkv_jax.rotary import Rotary

TILE = 128
draw = functools.partial(ranked_cases.draw, TILE)
# A factor, and 8 of the 32 channels that are not rotated.
ROTARY = Rotary(inverse_frequencies=jnp.asarray(0.5 ** np.arange(12)), attention_factor=1.25)


def make(bits, **options):
    return DigitQuantizer(bits, **options)


def turned(x):
    """float64: `x` [chunks, TILE, HEADS, DIM] after four sinks, rotated."""
    half, at = len(ROTARY.inverse_frequencies), 4 + np.arange(len(x) * TILE)
    angles = at[:, None] * np.asarray(ROTARY.inverse_frequencies, np.float64)
    turn = np.exp(1j * angles).reshape(len(x), TILE, 1, half)
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn * ROTARY.attention_factor
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def oracle(q, k, quantizer, rotary=None):
    """float64, channel by channel: whole numbers of steps, from the definition."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    out, half = np.zeros_like(k), DIM // 2
    means = np.broadcast_to(k[0].mean(0), k.shape)
    rotated = turned if rotary else lambda x: x
    coded = rotated(k - means)
    for h in range(HEADS):
        cost = (coded[0, :, h] ** 2).mean(0), (q[:, h] ** 2).sum((0, 1))
        pairs = (cost[0][:half] + cost[0][half:]) * (cost[1][:half] + cost[1][half:])
        order = np.argsort(-pairs)
        left = pairs[order] * LEFT_BY_DIGIT[quantizer.bits]
        doubled = sum(left[r] > pairs[order[-1 - r]] for r in range(half // 2))
        assert 0 < doubled < half // 2
        for rank, pair in enumerate(order):
            bits = quantizer.bits * (1 + (rank < doubled) - (rank >= half - doubled))
            top = (2**bits - 1) / 2
            for channel in (pair, pair + half):
                for chunk in range(len(k)):
                    x = coded[chunk, :, h, channel]
                    tried = [np.zeros_like(x)] if not bits else []
                    for clip in CLIPS if bits else ():
                        step = np.float64(np.float16(clip * np.abs(x).max() / top))
                        code = np.clip(np.round(x / step + top), 0, 2 * top)
                        tried.append(step * (code - top))
                    best = min(tried, key=lambda y, x=x: np.sum((x - y) ** 2))
                    out[chunk, :, h, channel] = best
    return out + rotated(means)


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["", "rotary"])
@pytest.mark.parametrize("bits", [2, *(pytest.param(n, marks=pytest.mark.more) for n in (3, 4))])
def test_digits_add_up_to_the_nearest_level(bits, rotary):
    q, k = draw(seed=bits)
    quantizer = make(bits)
    keys = turned(k).astype(np.float32) if rotary else k
    state, payloads = run(quantizer, q, keys, rotary)
    wrong = np.abs(
        decode(quantizer, state, payloads, False, rotary) - oracle(q, k, quantizer, rotary)
    )
    # A value between two levels may take the other one in float32, in very few places.
    assert np.mean(wrong > 1e-5 * np.abs(k).max()) < 1e-3


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["", "rotary"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_an_ordinary_tile(bits, rotary):
    """Codes and a scale per slot, with queries that know where their channels are."""
    q, k = draw(seed=bits)
    quantizer = make(bits)
    state, payloads = run(quantizer, q, k, rotary)
    folded = decode(quantizer, state, payloads, True, rotary)
    body = jax.tree.map(lambda a: a[None], payloads)
    codes = quantizer.tiled_codes(body, context(state, 0, len(k) * TILE, rotary))
    codes.check("key")
    assert codes.per_channel and codes.codebook.bits == bits
    assert codes.width == folded.shape[-1] == DIM + (24 if rotary else 0)
    for tile in range(len(k)):
        np.testing.assert_array_equal(jax.jit(codes.decode)(tile)[0], folded[tile, ..., :DIM])
    heads_last = jnp.moveaxis(q, 2, 1)  # [tokens, query heads, heads, D]
    turned, shift = quantizer.fold_queries(heads_last, nq.Context(state=state, rotary=rotary))
    scores = np.einsum("qghd,cthd->qghct", turned, folded) + np.asarray(shift)[..., None, None]
    whole = decode(quantizer, state, payloads, False, rotary)
    expected = np.einsum("qghd,cthd->qghct", np.asarray(heads_last, np.float64), whole)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_means_that_rope_turns_need_no_bits():
    """Keys that are hardly more than their mean before RoPE: after it, tiles are full of it."""
    q, k = draw(seed=4)
    k = 0.1 * k + 10
    keys, error = turned(k).astype(np.float32), {}
    for turning in (True, False):
        quantizer = make(2, turning=turning)
        found = decode(quantizer, *run(quantizer, q, keys, ROTARY), False, ROTARY)
        error[turning] = np.mean((np.asarray(found) - keys) ** 2)
    assert error[True] < 0.1 * error[False]


def test_digits_lower_the_error_of_scores():
    q, k = draw(seed=5, chunks=4)
    error = {}
    for name, quantizer in {
        "queries": make(2),
        "variance": make(2, ranking="variance"),
        "one width": make(2, ranking="none"),
    }.items():
        wrong = np.asarray(decode(quantizer, *run(quantizer, q, k))) - k
        error[name] = np.mean(np.einsum("qhgd,cthd->qhgct", q, wrong) ** 2)
    assert error["queries"] < 0.8 * error["variance"] < 0.8 * error["one width"]


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4]), st.sampled_from([16, 48, 128])
)
def test_every_digit_has_a_slot(seed, bits, head_dim):
    rng, pairs = np.random.default_rng(seed), head_dim // 2
    importance = np.exp(rng.uniform(0, 6) * rng.normal(size=(HEADS, pairs))).astype(np.float32)
    layout = make(bits).lay_out(jnp.asarray(importance))
    chex.assert_shape(layout.channel, (HEADS, head_dim))
    arrays = map(np.asarray, (layout.channel, layout.doubled, importance))
    for channels, doubled, of_head in zip(*arrays, strict=True):
        counts = np.bincount(channels, minlength=head_dim)
        np.testing.assert_array_equal(counts[:pairs], counts[pairs:])  # pairs share ranks
        assert [np.sum(counts[:pairs] == n) for n in (0, 2)] == [doubled, doubled]
        one = of_head[counts[:pairs] == 1]
        two, none = of_head[counts[:pairs] == 2], of_head[counts[:pairs] == 0]
        if doubled:
            assert two.min() * LEFT_BY_DIGIT[bits] > none.max()
        if len(one) > 1:  # and none is left of which the same could be said
            assert one.max() * np.float32(LEFT_BY_DIGIT[bits]) <= one.min()


def test_no_pair_has_two_digits_where_all_are_alike():
    for quantizer, spread in ((make(2), 0), (make(2, ranking="none"), 5)):
        layout = quantizer.lay_out(jnp.exp(spread * jnp.linspace(0, 1, 2 * 16).reshape(2, 16)))
        np.testing.assert_array_equal(layout.doubled, 0)
        np.testing.assert_array_equal(np.sort(layout.channel), np.tile(np.arange(32), (2, 1)))


def test_non_finite_and_huge_keys():
    q, k = draw()
    quantizer = make(2)
    state, _ = run(quantizer, q, k)
    dropped = min(set(range(DIM)) - set(np.asarray(state.layout.channel[1]).tolist()))
    k[1, 3, 1, dropped] = np.nan
    decoded = np.asarray(decode(quantizer, *run(quantizer, q, k)))
    assert np.isnan(decoded[1, :, 1]).any() and np.isfinite(decoded[1, :, 0]).all()
    assert np.isfinite(decoded[0]).all()
    k[1] = np.where(k[1] > 0, 3e38, -3e38)  # beyond float16: scales saturate
    _, payloads = run(quantizer, q, k)
    assert np.isfinite(np.asarray(decode(quantizer, state, payloads))).all()
    k[:] = 1.5
    np.testing.assert_array_equal(decode(quantizer, *run(quantizer, q, k)), k)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "rotary",
    [
        pytest.param(None, marks=pytest.mark.more),
        Rotary(inverse_frequencies=0.5 ** np.arange(8.0, dtype=np.float32)),
    ],
)
def test_one_by_one_is_all_at_once(rotary):
    """Tokens that come one by one, and two sequences of different lengths, leave the same bits."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 300, heads, 16)), jnp.float32)
    q, k, v = draw(2), draw(1), draw(1)
    scheme = nq.schemes.get("nqkv-plus:bits=2")
    empty = scheme.init(num_layers=1, batch=2, max_len=300, num_kv_heads=1, head_dim=16)
    counts = jnp.array([300, 270])
    attend = functools.partial(nq.attend, rotary=rotary)
    _, whole = jax.jit(attend)(q, k, v, empty, num_new=counts)

    @jax.jit
    def one_by_one(cache):
        def step(cache, t):
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1)
            new = (t < counts).astype(jnp.int32)
            return attend(cut(q), cut(k), cut(v), cache, num_new=new)[1], ()

        return jax.lax.scan(step, cache, jnp.arange(300))[0]

    found = one_by_one(empty)
    np.testing.assert_array_equal(found.lengths, counts)
    for a, b in zip(found.layers, whole.layers, strict=True):
        chex.assert_trees_all_equal(a.key.body, b.key.body)
        chex.assert_trees_all_equal(a.key.state, b.key.state)
        chex.assert_trees_all_equal(a.value.body, b.value.body)
    alone = scheme.init(num_layers=1, batch=1, max_len=300, num_kv_heads=1, head_dim=16)
    _, alone = jax.jit(attend)(q[1:, :270], k[1:, :270], v[1:, :270], alone)
    second = jax.tree.map(lambda a: a[1:], whole.layers[0].key.body)
    chex.assert_trees_all_equal(alone.layers[0].key.body, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DigitQuantizer(5), "expected bits to be 2, 3 or 4; got 5"),
        (lambda: make(2, ranking="keys"), "queries or variance or none; got 'keys'"),
        (lambda: make(2).check(1, 8), "multiple of 16"),
        (lambda: make(2).quantize(jnp.zeros((64, 2, DIM)), nq.Context()), "group=128"),
        (lambda: make(2).quantize(jnp.zeros((128, 2, DIM)), nq.Context()), "what init_state and"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
