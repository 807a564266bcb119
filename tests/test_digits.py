"""Keys of several digits: against a float64 oracle, as a kernel reads them, and in a cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranked_cases
from ranked_cases import DIM, HEADS, decode
from ranked_cases import encode as run

import nqkv_jax as nq
from nqkv_jax.quantizers.digits import CLIPS, DigitQuantizer, digits_by_rank

TILE = 128
draw = functools.partial(ranked_cases.draw, TILE)


def make(bits, **options):
    return DigitQuantizer(bits, digits_by_rank(bits, DIM), **options)


def oracle(q, k, quantizer):
    """float64, channel by channel: whole numbers of steps, from the definition."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    out, half = np.zeros_like(k), DIM // 2
    for h in range(HEADS):
        mean = k[0, :, h].mean(0)
        cost = k[0, :, h].var(0), (q[:, h] ** 2).sum((0, 1))
        pairs = (cost[0][:half] + cost[0][half:]) * (cost[1][:half] + cost[1][half:])
        for rank, pair in enumerate(np.argsort(-pairs)):
            bits = quantizer.bits * quantizer.digits[rank]
            top = (2**bits - 1) / 2
            for channel in (pair, pair + half):
                for chunk in range(len(k)):
                    x = k[chunk, :, h, channel] - mean[channel]
                    tried = [np.zeros_like(x)] if not bits else []
                    for clip in CLIPS if bits else ():
                        step = np.float64(np.float16(clip * np.abs(x).max() / top))
                        code = np.clip(np.round(x / step + top), 0, 2 * top)
                        tried.append(step * (code - top))
                    best = min(tried, key=lambda y, x=x: np.sum((x - y) ** 2))
                    out[chunk, :, h, channel] = best + mean[channel]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_digits_add_up_to_the_nearest_level(bits):
    q, k = draw(seed=bits)
    quantizer = make(bits)
    state, payloads = run(quantizer, q, k)
    wrong = np.abs(decode(quantizer, state, payloads) - oracle(q, k, quantizer))
    # A value between two levels may take the other one in float32, in very few places.
    assert np.mean(wrong > 1e-5 * np.abs(k).max()) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_an_ordinary_tile(bits):
    """Codes and a scale per slot, with queries that know where their channels are."""
    q, k = draw(seed=bits)
    quantizer = make(bits)
    state, payloads = run(quantizer, q, k)
    folded = decode(quantizer, state, payloads, True)
    body = jax.tree.map(lambda a: a[None], payloads)
    codes = quantizer.tiled_codes(body, nq.Context(state=state))
    codes.check("key")
    assert codes.per_channel and codes.codebook.bits == bits
    for tile in range(len(k)):
        np.testing.assert_array_equal(jax.jit(codes.decode)(tile)[0], folded[tile])
    heads_last = jnp.moveaxis(q, 2, 1)  # [tokens, query heads, heads, D]
    turned, shift = quantizer.fold_queries(heads_last, nq.Context(state=state))
    scores = np.einsum("qghd,cthd->qghct", turned, folded) + np.asarray(shift)[..., None, None]
    whole = decode(quantizer, state, payloads)
    expected = np.einsum("qghd,cthd->qghct", np.asarray(heads_last, np.float64), whole)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_digits_lower_the_error_of_scores():
    q, k = draw(seed=5, chunks=4)
    error = {}
    for name, quantizer in {
        "queries": make(2),
        "variance": make(2, ranking="variance"),
        "one width": DigitQuantizer(2, (1,) * (DIM // 2)),
    }.items():
        wrong = np.asarray(decode(quantizer, *run(quantizer, q, k))) - k
        error[name] = np.mean(np.einsum("qhgd,cthd->qhgct", q, wrong) ** 2)
    assert error["queries"] < 0.8 * error["variance"] < 0.8 * error["one width"]


def test_every_digit_has_a_slot():
    for bits in (2, 3, 4):
        for head_dim in range(16, 257, 16):
            digits = digits_by_rank(bits, head_dim)
            assert len(digits) == sum(digits) == head_dim // 2
            assert digits.count(2) == digits.count(0) == head_dim // 2 >> bits
    q, k = draw()
    quantizer = make(2)
    channels = np.asarray(run(quantizer, q, k)[0].layout)
    chex.assert_shape(channels, (HEADS, DIM))
    for of_head in channels:
        counts = np.bincount(of_head, minlength=DIM)
        assert sorted(counts) == sorted(2 * quantizer.digits)
        np.testing.assert_array_equal(counts[: DIM // 2], counts[DIM // 2 :])  # pairs share ranks


def test_non_finite_and_huge_keys():
    q, k = draw()
    quantizer = make(2)
    state, _ = run(quantizer, q, k)
    dropped = min(set(range(DIM)) - set(np.asarray(state.layout[1]).tolist()))
    k[1, 3, 1, dropped] = np.nan
    decoded = np.asarray(decode(quantizer, *run(quantizer, q, k)))
    assert np.isnan(decoded[1, :, 1]).any() and np.isfinite(decoded[1, :, 0]).all()
    assert np.isfinite(decoded[0]).all()
    k[1] = np.where(k[1] > 0, 3e38, -3e38)  # beyond float16: scales saturate
    _, payloads = run(quantizer, q, k)
    assert np.isfinite(np.asarray(decode(quantizer, state, payloads))).all()
    k[:] = 1.5
    np.testing.assert_array_equal(decode(quantizer, *run(quantizer, q, k)), k)


def test_one_by_one_is_all_at_once():
    """Tokens that come one by one, and two sequences of different lengths, leave the same bits."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 140, heads, 16)), jnp.float32)
    q, k, v = draw(2), draw(1), draw(1)
    scheme = nq.schemes.get("nqkv-plus:bits=2")
    empty = scheme.init(num_layers=1, batch=2, max_len=140, num_kv_heads=1, head_dim=16)
    counts = jnp.array([140, 134])
    _, whole = jax.jit(nq.attend)(q, k, v, empty, num_new=counts)

    @jax.jit
    def one_by_one(cache):
        def step(cache, t):
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1)
            new = (t < counts).astype(jnp.int32)
            return nq.attend(cut(q), cut(k), cut(v), cache, num_new=new)[1], ()

        return jax.lax.scan(step, cache, jnp.arange(140))[0]

    found = one_by_one(empty)
    np.testing.assert_array_equal(found.lengths, counts)
    for a, b in zip(found.layers, whole.layers, strict=True):
        chex.assert_trees_all_equal(a.key.body, b.key.body)
        chex.assert_trees_all_equal(a.key.state, b.key.state)
        chex.assert_trees_all_equal(a.value.body, b.value.body)
    alone = scheme.init(num_layers=1, batch=1, max_len=140, num_kv_heads=1, head_dim=16)
    _, alone = jax.jit(nq.attend)(q[1:, :134], k[1:, :134], v[1:, :134], alone)
    second = jax.tree.map(lambda a: a[1:], whole.layers[0].key.body)
    chex.assert_trees_all_equal(alone.layers[0].key.body, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DigitQuantizer(2, (0, 2)), r"digits must decrease.*got \(0, 2\)"),
        (lambda: DigitQuantizer(2, (2, 1)), "be 1 on average"),
        (lambda: DigitQuantizer(2, (3, -1)), "not be negative"),
        (lambda: DigitQuantizer(2, ()), r"got \(\)"),
        (lambda: DigitQuantizer(4, (3, 0, 0)), "at most 8 bits; got 3 digits of 4"),
        (lambda: DigitQuantizer(2, (1,), ranking="keys"), "queries or variance; got 'keys'"),
        (lambda: DigitQuantizer(2, (1,)).check(1, 64), r"expected head_dim / 2 = 32 numbers"),
        (lambda: DigitQuantizer(2, (1,) * 4).check(1, 8), "multiple of 16"),
        (lambda: DigitQuantizer(5, (1,) * 8).check(1, 16), "bits to be one of"),
        (lambda: make(2).quantize(jnp.zeros((64, 2, DIM)), nq.Context()), "group=128"),
        (lambda: make(2).quantize(jnp.zeros((128, 2, DIM)), nq.Context()), "what init_state and"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
