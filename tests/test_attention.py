"""`attend` against a float64 oracle that keeps lists of tokens."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import oracle_outputs
from cases import (
    BATCH,
    EACH_SCHEME,
    HEAD_DIM,
    NUM_KV_HEADS,
    ROTARY,
    SCHEMES,
    make_cache,
    make_qkv,
)

import nqkv_jax as nq

TOKENS, PROMPTS = 90, (41, 23)
MORE = functools.partial(pytest.param, marks=pytest.mark.more)


@functools.partial(jax.jit, static_argnames=("rotary", "window", "layer"), donate_argnums=3)
def compiled_attend(q, k, v, cache, num_new, rotary, window, layer):
    rotary = ROTARY if rotary else None
    return nq.attend(q, k, v, cache, num_new=num_new, rotary=rotary, window=window, layer=layer)


def attend(q, k, v, cache, num_new=None, rotary=True, window=None, layer=0):
    # An argument that is left out would make another program than one that is given.
    return compiled_attend(q, k, v, cache, num_new, rotary, window, layer)


def prompt_then_decode(spec, q, k, v, prompts, *, window=None, rotary=True):
    """Outputs f32[n, Hq, D] per sequence, of a padded prompt and then one token at a time."""
    cache, prompts, longest = make_cache(spec, max_len=TOKENS), np.asarray(prompts), max(PROMPTS)
    beginning = (a[:, :longest] for a in (q, k, v))
    out, cache = attend(*beginning, cache, prompts, window=window, rotary=rotary)
    outputs = [[np.asarray(out)[b, :n]] for b, n in enumerate(prompts)]
    rows = np.arange(BATCH)
    for step in range(TOKENS - prompts.max()):
        now = [a[rows, step + prompts][:, None] for a in (q, k, v)]
        out, cache = attend(*now, cache, window=window, rotary=rotary)
        for b in rows:
            outputs[b].append(np.asarray(out)[b])
    return [np.concatenate(o) for o in outputs]


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_prompt_then_decode_matches_the_oracle(spec):
    check_prompt_then_decode(spec)


def test_prompt_then_decode_with_a_window():
    check_prompt_then_decode("kivi:bits=4,group_size=16,residual=48,sinks=1,keys=unrotated", 37)


def check_prompt_then_decode(spec, window=None):
    qkv = [np.asarray(a) for a in make_qkv(TOKENS)]
    outputs = prompt_then_decode(spec, *qkv, PROMPTS, window=window)
    for b, mine in enumerate(outputs):
        own = (a[b, : len(mine)] for a in qkv)
        expected = oracle_outputs(spec, *own, window=window, prompt=PROMPTS[b])
        np.testing.assert_allclose(mine, expected, atol=5e-6)


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_non_finite_tokens_stay_visible(spec):
    q, k, v = (np.asarray(a) for a in make_qkv(TOKENS))
    for bad, where in (
        (np.nan, 0),
        (np.nan, 20),
        (np.inf, 20),
        (np.nan, TOKENS - 2),
    ):  # sink, body, residual
        broken = v.copy()
        broken[0, where, 0, 5] = bad
        out = prompt_then_decode(spec, q, k, broken, [max(PROMPTS)] * BATCH)
        assert not np.isfinite(out[0][-1, :3]).all(), (bad, where)
        assert np.isfinite(out[1]).all(), (bad, where)


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_decoded_view_equals_decoding_token_by_token(spec):
    check_decoded_view(spec)


def test_decoded_view_with_a_window():
    check_decoded_view("kivi:residual=32", 37)


def check_decoded_view(spec, window=None):
    q, k, v = make_qkv(TOKENS, seed=1)
    cache, outputs = make_cache(spec, max_len=TOKENS), []
    for t in range(TOKENS):
        out, cache = attend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache, window=window)
        outputs.append(out)
    view = nq.DecodedView(scheme=nq.schemes.get(spec), num_layers=1, dtype=jnp.dtype(jnp.float32))
    parallel, _ = attend(q, k, v, view, window=window)
    np.testing.assert_allclose(parallel, np.concatenate(outputs, 1), atol=5e-6)


# Of each scheme one; and those to which RoPE, or how many queries a head has, makes a difference.
ONE_OF_EACH = {s.partition(":")[0]: s for s in SCHEMES}
MIND_ROPE = "nqkv", "squat", "kvquant", "nqkv-plus", "nsnquant", "commvq"


@pytest.mark.parametrize(
    "spec, window",
    [
        (pytest.param if name in MIND_ROPE else MORE)(spec, 37 if i % 2 else None)
        for i, (name, spec) in enumerate(ONE_OF_EACH.items())
    ],
)
def test_without_rope_and_with_one_query_head_per_key(spec, window):
    """As OPT calls it, and every other one with a window."""
    q, k, v = (np.asarray(a) for a in make_qkv(TOKENS, seed=2))
    q, cache, outputs = q[:, :, :NUM_KV_HEADS], make_cache(spec, max_len=TOKENS), []
    for t in range(TOKENS):
        now = (a[:, t : t + 1] for a in (q, k, v))
        out, cache = attend(*now, cache, rotary=False, window=window)
        outputs.append(np.asarray(out))
    for b, mine in enumerate(np.concatenate(outputs, 1)):
        expected = oracle_outputs(spec, q[b], k[b], v[b], window=window, rotary=None)
        np.testing.assert_allclose(mine, expected, atol=5e-6)


@pytest.mark.parametrize(
    "spec",
    [
        "nqkv:residual=16,centre=True,keys=unrotated",
        MORE("nqkv-plus:fused=False,group_size=16,recent=8"),
    ],
)
def test_prompts_and_views_without_rope(spec):
    """Keys that are stored unrotated, and queries that a scheme looks at."""
    q, k, v = (np.asarray(a) for a in make_qkv(TOKENS, seed=2))
    q = q[:, :, :NUM_KV_HEADS]
    view = nq.DecodedView(scheme=nq.schemes.get(spec), num_layers=1, dtype=jnp.dtype(jnp.float32))
    parallel, _ = attend(q, k, v, view, rotary=False)
    for b, mine in enumerate(prompt_then_decode(spec, q, k, v, PROMPTS, rotary=False)):
        own, n = (q[b], k[b], v[b]), len(mine)
        expected = oracle_outputs(spec, *own, rotary=None)
        np.testing.assert_allclose(parallel[b], expected, atol=5e-6)
        np.testing.assert_allclose(mine[PROMPTS[b] :], expected[PROMPTS[b] : n], atol=5e-6)


def test_decoded_view_tiles_queries(monkeypatch):
    q, k, v = make_qkv(50)
    view = nq.DecodedView(
        scheme=nq.schemes.get("kivi:residual=32,sinks=1"),
        num_layers=1,
        dtype=jnp.dtype(jnp.float32),
    )
    whole, _ = jax.jit(nq.attend)(q, k, v, view)
    monkeypatch.setattr("nqkv_jax.decoded.QUERY_TILE", 16)
    tiled, _ = jax.jit(lambda *args: nq.attend(*args))(q, k, v, view)  # traced anew
    np.testing.assert_allclose(tiled, whole, atol=1e-6)


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim",
    [(4, 4, 80), MORE(8, 1, 128), MORE(6, 3, 64), (2, 2, 256)],
)
def test_head_shapes(num_heads, num_kv_heads, head_dim):
    q, k, v = make_qkv(
        20, batch=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    cache = make_cache("nqkv", max_len=20, batch=1, num_kv_heads=num_kv_heads, head_dim=head_dim)
    _, cache = attend(q[:, :19], k[:, :19], v[:, :19], cache)
    out, _ = attend(q[:, 19:], k[:, 19:], v[:, 19:], cache)
    expected = oracle_outputs("nqkv", *(np.asarray(a[0]) for a in (q, k, v)))
    np.testing.assert_allclose(out[0, 0], expected[-1], atol=5e-6)


def test_chunked_prefill_through_a_full_precision_cache_is_exact():
    q, k, v = make_qkv(TOKENS)
    whole, _ = attend(q, k, v, None)
    cache, outputs = make_cache("none", max_len=128), []
    for start in range(0, TOKENS, 32):
        count = min(32, TOKENS - start)
        cut = lambda a, start=start, count=count: jnp.pad(
            a[:, start : start + count], ((0, 0), (0, 32 - count), (0, 0), (0, 0))
        )
        out, cache = attend(cut(q), cut(k), cut(v), cache, jnp.full(BATCH, count, jnp.int32))
        outputs.append(out[:, :count])
    np.testing.assert_allclose(np.concatenate(outputs, 1), whole, atol=2e-6)
    q64 = [np.asarray(a[0]) for a in (q, k, v)]
    np.testing.assert_allclose(whole[0], oracle_outputs("none", *q64, prompt=TOKENS), atol=5e-6)


def test_body_longer_than_a_tile(monkeypatch):
    """Tiles, the last one moved back to fit, and tiles that a window skips."""
    monkeypatch.setattr("nqkv_jax.body.TILE", 32)
    q, k, v = (np.asarray(a) for a in make_qkv(TOKENS))
    sinks = "nqkv:bits=3,block_size=32,sinks=3"
    for spec, window in ((sinks, 40), ("kivi:residual=32", None)):
        # Jits of their own, as those above have been traced with the tile that is usual.
        prefill, step = (
            jax.jit(lambda *args, w=window: nq.attend(*args, rotary=ROTARY, window=w))
            for _ in range(2)
        )
        cache = make_cache(spec, max_len=TOKENS + 5)
        _, cache = prefill(q[:, :-1], k[:, :-1], v[:, :-1], cache)
        out, _ = step(q[:, -1:], k[:, -1:], v[:, -1:], cache)
        expected = oracle_outputs(spec, q[0], k[0], v[0], window=window)
        np.testing.assert_allclose(out[0, 0], expected[-1], atol=5e-6)


def test_decoding_traces_once():
    step = jax.jit(chex.assert_max_traces(lambda *args: nq.attend(*args, rotary=ROTARY), n=1))
    q, k, v = make_qkv(40)
    cache = make_cache("kivi:residual=32", max_len=64)
    for t in range(40):
        now = slice(t, t + 1)
        _, cache = step(q[:, now], k[:, now], v[:, now], cache)
    np.testing.assert_array_equal(cache.lengths, [40, 40])


def test_inside_scan_and_vmap():
    q, k, v = make_qkv(12)
    tokens_first = lambda a: jnp.moveaxis(a, 1, 0)[:, :, None]

    def decode(cache, q, k, v):
        step = lambda cache, now: nq.attend(*now, cache, rotary=ROTARY)[::-1]
        return jax.lax.scan(step, cache, (tokens_first(q), tokens_first(k), tokens_first(v)))[1]

    spec = "nqkv:residual=8,centre=False"
    batch = jax.jit(decode)(make_cache(spec, max_len=16), q, k, v)  # [T, B, 1, Hq, D]
    one = jax.vmap(
        lambda q, k, v: decode(make_cache(spec, max_len=16, batch=1), q[None], k[None], v[None])
    )(q, k, v)
    np.testing.assert_allclose(jnp.moveaxis(one[:, :, 0], 0, 1), batch, atol=2e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_one_traced_step_lowers_for_accelerators(platform):
    q, k, v = make_qkv(1)
    traced = compiled_attend.trace(q, k, v, make_cache("nqkv", max_len=64), None, True, None, 0)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("while" in text) == (platform == "tpu")  # on a GPU, what is little is one step


def test_a_bad_value_reaches_only_the_queries_that_see_it():
    """In a prompt, through the decoded view, and without a cache alike."""
    q, k, v = make_qkv(12)
    broken = v.at[0, 7, 0, 3].set(jnp.nan)
    scheme = nq.schemes.get("nqkv:sinks=2")
    view = nq.DecodedView(scheme=scheme, num_layers=1, dtype=jnp.dtype(jnp.float32))
    for cache in (None, view, make_cache("nqkv:sinks=2", max_len=12)):
        out = np.asarray(
            jax.jit(nq.attend, static_argnames="window")(q, k, broken, cache, window=3)[0]
        )
        bad = ~np.isfinite(out).all(axis=-1)  # [B, T, Hq]
        assert bad[0, 7:10, :3].all()
        assert not bad[0, :7].any() and not bad[0, 10:].any()
        assert not bad[1].any()
        # A block of this scheme spans both heads, and is NaN as a whole.
        assert bad[0, :, 3:].any() == (cache is view)


def test_num_new_is_clipped_to_the_tokens_that_there_are():
    q, k, v = make_qkv(3)
    append = jax.jit(lambda cache: nq.attend(q, k, v, cache, num_new=[7, -2])[1])
    cache = append(make_cache("nqkv", max_len=12))
    np.testing.assert_array_equal(cache.lengths, [3, 0])
    assert cache.lengths.dtype == jnp.int32


def test_output_has_the_dtype_of_the_queries():
    q, k, v = make_qkv(3)
    out, _ = attend(q.astype(jnp.bfloat16), k, v, make_cache("none", max_len=12))
    assert out.dtype == jnp.bfloat16


def test_numpy_arrays_are_taken_as_jax_takes_them():
    q, k, v = (np.asarray(a, np.float64) for a in make_qkv(tokens=1))
    out, _ = nq.attend(q, k, v, make_cache("nqkv", max_len=8))
    assert out.dtype == jnp.float32


def test_the_scale_of_scores_is_not_rounded_to_bfloat16():
    """To it 112^-0.5 would be 0.25 % more, and all scores with it."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(64, 1, 1, 112)), jnp.bfloat16)
    k = jnp.concatenate([q / 2, jnp.zeros_like(q)], axis=1)
    v = jnp.zeros_like(k).at[:, 1].set(1)
    out, _ = jax.jit(nq.attend)(jnp.concatenate([q, q], axis=1), k, v)
    scores = np.log(1 / np.float64(out[:, 1, 0, 0]) - 1)
    expected = np.sum(np.float64(q) ** 2, axis=-1)[:, 0, 0] / 2 * 112**-0.5
    assert np.mean(scores / expected) == pytest.approx(1, abs=5e-4)


def test_low_precision_models_keep_their_dtype():
    q, k, v = (a.astype(jnp.bfloat16) for a in make_qkv(9))
    out, cache = attend(q, k, v, make_cache("nqkv:sinks=2", max_len=16, dtype=jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and cache.layers[0].key.sinks.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InParts(nq.Quantizer):
    """Full precision; a folded token is two tokens that add up to it."""

    def quantize(self, x, context):
        return x

    def dequantize(self, payload, context, dtype=jnp.float32):
        return payload.astype(dtype)

    def dequantize_folded(self, payload, context, dtype=jnp.float32):
        x = payload.astype(dtype)
        return jnp.concatenate([x * 0.25, x * 0.75], axis=-1)

    def fold_queries(self, q, context):
        return jnp.concatenate([q, q], axis=-1), None

    def unfold_output(self, out, context):
        return sum(jnp.split(out, 2, axis=-1))


@pytest.mark.parametrize("key, value", [MORE(True, True), (True, False), (False, True)])
def test_folded_tokens_may_have_another_width(key, value):
    plain = nq.schemes.get("none").layer(nq.schemes.LayerShape(num_kv_heads=1, head_dim=1)).key
    scheme = nq.schemes.LayerScheme(
        key=InParts() if key else plain, value=InParts() if value else plain
    )
    shape = nq.schemes.LayerShape(num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    layer = scheme.init(shape, batch=BATCH, max_len=8, dtype=jnp.float32)
    cache, expected = nq.KVCache(layers=(layer,), scheme="parts"), make_cache("none", max_len=8)
    q, k, v = make_qkv(8)
    out, cache = attend(q[:, :5], k[:, :5], v[:, :5], cache)
    reference, expected = attend(q[:, :5], k[:, :5], v[:, :5], expected)
    chex.assert_trees_all_close(out, reference, rtol=1e-5, atol=1e-6)
    out, _ = attend(q[:, 5:], k[:, 5:], v[:, 5:], cache)
    reference, _ = attend(q[:, 5:], k[:, 5:], v[:, 5:], expected)
    chex.assert_trees_all_close(out, reference, rtol=1e-5, atol=1e-6)
