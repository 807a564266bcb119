"""`attend` by a fused kernel: the same as step by step, and chosen where it can serve."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import nqkv_jax as nq
from nqkv_jax import body
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu, mosaic_tpu
from nqkv_jax.quantizers.tiled import TiledQuantizer, in_tiles
from nqkv_jax.quantizers.tiled_vectors import TiledNSN
from nqkv_jax.rotary import Rotary

HEADS, GROUP, DIM = 3, 2, 64
SCHEME = "nqkv:residual=128,codebook=cubic,centre=True,hadamard=True,sinks=4"
CHANNELS = "nqkv-plus:bits=2"  # keys with a scale for every channel of a tile, some of two digits
NO_TILES = "turboquant:variant=prod"
ROTARY = Rotary(inverse_frequencies=jnp.asarray(100.0 ** -(np.arange(DIM // 2) / (DIM // 2))))

# What turning means has to mind: a factor, and channels that are not rotated.
YARN = Rotary(inverse_frequencies=ROTARY.inverse_frequencies[:24], attention_factor=1.25)
ROTARIES = {"rope": ROTARY, "yarn": YARN, "none": None}


MORE = functools.partial(pytest.param, marks=pytest.mark.more)


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, count, heads, DIM)), jnp.float32)
    return draw(HEADS * GROUP), draw(HEADS) + 1, draw(HEADS) - 1


def empty(scheme, max_len=640):
    return nq.schemes.get(scheme).init(
        num_layers=1, batch=2, max_len=max_len, num_kv_heads=HEADS, head_dim=DIM
    )


@functools.cache
def prompted(scheme, rotary="rope"):
    """A cache of a ragged batch: 420 and 150 tokens, of which 384 and 128 are encoded."""
    attend = jax.jit(functools.partial(nq.attend, rotary=ROTARIES[rotary]))
    return attend(*tokens(420), empty(scheme), num_new=jnp.array([420, 150]))[1]


@pytest.mark.optimized
@pytest.mark.parametrize(
    "scheme, window, rotary",
    [
        MORE(SCHEME, None, "rope"),
        MORE(SCHEME, 200, "rope"),
        MORE(CHANNELS, None, "rope"),
        (CHANNELS, 200, "yarn"),
        MORE(CHANNELS, None, "none"),
        MORE("nqkv-plus:keys=rotated", None, "rope"),
        MORE("nqkv", 200, "rope"),
        MORE("kivi", None, "rope"),
        MORE("fp8", None, "rope"),
    ],
)
def test_kernel_and_steps_agree(scheme, window, rotary):
    cache, new = prompted(scheme, rotary), tokens(1, seed=1)
    run = functools.partial(nq.attend, rotary=ROTARIES[rotary], window=window)
    expected, after = jax.jit(functools.partial(run, implementation="xla"))(*new, cache)
    with pltpu.force_tpu_interpret_mode():
        fused = jax.jit(functools.partial(run, implementation="mosaic_tpu"))
        out, same = fused(*new, cache)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(after, same)


NF3, U2 = nq.codebooks.normal_float(3), nq.codebooks.uniform(2)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "codebook, axis, size, numbers",
    [(NF3, "hidden", HEADS * DIM, 1), (NF3, "tokens", 128, 1), (U2, "tokens", 32, 2)],
)
def test_tiles_decode_to_what_blocks_do(codebook, axis, size, numbers):
    scale = "minmax" if numbers == 2 else "absmax"
    block = nq.BlockQuantizer(codebook, block_size=size, axis=axis, scale=scale)
    x = tokens(128)[1]
    quantize = jax.jit(nq.quantize, static_argnums=1)
    codes = [quantize(x, q) for q in (block, in_tiles(block, 256, HEADS, DIM))]
    np.testing.assert_array_equal(*map(jax.jit(nq.dequantize), codes))
    bits = codebook.bits + numbers * 16 / size
    assert nq.stored_bits(codes[0]) == nq.stored_bits(codes[1]) == bits


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel for GPUs needs jax 0.11")
@pytest.mark.parametrize(
    "scheme, rotary",
    [
        (SCHEME, "rope"),
        (CHANNELS, "yarn"),
        MORE("kvq:residual=128", "rope"),
        MORE("quanto", "rope"),
        MORE("nqkv", "rope"),
        ("kivi", "rope"),
    ],
)
def test_kernel_for_gpus_and_steps_agree(scheme, rotary, monkeypatch):
    cache, new = prompted(scheme, rotary), tokens(1, seed=1)
    run = functools.partial(nq.attend, rotary=ROTARIES[rotary])
    expected, _ = jax.jit(functools.partial(run, implementation="xla"))(*new, cache)
    interpreted = functools.partial(
        mosaic_gpu.decode_attention, interpret=plgpu.InterpretGPUParams()
    )
    monkeypatch.setattr(mosaic_gpu, "decode_attention", interpreted)
    out, _ = jax.jit(functools.partial(run, implementation="mosaic_gpu"))(*new, cache)
    # Its products are in float16.
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rotary", [MORE("rope"), MORE("yarn"), "none"])
def test_steps_are_what_the_decoded_view_says(rotary):
    """Folded queries and keys against keys decoded in full, on which perplexities are measured."""
    scheme, rotary = nq.schemes.get(CHANNELS), ROTARIES[rotary]
    q, k, v = tokens(270)
    attend = jax.jit(functools.partial(nq.attend, rotary=rotary))
    cache = scheme.init(
        num_layers=1, batch=2, max_len=270, num_kv_heads=HEADS, head_dim=DIM, dtype=jnp.float32
    )
    _, cache = attend(q[:, :-1], k[:, :-1], v[:, :-1], cache)
    out, _ = attend(q[:, -1:], k[:, -1:], v[:, -1:], cache)
    view = nq.DecodedView(scheme=scheme, num_layers=1, dtype=jnp.dtype(jnp.float32))
    expected, _ = attend(q, k, v, view)
    np.testing.assert_allclose(out[:, 0], expected[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheme", ["nsnquant:bits=1", MORE("nsnquant:residual=128,normalise=False")]
)
def test_vectors_by_look_up_and_by_kernels_are_what_decoding_gives(scheme, monkeypatch):
    # The second of two steps is moved back to fit, and the window begins within the first.
    monkeypatch.setattr("nqkv_jax.body.LOOK_UP_TILES", 2)
    new = tokens(1, seed=1)
    run = functools.partial(nq.attend, rotary=YARN, window=300)

    def prompted():
        cache = empty(scheme, max_len=420)
        return jax.jit(run)(*tokens(400), cache, num_new=jnp.array([400, 140]))[1]

    cache = prompted()
    assert isinstance(cache.layers[0].key.quantizer, TiledNSN)
    assert cache.layers[0].key.num_groups == 3
    by_look_up, _ = jax.jit(functools.partial(run, implementation="xla"))(*new, cache)
    with pltpu.force_tpu_interpret_mode():
        fused, _ = jax.jit(functools.partial(run, implementation="mosaic_tpu"))(*new, cache)
    monkeypatch.setattr("nqkv_jax.schemes.base.in_tiles", lambda quantizer, *_: quantizer)
    windows = prompted()
    assert windows.stored_bits == cache.stored_bits
    expected, _ = jax.jit(run)(*new, windows)
    np.testing.assert_allclose(by_look_up, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", [SCHEME, MORE(CHANNELS)])
def test_a_saved_cache_serves_the_kernel(scheme, tmp_path):
    """Tiles are one layout for all platforms."""
    cache, new = prompted(scheme), tokens(1, seed=2)
    nq.save_cache(cache, tmp_path / "cache.safetensors")
    loaded = nq.load_cache(tmp_path / "cache.safetensors")
    chex.assert_trees_all_equal(loaded, cache)
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    run = jax.jit(functools.partial(nq.attend, rotary=ROTARY))
    np.testing.assert_array_equal(run(*new, loaded)[0], run(*new, cache)[0])


@pytest.mark.parametrize(
    "scheme, uses",
    [
        (SCHEME, True),
        (CHANNELS, True),
        ("nqkv", True),
        ("kivi", True),
        ("squat", True),
        ("hqq", True),
        ("nsnquant", True),
        ("fp8", True),
        (NO_TILES, False),
    ],
)
def test_a_tpu_gets_the_kernel_and_a_cpu_does_not(scheme, uses):
    cache, new = empty(scheme), tokens(1)
    traced = jax.jit(functools.partial(nq.attend, rotary=ROTARY)).trace(*new, cache)
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in tpu) == uses
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_kernel_that_cannot_serve_says_why():
    asking = empty(NO_TILES).with_implementation("mosaic_tpu")

    def trace(cache, **options):
        attend = functools.partial(nq.attend, rotary=ROTARY, **options)
        return jax.eval_shape(attend, *tokens(1), cache)

    with pytest.raises(NotImplementedError, match="mosaic_tpu needs keys and values in tiles"):
        trace(empty(NO_TILES), implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs keys and values in tiles"):
        trace(asking)
    trace(asking, implementation="xla")  # for this call
    with pytest.raises(ValueError, match=r"to be one of .*; got 'cuda'"):
        trace(empty(SCHEME), implementation="cuda")
    with pytest.raises(ValueError, match=r"cache: .* to be one of .*; got None"):
        asking.with_implementation(None)


def test_blocks_that_no_kernel_can_read_stay_as_they_are():
    block = functools.partial(nq.BlockQuantizer, nq.codebooks.normal_float(4))
    assert in_tiles(block(block_size=96), 128, 3, 64) == block(block_size=96)
    assert in_tiles(block(block_size=64, axis="tokens"), 96, 3, 64).group == 64
    assert in_tiles(block(block_size=24), 128, 3, 24) == block(block_size=24)
    assert isinstance(in_tiles(block(block_size=32), 128, 3, 64), TiledQuantizer)
    channels = functools.partial(block, axis="tokens")
    assert in_tiles(channels(block_size=48), 384, 3, 64) == channels(block_size=48)
    assert isinstance(in_tiles(channels(block_size=32), 128, 3, 64), TiledQuantizer)


def test_layers_share_what_is_traced(monkeypatch):
    """A kernel, which is traced on every platform, and the steps over a body."""
    counts = dict(kernel=0, steps=0)

    def counted(name, run):
        def call(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return call

    monkeypatch.setattr(
        mosaic_tpu, "decode_attention", counted("kernel", mosaic_tpu.decode_attention)
    )
    monkeypatch.setattr(body, "attend_tokens", counted("steps", body.attend_tokens))
    sizes = dict(batch=1, max_len=768, num_kv_heads=HEADS, head_dim=DIM)  # as no other test has

    def trace(num_layers):
        cache = nq.schemes.get("nqkv").abstract(num_layers=num_layers, dtype=jnp.float32, **sizes)
        q, k, v = (a[:1] for a in tokens(1))

        def step(cache):
            for layer in range(num_layers):
                _, cache = nq.attend(q, k, v, cache, layer=layer, rotary=ROTARY)
            return cache

        jax.jit(step).trace(cache)
        return dict(counts)

    one = trace(1)
    assert one["kernel"] == 1 and one["steps"]
    assert trace(3) == one
