"""Schemes and inputs that the cache, attention and model tests share."""

import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax import codebooks, schemes
from nqkv_jax.calibration import artifact
from nqkv_jax.rotary import Rotary

# Calibrations for the shapes below. One path for all processes of a test run, as names of tests
# must agree between them.
CALIBRATIONS = pathlib.Path(tempfile.gettempdir()) / f"nqkv-jax-tests-{os.getuid()}"
KVQUANT_FILE = CALIBRATIONS / "kvquant.safetensors"
COMMVQ_FILE = CALIBRATIONS / "commvq.safetensors"

# Every registered scheme, and every shape that the contracts allow: with and without sinks,
# residual, state, RoPE before or after, groups of tokens, sides with different windows.
SCHEMES = [
    "none",
    "int8",
    "int4:sinks=2",
    "int2:group_size=16,residual=8",
    "fp8",
    "nqkv",
    "nqkv:bits=3,block_size=32,sinks=3",
    "nqkv:bits=2,codebook=lloyd_max,keys=unrotated,scale_dtype=float32",
    "nqkv:codebook=signed_cubic,residual=16,centre=True,hadamard=True,sinks=4",
    "nqkv:residual=16,centre=True,keys=unrotated",
    "kivi:residual=32",
    "kivi:bits=4,group_size=16,residual=48,sinks=1,keys=unrotated",
    "quanto:bits=3,group_size=16,residual=32,axis=tokens,sinks=1",
    "hqq:group_size=32,residual=0",
    "kvq:group_size=32,residual=16",
    f"kvquant:calibration={KVQUANT_FILE}",
    f"kvquant:bits=2,outliers=0,calibration={KVQUANT_FILE},sinks=0",
    "turboquant:bits=2,variant=prod,residual=8,sinks=1",
    "quarot:bits=3,heads_per_group=2",
    "ott:group_size=16,residual=8,outliers=2,buffer=3,skip_layers=0",
    "nqkv-plus:fused=False,group_size=16,recent=8",
    "nqkv-plus:bits=2,fused=False,group_size=8,recent=0,sinks=0,keys=rotated,hadamard=False",
    "squat:block=8",
    "squat:group_size=16,residual=48,subspace=6,keys=unrotated",
    "nsnquant:window=16,residual=32",
    f"commvq:bits=1,residual=8,calibration={COMMVQ_FILE}",
]

# What these show of shapes the others show too: they take their turn with `make test-more`.
RARE = {
    "int8", "int2:group_size=16,residual=8", "nqkv:bits=3,block_size=32,sinks=3",
    "nqkv:residual=16,centre=True,keys=unrotated", "kivi:residual=32",
    f"kvquant:bits=2,outliers=0,calibration={KVQUANT_FILE},sinks=0",
    "nqkv-plus:bits=2,fused=False,group_size=8,recent=0,sinks=0,keys=rotated,hadamard=False",
    "squat:block=8",
}  # fmt: skip
EACH_SCHEME = [pytest.param(s, marks=pytest.mark.more) if s in RARE else s for s in SCHEMES]

BATCH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 6, 2, 32
ROTARY = Rotary(inverse_frequencies=np.float32(10.0) ** -np.arange(0, 2, 0.25, dtype=np.float32))


def make_qkv(
    tokens: int,
    *,
    seed: int = 0,
    batch: int = BATCH,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> tuple[jax.Array, ...]:
    """Queries [batch, tokens, num_heads, head_dim], keys and values with offset channels."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.normal(size=(batch, tokens, heads, head_dim))
    offset = 2 * rng.normal(size=(1, 1, num_kv_heads, head_dim))
    return tuple(
        jnp.asarray(x, jnp.float32)
        for x in (draw(num_heads), draw(num_kv_heads) + offset, draw(num_kv_heads))
    )


def make_cache(
    spec: str,
    *,
    max_len: int,
    batch: int = BATCH,
    num_layers: int = 1,
    num_kv_heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype=jnp.float32,
):
    return schemes.get(spec).init(
        num_layers=num_layers,
        batch=batch,
        max_len=max_len,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )


def write_kvquant_calibration(path: pathlib.Path) -> None:
    """A calibration of two layers: the ranges of the keys of `make_qkv`, levels for normal data."""
    keys = np.asarray(make_qkv(500)[1]).reshape(-1, NUM_KV_HEADS, HEAD_DIM)
    arrays = {}
    for variant, tail in (("sparse", 0.005), ("full", 0.0)):
        low, high = np.quantile(keys, [tail, 1 - tail], axis=0).astype(np.float32)
        arrays[f"key.zero.{variant}"] = np.stack([(high + low) / 2] * 2)
        arrays[f"key.scale.{variant}"] = np.stack([(high - low) / 2] * 2)
        for bits in (2, 3, 4):
            levels = np.asarray(codebooks.lloyd_max_normal(bits).levels, np.float32) / 3
            for side in ("key", "value"):
                arrays[f"{side}.levels{bits}.{variant}"] = np.stack([levels] * 2)
                arrays[f"{side}.q_norm{bits}.{variant}"] = np.stack([levels * 1.1 + 0.01] * 2)
    shape = dict(num_layers=2, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    about = dict(model="none", fingerprint="", outliers=0.01)
    artifact.save(path, "kvquant 1", arrays, shape | about)


def write_commvq_calibration(
    path: pathlib.Path,
    *,
    heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
    levels: int = 3,
    fingerprint: str = "",
) -> None:
    """Of two layers, 1 bit: random codewords that grow smaller with the level, random encoders."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=(2, *shape)).astype(np.float16)
    hidden, width = heads * head_dim, 48
    fall = np.float16(0.5) ** np.arange(1, levels + 1, dtype=np.float16)[:, None, None, None]
    arrays = {
        "key.codebook": normal(levels, heads, 64, head_dim) * fall / np.float16(8),
        "value.codebook": normal(hidden, heads, head_dim) / np.float16(32),
        "value.scale": np.abs(normal(heads, head_dim)).astype(np.float32) + 1,
        "encoder.inner": normal(hidden, width) / np.float16(8),
        "encoder.inner_bias": normal(width),
        "encoder.outer": normal(width, 2 * hidden) / np.float16(8),
        "encoder.outer_bias": normal(2 * hidden),
    }
    shape = dict(num_layers=2, num_kv_heads=heads, head_dim=head_dim)
    about = dict(model="none", fingerprint=fingerprint, bits=1, levels=levels)
    artifact.save(path, "commvq 1", arrays, shape | about)


write_kvquant_calibration(KVQUANT_FILE)
write_commvq_calibration(COMMVQ_FILE)
