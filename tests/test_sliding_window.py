"""Layers with a sliding window keep no more than they see: bodies are rings."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import nqkv_jax as nq
from nqkv_jax.evaluation import decode_perplexity, perplexity
from nqkv_jax.models import LanguageModel, families, generate
from nqkv_jax.models.llama_config import LlamaConfig
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu
from nqkv_jax.plan import plan

BATCH, GROUP, HEADS, DIM = 2, 2, 1, 64
WINDOW, CAPACITY, MAX_LEN = 100, 256, 1024
ROTARY = nq.Rotary(inverse_frequencies=np.float32(10.0) ** -np.linspace(0, 3, DIM // 2))
YARN = nq.Rotary(inverse_frequencies=ROTARY.inverse_frequencies[:10], attention_factor=1.25)

# Token by token, in tiles and not; 48 and 64 at a time; keys before RoPE; sinks; means that are
# turned; vectors; keys ahead of values, and both in turn.
SCHEMES = [
    "none", "int4:group_size=32", "nqkv:residual=48,keys=unrotated,sinks=3,block_size=32",
    "quanto:residual=64", "nqkv-plus:bits=2,recent=0", "nsnquant:window=16,residual=32",
    "kivi:residual=64", "squat:group_size=16,residual=48,subspace=6,keys=unrotated",
]  # fmt: skip


MORE = functools.partial(pytest.param, marks=pytest.mark.more)


def make(scheme, windows=(WINDOW,), max_len=MAX_LEN, dtype=jnp.float32):
    return nq.schemes.get(scheme).init(
        num_layers=1, batch=BATCH, max_len=max_len, num_kv_heads=HEADS, head_dim=DIM,
        windows=windows, dtype=dtype,
    )  # fmt: skip


@functools.cache
def qkv(count):
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(BATCH, count, heads, DIM)), jnp.float32)
    offset = 2 * jnp.asarray(rng.normal(size=(HEADS, DIM)), jnp.float32)
    q, k, v = draw(HEADS * GROUP), draw(HEADS), draw(HEADS)
    return q, k + jnp.broadcast_to(offset, k.shape), v


@functools.partial(jax.jit, static_argnames=("rotary", "window"))
def prompt(cache, q, k, v, num_new, rotary="rope", window=WINDOW):
    """All tokens at once."""
    rotary = dict(rope=ROTARY, yarn=YARN, none=None)[rotary]
    return nq.attend(q, k, v, cache, rotary=rotary, num_new=num_new, window=window)


@functools.partial(jax.jit, static_argnames=("rotary", "defer"))
def decode(cache, q, k, v, num_new, rotary="rope", defer=False):
    """Token by token, the first num_new[b] of sequence b."""
    rotary = dict(rope=ROTARY, yarn=YARN, none=None)[rotary]
    cache = cache.defer_flush() if defer else cache

    def step(cache, token):
        i, *qkv = token
        fresh = (i < num_new).astype(jnp.int32)
        out, cache = nq.attend(
            *(a[:, None] for a in qkv), cache, rotary=rotary, num_new=fresh, window=WINDOW
        )
        return cache, out[:, 0]

    first = lambda a: jnp.moveaxis(a, 1, 0)
    cache, out = jax.lax.scan(step, cache, (jnp.arange(q.shape[1]), *map(first, (q, k, v))))
    return first(out), cache.flush() if defer else cache


def part(begin, stop):
    return [a[:, begin:stop] for a in qkv(460)]


def everything(num_new):
    return jnp.full(BATCH, num_new)


@pytest.mark.parametrize(
    "scheme, rotary",
    [
        MORE("none", "rope"),
        MORE("nqkv:block_size=32,residual=16,keys=unrotated", "none"),
        ("nqkv:block_size=32,residual=16,keys=unrotated", "yarn"),
    ],
)
def test_attention_is_that_of_a_cache_that_keeps_all(scheme, rotary):
    """Over more than two rounds of the ring, prompts and tokens in turn, in a ragged batch.

    With these schemes a key is coded before RoPE, or not at all, so that only roundings differ.
    """
    caches = [make(scheme), make(scheme, windows=None)]
    assert caches[0].layers[0].key.capacity == CAPACITY
    seen = jnp.zeros(BATCH, jnp.int32)
    for begin, stop, counts, run in (
        (0, 180, [180, 37], prompt), (180, 320, [140, 9], decode), (320, 460, [131, 140], prompt),
        (320, 460, [140, 140], decode), (0, 140, [1, 140], decode),
    ):  # fmt: skip
        counts = jnp.asarray(counts)
        outs = []
        for i, cache in enumerate(caches):
            out, caches[i] = run(cache, *part(begin, stop), counts, rotary=rotary)
            valid = jnp.arange(stop - begin)[None] < counts[:, None]
            outs.append(jnp.where(valid[..., None, None], out, 0))
        np.testing.assert_allclose(*outs, rtol=0, atol=2e-4)
        seen += counts
    np.testing.assert_array_equal(caches[0].lengths, seen)


@pytest.mark.parametrize(
    "scheme",
    [*map(MORE, SCHEMES[:2]), SCHEMES[2], *map(MORE, SCHEMES[3:6]), SCHEMES[6], MORE(SCHEMES[7])],
)
def test_evaluation_sees_what_decoding_sees(scheme):
    """Over more than a round; and the errors are of the size of a cache that keeps all."""
    _, cache = prompt(make(scheme), *part(0, 300), everything(300))
    out, _ = decode(cache, *part(300, 330), everything(30))
    view = nq.DecodedView(scheme=nq.schemes.get(scheme), num_layers=1, dtype=jnp.dtype("float32"))
    expected, _ = prompt(view, *part(0, 330), None)
    np.testing.assert_allclose(out, expected[:, 300:], rtol=0, atol=1e-4)
    exact, _ = prompt(None, *part(0, 330), None)
    error = np.sqrt(np.mean(np.square(expected - exact)))
    assert 1e-7 < error < 0.2 and (error > 1e-3) == (scheme != "none")


@pytest.mark.more
@pytest.mark.parametrize("rotary", ["rope", "yarn"])
@pytest.mark.parametrize("scheme", ["kivi:residual=64", "kivi:bits=4,group_size=16,residual=48"])
def test_keys_that_are_ahead_of_values_across_the_end_of_a_ring(scheme, rotary):
    """Every token of more than a round, which a few more decoded keys follow."""
    _, cache = prompt(make(scheme), *part(0, 120), everything(120), rotary=rotary)
    out, _ = decode(cache, *part(120, 460), everything(340), rotary=rotary)
    view = nq.DecodedView(scheme=nq.schemes.get(scheme), num_layers=1, dtype=jnp.dtype("float32"))
    expected, _ = prompt(view, *part(0, 460), None, rotary=rotary)
    np.testing.assert_allclose(out, expected[:, 120:], rtol=0, atol=1e-4)


def test_keys_are_turned_from_where_the_ring_began():
    """Against the definition, in NumPy: what is stored, where, and what a query sees of it."""
    count = 300
    q, k, v = part(0, count)
    _, cache = prompt(make("int8"), q, k, v, everything(count))
    out, _ = decode(cache, *part(count, count + 1), everything(1))
    q, k, v = (np.asarray(a, np.float64) for a in part(0, count + 1))
    angle = np.arange(2 * MAX_LEN)[:, None] * np.asarray(ROTARY.inverse_frequencies, np.float64)

    def turn(x, positions):  # [..., DIM]
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle[positions]), np.sin(angle[positions])
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def rounded(x):  # to 256 levels between the least and the largest of 64 channels
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        step = (high - low) / 255
        return low + np.round((x - low) / step) * step

    scores = np.zeros(count + 1)
    for token in range(count + 1 - WINDOW, count + 1):
        began = token // CAPACITY * CAPACITY
        key = rounded(turn(k[0, token, 0], token - began))
        scores[token] = turn(q[0, count, 1], count - began) @ key / np.sqrt(DIM)
    weights = np.exp(scores[-WINDOW:] - scores[-WINDOW:].max())
    expected = weights / weights.sum() @ rounded(v[0, -WINDOW:, 0])
    np.testing.assert_allclose(out[0, 0, 1], expected, atol=5e-3)  # scales are in float16


@pytest.mark.parametrize("scheme", [MORE("nqkv:block_size=32,sinks=3"), "nqkv-plus", MORE("kivi")])
def test_kernel_and_steps_agree(scheme):
    _, cache = prompt(make(scheme), *part(0, 320), jnp.array([320, 120]))
    run = functools.partial(nq.attend, rotary=ROTARY, window=WINDOW)
    new = part(320, 321)
    expected, after = jax.jit(functools.partial(run, implementation="xla"))(*new, cache)
    with pltpu.force_tpu_interpret_mode():
        fused = jax.jit(functools.partial(run, implementation="mosaic_tpu"))
        out, same = fused(*new, cache)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(after, same)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel for GPUs needs jax 0.11")
def test_kernel_for_gpus_and_steps_agree(monkeypatch):
    _, cache = prompt(make("nqkv-plus"), *part(0, 320), jnp.array([320, 120]))
    run = functools.partial(nq.attend, rotary=ROTARY, window=WINDOW)
    expected, _ = jax.jit(functools.partial(run, implementation="xla"))(*part(320, 321), cache)
    interpreted = functools.partial(
        mosaic_gpu.decode_attention, interpret=plgpu.InterpretGPUParams()
    )
    monkeypatch.setattr(mosaic_gpu, "decode_attention", interpreted)
    out, _ = jax.jit(functools.partial(run, implementation="mosaic_gpu"))(*part(320, 321), cache)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-3)  # its products are in float16


# Models


@pytest.fixture(scope="module")
def lm():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=64,
        max_positions=512, tie_embeddings=False, ffn_size=64, norm_eps=1e-6,
        windows=(WINDOW, None, WINDOW),
    )  # fmt: skip
    model = families.build(config)
    for layer in model.layers:  # far from uniform attention
        layer.qkv.kernel[...] *= 30
    return LanguageModel(
        model=model, config=config, tokenizer=None, name="tiny", dtype=np.dtype("float32")
    )


def test_generation(lm):
    """Prompts in chunks, a ragged batch: what a cache says is what the model says without one."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in (230, 70)]
    result = generate(lm, prompts, scheme="none", max_new_tokens=90, prefill_chunk=64)
    sizes = dict(num_layers=3, batch=2, max_len=384, num_kv_heads=1, head_dim=64)
    keeping_all = nq.schemes.get("none").abstract(**sizes, dtype=jnp.float32)
    assert result.cache_bytes < 0.9 * keeping_all.nbytes  # 256, 384 and 256 tokens
    for prompt_, new in zip(prompts, result.tokens, strict=True):
        logits = np.asarray(lm.logits([prompt_ + new]))[0, len(prompt_) - 1 : -1]
        chosen = logits[np.arange(len(new)), new]
        np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-3)
        assert np.std(logits) > 0.1


@pytest.mark.parametrize("scheme", [MORE("int4"), "nqkv-plus:bits=2,recent=0"])
def test_perplexity_is_that_of_decoding(lm, scheme):
    tokens = np.random.default_rng(1).integers(0, 64, 300)
    parallel = perplexity(lm, tokens, scheme=scheme, window=300)
    loop = decode_perplexity(lm, tokens, scheme=scheme, window=300)
    full = perplexity(lm, tokens, scheme="none", window=300)
    np.testing.assert_allclose(parallel.nll, loop.nll, rtol=1e-5)
    assert abs(parallel.nll - full.nll) > 1e-4 * full.nll


def test_plan_counts_windows():
    config = families.presets["gemma-3-270m"]
    rows = plan(config, ["none", "nqkv"], memory=2**30, contexts=[32768], batches=[1]).rows
    every = dataclasses.replace(config, windows=())
    whole = plan(every, ["none", "nqkv"], memory=2**30, contexts=[32768], batches=[1]).rows
    for row, all_, bits in zip(rows, whole, (16, 4.0625), strict=True):
        assert row.token_bytes == all_.token_bytes / 6 == 3 * 2 * 256 * bits / 8
        assert row.largest_batch[32768] > 5 * all_.largest_batch[32768]
        assert row.largest_context[1] > 5 * all_.largest_context[1]
        assert row.sequence_bytes >= 15 * 2 * 512 * 256 * bits / 8
    local = dataclasses.replace(config, windows=(512,) * 18)
    (row,) = plan(local, ["nqkv"], memory=2**30, batches=[1, 10**6]).rows
    assert row.token_bytes == 0
    assert row.largest_context[1] == 32768 and row.largest_context[10**6] < 512


# Sizes


def test_bytes_do_not_grow():
    short, long = (make("nqkv:block_size=32", max_len=n) for n in (512, 4096))
    assert short.nbytes == long.nbytes
    assert short.stored_bits == make("nqkv:block_size=32", windows=None).stored_bits
    assert short.token_bytes == 0 and make("int4", windows=None).token_bytes > 0
    # A cache that is no longer than the window keeps all: it is the ordinary one.
    chex.assert_trees_all_equal_structs(
        make("nqkv:block_size=32", max_len=256), make("nqkv:block_size=32", None, max_len=256)
    )


def test_layers_differ():
    cache = nq.schemes.get("nqkv:block_size=32").init(
        num_layers=3, batch=1, max_len=4096, num_kv_heads=1, head_dim=32, windows=(512, None, 300)
    )
    assert [layer.window for layer in cache.layers] == [512, None, 300]
    assert [layer.key.capacity for layer in cache.layers] == [512, 4096, 384]
    one = 4.5 / 8 * 32 * 2  # bytes of a token in one layer
    assert cache.token_bytes == one
    held = cache.nbytes - 3 * 2 * 4  # lengths and overflow
    assert held == one * (512 + 4096 + 384)


def test_a_scheme_that_keeps_all():
    """Its values look at keys."""
    scheme = "ott:skip_layers=0,group_size=32"
    cache = make(scheme)
    assert cache.layers[0].window is None
    chex.assert_trees_all_equal_structs(cache, make(scheme, windows=None))


def test_saved_and_loaded(tmp_path):
    _, cache = prompt(make("nqkv-plus"), *part(0, 320), jnp.array([320, 120]))
    nq.save_cache(cache, tmp_path / "cache.safetensors")
    loaded = nq.load_cache(tmp_path / "cache.safetensors")
    chex.assert_trees_all_equal(cache, loaded)
    assert loaded.layers[0].window == WINDOW


# What is refused


@pytest.mark.parametrize("window", [None, WINDOW + 1])
def test_attention_to_what_is_gone(window):
    attend = functools.partial(nq.attend, rotary=ROTARY)
    with pytest.raises(ValueError, match=f"keeps the latest {WINDOW} tokens.*window={window}"):
        jax.eval_shape(functools.partial(attend, window=window), *part(0, 1), make("int4"))
    jax.eval_shape(functools.partial(attend, window=WINDOW - 1), *part(0, 1), make("int4"))


@pytest.mark.parametrize("windows", [(), (3, 3), (0,), (True,), (2.5,), ("3",), 5])
def test_windows_that_are_none(windows):
    with pytest.raises(ValueError, match="expected windows to be a whole number >= 1, or None"):
        make("int4", windows=windows)


# With all optimizations


@pytest.mark.optimized
@pytest.mark.parametrize("scheme", [*map(MORE, SCHEMES[1:4]), SCHEMES[4], MORE(SCHEMES[6])])
def test_bits_do_not_depend_on_how_tokens_came(scheme):
    """All at once, over more than a round; and in parts, the last of them token by token."""
    counts = jnp.array([320, 273])
    _, once = prompt(make(scheme), *part(0, 320), counts)
    _, cache = prompt(make(scheme), *part(0, 180), everything(180))
    tokens = part(180, 320)
    _, by_token = decode(cache, *tokens, counts - 180)
    chex.assert_trees_all_equal(once, by_token)
    if cache.layers[0].key.waits:
        _, deferred = decode(cache, *tokens, counts - 180, defer=True)
        chex.assert_trees_all_equal(once, deferred)


@pytest.mark.optimized
def test_decoding_is_in_place():
    """What a loop of steps allocates does not grow with the ring."""

    def loop(cache, q, k, v):
        def step(_, carry):
            out, cache = nq.attend(carry[1], k, v, carry[0], rotary=ROTARY, window=2048)
            return cache, out

        return jax.lax.fori_loop(0, 9, step, (cache.defer_flush(), q))[0].flush()

    def temporaries(window):
        cache = nq.schemes.get("nqkv-plus").abstract(
            num_layers=1, batch=4, max_len=32768, num_kv_heads=4, head_dim=64, windows=(window,)
        )
        q, k = (jax.ShapeDtypeStruct((4, 1, heads, 64), jnp.bfloat16) for heads in (8, 4))
        used = jax.jit(loop, donate_argnums=0).lower(cache, q, k, k).compile().memory_analysis()
        assert used.alias_size_in_bytes == cache.nbytes
        return used.temp_size_in_bytes, cache.nbytes

    (small, fewer), (large, more) = temporaries(2048), temporaries(16384)
    assert large - small < 2**19 < (more - fewer) / 20
