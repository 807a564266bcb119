"""Whole generation loops compile for every accelerator, with the packed cache carried in place."""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from targets import TPUS, TRITON, calls, compile_for

import nqkv_jax as nq
from nqkv_jax import schemes
from nqkv_jax.models import decoding, families
from nqkv_jax.models.sampling import Sampling
from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.plan import layer_windows

HERE = pathlib.Path(__file__).parent
SCHEME = "nqkv:residual=128,codebook=cubic"
SHAPE = jax.ShapeDtypeStruct
BATCH = 2


@functools.cache
def model(name):
    config = families.presets[name]
    if layer_windows(config):  # few of its layers, of both kinds
        config = dataclasses.replace(config, num_layers=3, windows=(512, None, 512))
    return config, *nnx.split(families.abstract(config, dtype=jnp.bfloat16))


def state_of(config, scheme, max_len, batch=BATCH, implementation="auto"):
    cache = schemes.get(scheme).abstract(
        num_layers=config.num_layers, batch=batch, max_len=max_len,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=jnp.bfloat16,
        windows=layer_windows(config),
    )  # fmt: skip
    cache = cache.with_implementation(implementation)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    each = lambda dtype: SHAPE((batch,), dtype)
    return decoding.DecodeState(
        cache=cache, token=each(jnp.int32), count=each(jnp.int32),
        tokens=SHAPE((batch, max_len), jnp.int32), done=each(jnp.bool_), failed=each(jnp.bool_),
        keys=keys, seen=None,
    )  # fmt: skip


def decode_loop(name, max_len, scheme=SCHEME, implementation="auto"):
    """The loop, and its arguments."""
    config, graphdef, params = model(name)
    state = state_of(config, scheme, max_len, implementation=implementation)
    run = functools.partial(decoding.decode, graphdef, rules=Sampling().rules())
    arguments = params, state, state.done, SHAPE((1,), jnp.int32), SHAPE((), jnp.int32)
    return jax.jit(run, donate_argnums=1), arguments


@functools.cache
def traced(name):
    """A loop that is traced once, for no target; its arguments, flat; and the cache in them.

    As if the kernel for GPUs were automatic, too.
    """
    loop, arguments = decode_loop(name, 1024)
    with mock.patch.dict(decode_attention.PLATFORMS, mosaic_gpu="cuda"):
        program = jaxpr_as_fun(loop.trace(*arguments).jaxpr)
    start, size = (len(jax.tree.leaves(a)) for a in arguments[:2])
    loop = jax.jit(program, donate_argnums=range(start, start + size))
    return loop, jax.tree.leaves(arguments), arguments[1].cache


@pytest.mark.parametrize("target", ["v5e", "v6e", "h100"])
@pytest.mark.parametrize("name", ["opt-125m", "smollm2-135m", "llama-3-8b"])
def test_one_traced_program_compiles_for_every_target(name, target):
    loop, arguments, cache = traced(name)
    compiled = compile_for(target, loop, *arguments)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    kernel = ["tpu_custom_call"] if target in TPUS else ["mosaic_gpu", "decode_attention"]
    assert calls(compiled, *kernel) == len(cache.layers)


@pytest.mark.parametrize(
    "target, scheme",
    [
        ("v5e", SCHEME), ("v6e", SCHEME), ("v5e", "nqkv"), ("v6e", "nqkv"), ("h100", "nqkv"),
        ("h100", SCHEME), ("h100", "nqkv-plus:bits=2"), ("h100", "kvq:residual=128"),
        ("v5e", "kivi"), ("h100", "kivi"), ("v5e", "squat"), ("h100", "squat"),
        ("v5e", "fp8"), ("h100", "fp8"),
    ],
)  # fmt: skip
def test_no_temporary_grows_with_the_cache(target, scheme):
    temporary = []
    for max_len in (1024, 2048):
        implementation = "auto" if target in TPUS else "mosaic_gpu"
        loop, arguments = decode_loop("smollm2-135m", max_len, scheme, implementation)
        compiled = compile_for(target, loop, *arguments)
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    config = model("smollm2-135m")[0]
    kernel = "tpu_custom_call" if target in TPUS else "mosaic_gpu"
    attends = calls(compiled, kernel, "" if target in TPUS else "decode_attention")
    assert attends == config.num_layers
    # Less than one side of one layer decoded, of 60. What grow on a TPU are scales and some words,
    # which the compiler brings into VMEM ahead of the kernel: less than two sides, or four where
    # scales are a third of what is stored.
    sides = {"kivi": 4}.get(scheme, 2) if target in TPUS else 1
    decoded = BATCH * 1024 * config.num_kv_heads * config.head_dim * 2
    assert temporary[1] - temporary[0] < sides * decoded
    computations = compiled.as_text().split("\n\n")
    (step,) = (c for c in computations if f'custom_call_target="{kernel}' in c)
    # Words are written where they are.
    assert not re.findall(rf"= s16\[{BATCH},\d+,\d+,\d+,128\]\S* copy\(", step)
    if target not in TPUS:
        # The host evaluates conditions: beside that of the loop one for the flush of all layers, if
        # chunks are of more than a token.
        in_chunks = scheme not in ("nqkv", "fp8")
        assert step.count(" while(") == in_chunks
        # Tokens that are encoded by themselves are appended by a kernel: of kivi, values. Where
        # there is a residual, another attends to it.
        of = functools.partial(calls, compiled, TRITON)
        sides = {"nqkv": 2, "fp8": 2, "kivi": 1, "squat": 1}.get(scheme, 0)
        assert of("append_token") == sides * config.num_layers
        assert of("exact_attention") == in_chunks * config.num_layers


@pytest.mark.parametrize(
    "target, scheme", [("a100", "nqkv-plus:bits=2"), ("l4", "kivi"), ("b200", "nqkv")]
)
def test_nor_on_other_gpus(target, scheme):
    """In a process of its own: one assembles kernels for one GPU."""
    test = test_no_temporary_grows_with_the_cache.__name__
    code = f"import {__name__} as t; t.{test}('{target}', '{scheme}')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "target, name, scheme",
    [
        *((t, n, SCHEME) for t in ("v5e", "v6e", "h100") for n in ("gemma-2-2b", "gemma-3-270m")),
        ("v5e", "gemma-3-270m", "kivi"), ("h100", "gemma-3-270m", "kivi"),
    ],
)  # fmt: skip
def test_rings_and_caps(target, name, scheme):
    """Layers with a sliding window attend to either round of their rings, scores have a cap."""
    implementation = "auto" if target in TPUS else "mosaic_gpu"
    temporary = []
    for max_len in (2048, 4096):
        loop, arguments = decode_loop(name, max_len, scheme, implementation)
        compiled = compile_for(target, loop, *arguments)
        memory, cache = compiled.memory_analysis(), arguments[1].cache
        assert memory.alias_size_in_bytes >= cache.nbytes
        temporary.append(memory.temp_size_in_bytes)
    rings = [layer.window is not None for layer in cache.layers]
    kernel = ["tpu_custom_call"] if target in TPUS else ["mosaic_gpu", "decode_attention"]
    assert rings == [True, False, True]
    assert calls(compiled, *kernel) == len(rings) + sum(rings)
    if target not in TPUS:
        assert calls(compiled, TRITON, "exact_attention") == len(rings)
    # Less than one side of the one layer that keeps all tokens, decoded.
    config = model(name)[0]
    decoded = BATCH * 2048 * config.num_kv_heads * config.head_dim * 2
    assert temporary[1] - temporary[0] < decoded


def test_a_kernel_reads_its_part_of_the_sequences():
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS["v5e"][0])
    mesh, by_sequence = Mesh(np.array(topology.devices[:2]), ("batch",)), PartitionSpec("batch")
    sharding = NamedSharding(mesh, by_sequence)
    attend = jax.shard_map(
        nq.attend, mesh=mesh, in_specs=by_sequence, out_specs=by_sequence, check_vma=False
    )
    cache = nq.schemes.get("nqkv").abstract(
        num_layers=1, batch=4, max_len=2048, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16
    )
    new = [SHAPE((4, 1, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    *new, cache = jax.tree.map(lambda a: SHAPE(a.shape, a.dtype, sharding=sharding), (*new, cache))
    compiled = jax.jit(attend, donate_argnums=3).trace(*new, cache).lower().compile()
    assert calls(compiled, "tpu_custom_call") == 1 and "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("target", ["v5e", "v6e", "h100"])
def test_prefill_uses_flash_attention(target):
    config, graphdef, params = model("smollm2-135m")
    cache = state_of(config, SCHEME, 1024).cache
    prefill = jax.jit(functools.partial(decoding.prefill, graphdef), donate_argnums=(3, 4))
    arguments = (
        params, SHAPE((2, 512), jnp.int32), SHAPE((2,), jnp.int32),
        SHAPE((2, config.vocab_size), jnp.float32), cache,
    )  # fmt: skip
    text = compile_for(target, prefill, *arguments).as_text()
    assert ("tpu_custom_call" if target in TPUS else "__cudnn$fmha") in text
