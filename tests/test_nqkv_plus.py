"""Ranked keys, and the scheme built on them: against a float64 oracle, and what each piece buys."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranked_cases
from ranked_cases import DIM, HEADS, decode, encode

import nqkv_jax as nq
from nqkv_jax.quantizers.ranked import RankedQuantizer, RankedState, widths_by_rank

GROUP = 16
draw = functools.partial(ranked_cases.draw, GROUP, chunks=3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_widths_average_to_the_bits(bits):
    for head_dim in range(2, 258, 2):
        widths = widths_by_rank(bits, head_dim)
        assert len(widths) == head_dim // 2 and sum(widths) == bits * head_dim // 2
        assert list(widths) == sorted(widths, reverse=True) and widths[-1] >= bits - 2
        assert widths[0] == (bits + 2 if head_dim >= 16 else bits)


def run(quantizer, queries, chunks):
    """The state after all queries and every chunk; what is decoded of each chunk."""
    state, payloads = encode(quantizer, queries, chunks)
    return state, decode(quantizer, state, payloads)


def oracle(q, k, widths):
    """float64, channel by channel: what the codebooks make of every block, by definition."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    out = np.zeros_like(k)
    half = DIM // 2
    for h in range(HEADS):
        mean = k[0, :, h].mean(0)
        cost = k[0, :, h].var(0), (q[:, h] ** 2).sum((0, 1))
        pairs = (cost[0][:half] + cost[0][half:]) * (cost[1][:half] + cost[1][half:])
        for rank, pair in enumerate(np.argsort(-pairs)):
            bits = widths[rank]
            for channel in (pair, pair + half):
                for chunk in range(len(k)):
                    x = k[chunk, :, h, channel] - mean[channel]
                    scale = np.float64(np.float16(x[np.abs(x).argmax()]))
                    if bits == 0:
                        out[chunk, :, h, channel] = mean[channel]
                        continue
                    make = nq.codebooks.block_normal if bits == 1 else nq.codebooks.cubic_normal
                    levels = np.array(make(bits, GROUP, signed=True).levels)
                    nearest = np.abs(x[:, None] / scale - levels).argmin(1)
                    out[chunk, :, h, channel] = levels[nearest] * scale + mean[channel]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranked_quantizer_is_its_definition(bits):
    q, k = draw(seed=bits)
    widths = widths_by_rank(bits, DIM)
    quantizer = RankedQuantizer(widths, GROUP)
    state, decoded = run(quantizer, q, k)
    expected = oracle(q, k, widths)
    # A value on a threshold may take the other code in float32: a step, in very few places.
    wrong = np.abs(decoded - expected) > 1e-4 * np.abs(k).max()
    assert wrong.mean() < 1e-3
    chex.assert_shape(state.layout, (HEADS, DIM))
    np.testing.assert_array_equal(np.sort(state.layout), np.tile(np.arange(DIM), (HEADS, 1)))


def test_ranks_and_means_stay_after_the_first_chunk():
    q, k = draw()
    quantizer = RankedQuantizer(widths_by_rank(3, DIM), GROUP)
    first, _ = run(quantizer, q, k[:1])
    last, _ = run(quantizer, q, np.concatenate([k[:1], 100 * k[1:]]))
    chex.assert_trees_all_equal((first.mean, first.layout), (last.mean, last.layout))


def test_ranking_by_queries_lowers_the_error_of_scores():
    """The point of it; the error of the keys themselves may well be larger."""
    q, k = draw(seed=5, chunks=8)
    widths = widths_by_rank(2, DIM)
    error = {}
    for name, quantizer in {
        "queries": RankedQuantizer(widths, GROUP),
        "variance": RankedQuantizer(widths, GROUP, ranking="variance"),
        "none": RankedQuantizer((2,) * (DIM // 2), GROUP),
    }.items():
        wrong = np.asarray(run(quantizer, q, k)[1]) - k
        scores = np.einsum("qhgd,cthd->qhgct", q, wrong)
        error[name] = np.mean(scores**2)
    assert error["queries"] < 0.7 * error["variance"] < 0.7 * error["none"]


def test_non_finite_keys_stay_visible_even_in_channels_without_bits():
    q, k = draw()
    quantizer = RankedQuantizer((4,) * 8 + (0,) * 8, GROUP)
    state, _ = run(quantizer, q, k)
    uncoded = int(np.argmax(state.layout[1] >= 16))
    k[1, 3, 1, uncoded] = np.nan
    decoded = np.asarray(run(quantizer, q, k)[1])
    assert np.isnan(decoded[1, :, 1]).any() and np.isfinite(decoded[1, :, 0]).all()
    assert np.isfinite(decoded[[0, 2]]).all()


def test_stored_bits():
    sizes = dict(num_layers=1, batch=1, max_len=4096, num_kv_heads=8, head_dim=128)
    for bits in (2, 3, 4):
        cache = nq.schemes.get("nqkv-plus", bits=bits, fused=False).init(**sizes)
        # A sixteenth of the 2-bit keys' channels less an eighth's worth has no scale at all.
        unscaled = widths_by_rank(bits, 128).count(0) / 64
        keys, values = bits + 0.25 * (1 - unscaled), bits + 16 / 128
        assert cache.stored_bits == (keys + values) / 2
        cache = nq.schemes.get("nqkv-plus", bits=bits).init(**sizes)
        assert cache.stored_bits == bits + 16 / 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankedQuantizer((1, 2)), r"widths must decrease.*got \(1, 2\)"),
        (lambda: RankedQuantizer((7, 2)), r"in 0..6"),
        (lambda: RankedQuantizer((0, 0)), r"not all be 0"),
        (lambda: RankedQuantizer((2,), 12), r"multiple of 8; got 12"),
        (lambda: RankedQuantizer((2,), ranking="keys"), r"queries or variance; got 'keys'"),
        (lambda: RankedQuantizer((2,)).check(1, 64), r"expected head_dim / 2 = 32 widths; got 1"),
        (lambda: nq.schemes.get("nqkv-plus:bits=5"), r"expected one of 2, 3, 4; got 5"),
        (lambda: nq.schemes.get("nqkv-plus:ranking=x"), r"queries, variance, none; got 'x'"),
        (lambda: nq.schemes.get("nqkv-plus:group_size=64"), "128 at a time.*group_size=64"),
        (
            lambda: nq.schemes.get("nqkv-plus:fused=False,keys=x"),
            "one of rotated, unrotated; got 'x'",
        ),
        (
            lambda: nq.schemes.get("nqkv-plus").init(
                num_layers=1, batch=1, max_len=8, num_kv_heads=1, head_dim=24
            ),
            "multiple of 16, above 128 one of 128; got 24. Take fused=False",
        ),
        (
            lambda: nq.schemes.get("nqkv-plus:recent=-1"),
            "option recent must not be negative; got -1",
        ),
        (
            lambda: nq.schemes.get("nqkv-plus:fused=False,group_size=0"),
            r"group_size >= 1 tokens; got recent=64, group_size=0",
        ),
        (
            lambda: RankedQuantizer((2,) * 16, 16).quantize(jnp.zeros((16, 2, 32)), nq.Context()),
            "context.state must be what init_state",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_state_is_a_pytree_with_one_entry_per_field():
    state = RankedQuantizer((2,) * 16, 16).init_state(2, 32)
    assert isinstance(state, RankedState) and len(jax.tree.leaves(state)) == 4


def test_a_head_dim_that_is_no_power_of_two():
    """OPT-2.7b has 80."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, 2, 80)), jnp.float32) for _ in range(3))
    scheme = nq.schemes.get("nqkv-plus:fused=False,group_size=8,recent=0,sinks=1")
    cache = scheme.init(num_layers=1, batch=1, max_len=41, num_kv_heads=2, head_dim=80)
    step = jax.jit(nq.attend)
    exact, _ = step(q, k, v)
    _, cache = step(q[:, :39], k[:, :39], v[:, :39], cache)
    out, _ = step(q[:, 39:], k[:, 39:], v[:, 39:], cache)
    error = np.abs(np.asarray(out[:, 0]) - np.asarray(exact[:, 39])).max()
    assert 0 < error < 0.15 * np.abs(np.asarray(exact[:, 39])).max()
