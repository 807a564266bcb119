"""Decode attention over packed codes: every implementation against the float64 oracle."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import CASES, TPU_CASES, arguments, check, uneven
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from vector_attention_cases import VectorCase

from nqkv_jax import codebooks, partial, tiles
from nqkv_jax.pallas_kernels.decode_attention import (
    decode_attention,
    mosaic_gpu,
    mosaic_tpu_plan,
    triton_vectors,
    xla,
    xla_vectors,
)

AOT = pathlib.Path(__file__).parent / "aot"
SLOW = pytest.mark.slow
MORE = functools.partial(pytest.param, marks=pytest.mark.more)
# A bfloat16 has 8 bits: a level or a query may be off by 2^-9.
BFLOAT16 = 2e-3
STRICT = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True
)


@pytest.fixture
def interpreted():
    with pltpu.force_tpu_interpret_mode(STRICT):
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_xla(case):
    check(case, jnp.float32, 1e-5, implementation="xla")


XLA_QUICK = [
    "cubic4", "plus2-d64", "kivi4-d64", "nf4-d64", "window", "vector1-d64", "vector2-d64-window",
]  # fmt: skip


@pytest.mark.parametrize("name", XLA_QUICK)
def test_xla_on_gpus(name, monkeypatch):
    """Two tiles at a time, of three: the last step is moved back. And all of them at once."""
    reference = xla_vectors if isinstance(CASES[name], VectorCase) else xla
    large = functools.partial(reference._attend, tiles_of_step=2)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "decode_attention", large)
        check(CASES[name], jnp.float32, 1e-5, implementation="xla")
    monkeypatch.setattr(partial, "GPUS", ("cpu",))
    check(CASES[name], jnp.float32, 1e-5, implementation="xla")


QUICK = [
    "cubic4", "keys2-values4-d64", "channels3-d64", "plus2-d64", "float8-e5m2-d64",
    "vector2-d64-window", *map(MORE, ["uniform3-minmax", "vector1-d64"]),
]  # fmt: skip


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", QUICK)
def test_mosaic_tpu_in_the_strict_interpreter(name):
    check(CASES[name], jnp.bfloat16, BFLOAT16, implementation="mosaic_tpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "name",
    [
        "cubic4-signed",
        "integer8-d64",
        *(pytest.param(n, marks=SLOW) for n in ("cubic4-d64", "lloyd2", "plus4", "kivi8")),
    ],
)
def test_mosaic_tpu_with_bfloat16_units(name, monkeypatch):
    """Cubics are computed in bfloat16 then, from v6e on, and integers of 8 bits."""
    monkeypatch.setattr(mosaic_tpu_plan, "_has_bfloat16_units", lambda: True)
    check(CASES[name], jnp.bfloat16, BFLOAT16, implementation="mosaic_tpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["nf4-d64", "window"])
def test_mosaic_tpu_in_float32(name):
    check(CASES[name], jnp.float32, 1e-5, implementation="mosaic_tpu")


@pytest.mark.more
@pytest.mark.usefixtures("interpreted")
def test_mosaic_tpu_serves_vectors_of_96_channels():
    case = dataclasses.replace(CASES["vector2-d64-window"], head_dim=96, rotary=96)
    check(case, jnp.float32, 1e-5, implementation="mosaic_tpu")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("name", TPU_CASES)
def test_mosaic_tpu(name, dtype, tolerance):
    check(CASES[name], dtype, tolerance, implementation="mosaic_tpu")


GPU_SLOW = [
    "cubic4-signed", "uniform4-minmax", "integer4", "integer8", "lloyd2", "cubic4-d64",
    "integer8-d64", "soft-cap", "cubic4-d256", "uniform4-d256",
    "nf4-across-heads", "nf4-d64", "plus4", "plus3", "plus2", "waves-soft-cap",
    "uniform3-minmax", "uniform3-minmax-g16", "channels3-d64", "nf3-d64", "channels4-d256", "nf2",
    "uniform2-d256-g16", "uniform2-minmax-parts", "cubic4-parts", "cubic4-d256-parts",
    "lloyd4", "block4-signed", "stepped4", "cubic4-d96", "plus4-d80", "uniform2-minmax-d96",
    "keys8-values4", "keys3-values4-d64", "keys2-values4-d64", "keys4-values2-minmax-parts",
    "kivi2", "kivi3", "kivi4", "kivi2-d96", "kivi8", "kivi-keys2-values4-d64", "cubic4-parts-of-32",
    "channels2-minmax", "cubic3-d256", "plus2-g20", "float8-parts-g16", "float8-d256",
    "float8-keys-values4", "nf3-d256", "nf4-d256-parts", "kivi2-g16", "kivi4-d256-g16",
    "uniform2-minmax-d80-g16", "uniform3-minmax-d256-parts-g16", "keys8-values4-minmax-parts-g16",
    "keys4-values2-minmax-parts-of-32", "uneven4", "uneven4-d256-parts", "uneven3",
    "uneven4-values2-g16", "cubic3-d64-parts", "kivi2-d256",
]  # fmt: skip
GPU_QUICK = [
    "cubic4", "uniform2-d64", "window", "plus2-d64", "keys4-values2", "cubic4-d80", "kivi4-d64",
    "float8-e5m2-d64", "stepped4-d64", *map(MORE, ["cubic3", "float8"]),
]  # fmt: skip


needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel and its interpreter need jax 0.11"
)


@pytest.mark.parametrize(
    "file, target, cases",
    [
        ("bundles.jsonl", "v5e", TPU_CASES),
        ("bundles.jsonl", "v6e", TPU_CASES),
        ("registers.jsonl", "h100", [*GPU_QUICK, *GPU_SLOW]),
    ],
)
def test_every_case_is_on_record(file, target, cases):
    """What compilers made of it, to which `make test-aot` holds them."""
    rows = map(json.loads, (AOT / file).read_text().splitlines())
    names = [c if isinstance(c, str) else c.values[0] for c in cases]
    if target == "h100":  # where a window makes no other kernel
        names = [name for name in names if CASES[name].window is None]
    assert sorted(r["case"] for r in rows if target in r.values()) == sorted(names)


@needs_mosaic_gpu
@pytest.mark.parametrize("name", [*GPU_QUICK, *(pytest.param(n, marks=SLOW) for n in GPU_SLOW)])
def test_mosaic_gpu_in_the_interpreter(name, monkeypatch):
    """Products whose operand is in registers are beyond the interpreter: `jnp.dot` stands in."""
    strict = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(mosaic_gpu.decode_attention, interpret=strict)
    monkeypatch.setattr(mosaic_gpu, "decode_attention", kernel)
    # Its products are in float16 whatever the queries are.
    check(CASES[name], jnp.bfloat16, 2e-3, num_tiles=4, implementation="mosaic_gpu")


@needs_mosaic_gpu
def test_queries_of_float32_are_as_exact_as_float16_on_gpus(monkeypatch):
    strict = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(mosaic_gpu.decode_attention, interpret=strict)
    monkeypatch.setattr(mosaic_gpu, "decode_attention", kernel)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(CASES["cubic4-d64"], jnp.float32, 1e-5, num_tiles=4, implementation="mosaic_gpu")
    check(CASES["cubic4-d64"], jnp.float32, 2e-3, num_tiles=4, implementation="mosaic_gpu")


@needs_mosaic_gpu
def test_units_in_turn_in_the_interpreter(monkeypatch):
    """Three of one split, with room for two."""
    strict = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(mosaic_gpu.decode_attention, interpret=strict, splits=1)
    monkeypatch.setattr(mosaic_gpu, "decode_attention", kernel)
    check(
        CASES["plus2-d64"], jnp.bfloat16, 2e-3, num_tiles=9, lengths=(300, 1152),
        implementation="mosaic_gpu",
    )  # fmt: skip


VECTORS = [c.name for c in CASES.values() if isinstance(c, VectorCase)]
VECTORS_QUICK = ["vector1-d64", "vector2-d64-window"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in VECTORS_QUICK else SLOW) for n in VECTORS]
)
def test_triton_in_the_interpreter(name, monkeypatch):
    kernel = functools.partial(triton_vectors.decode_attention, interpret=True)
    monkeypatch.setattr(triton_vectors, "decode_attention", kernel)
    # Its products are in float16 whatever the queries are.
    check(CASES[name], jnp.bfloat16, 2e-3, num_tiles=9, implementation="triton")


@needs_mosaic_gpu
def test_what_the_gpu_kernel_needs():
    many = dataclasses.replace(CASES["cubic4"], codebook=uneven(8))
    q, key, value, lengths, _ = arguments(many, (10,))
    message = "at most 16 levels, or those that a polynomial of 9 operations gives; got uneven8"
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    for name, change, got in (
        (
            "keys8-values4",
            dict(value_codebook=codebooks.uniform(2)),
            "got 8 and 2 bits, head_dim 128",
        ),
        (
            "keys4-values2-minmax-parts",
            dict(head_dim=256, group=16),
            "got 4 and 2 bits, head_dim 256",
        ),
    ):
        wide = dataclasses.replace(CASES[name], **change)
        q, key, value, lengths, _ = arguments(wide, (10,))
        with pytest.raises(NotImplementedError, match=f"twice the other's bits.*{got}"):
            decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    small = dataclasses.replace(CASES["kivi4-d64"], block=1 / 4)
    q, key, value, lengths, _ = arguments(small, (10,))
    with pytest.raises(NotImplementedError, match="multiple of 32 channels; got 64 and 16"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="values with scales of tokens, not of channels"):
        decode_attention(q, key, key, lengths, implementation="mosaic_gpu")
    floats = dataclasses.replace(CASES["float8"], key_channels=True)
    q, key, value, lengths, _ = arguments(floats, (10,))
    with pytest.raises(NotImplementedError, match="scales of tokens, where keys are 8-bit floats"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    narrow = dataclasses.replace(CASES["cubic4"], head_dim=48)
    q, key, value, lengths, _ = arguments(narrow, (10,))
    with pytest.raises(NotImplementedError, match="needs head_dim 64 to 256; got 48"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    signed = codebooks.cubic_normal(3, 32, signed=True)
    small = dataclasses.replace(CASES["cubic3-d256"], codebook=signed, block=1 / 8)
    q, key, value, lengths, _ = arguments(small, (10,))
    with pytest.raises(NotImplementedError, match=r"at most 4 blocks of a head.* 3 bits.* got 8"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    of_tokens = dataclasses.replace(CASES["plus3"], key_channels=False)
    q, key, value, lengths, _ = arguments(of_tokens, (10,))
    with pytest.raises(NotImplementedError, match="scales of channels, where keys have waves"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (10,), num_tiles=1)
    with pytest.raises(NotImplementedError, match="at least 256 encoded tokens; got 128"):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")


def test_parts_merge():
    """Sequences cut in two, by lengths and first, give what the whole gives."""
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (384, 300))
    run = jax.jit(functools.partial(decode_attention, implementation="xla"))
    whole, cut = run(q, key, value, lengths), jnp.array([130, 10])
    parts = [run(q, key, value, cut), run(q, key, value, lengths, first=cut)]
    top = np.maximum(parts[0][2], parts[1][2])
    numerator = sum(np.exp(m - top)[..., None] * n for n, _, m in parts)
    denominator = sum(np.exp(m - top) * d for _, d, m in parts)
    np.testing.assert_allclose(
        numerator / denominator[..., None], whole[0] / whole[1][..., None], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits, head_dim", [(2, 64), (3, 80), (3, 256), (4, 16), (8, 128)])
def test_tiles_hold_their_codes(bits, head_dim):
    pack = jax.jit(functools.partial(tiles.pack, bits=bits))
    unpack = jax.jit(functools.partial(tiles.unpack, bits=bits, head_dim=head_dim))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 2**bits, (128, 2, head_dim)).astype(np.uint8)
        words = pack(codes)
        chex.assert_shape(words, (2, tiles.num_rows(head_dim, bits), 128))
        chex.assert_type(words, jnp.int16)
        assert words.nbytes * 8 == bits * codes.size
        np.testing.assert_array_equal(unpack(words), codes)


def test_bad_input():
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (10, 20), num_tiles=1)
    with pytest.raises(ValueError, match=r"implementation must be one of .*; got 'cuda'"):
        decode_attention(q, key, value, lengths, implementation="cuda")
    with pytest.raises(ValueError, match=r"expected q \[2, 2, query heads per KV head, 128\]"):
        decode_attention(q[:1], key, value, lengths)
    with pytest.raises(ValueError, match=r"expected lengths i32\[2\]; got float32"):
        decode_attention(q, key, value, lengths.astype(jnp.float32))
    with pytest.raises(ValueError, match="soft_cap > 0"):
        decode_attention(q, key, value, lengths, soft_cap=-1.0)
    wrong = dataclasses.replace(key, codebook=codebooks.uniform(2))
    with pytest.raises(ValueError, match=r"key and value must agree .* of head_dim 256 and"):
        decode_attention(q, wrong, value, lengths)
    wrong = dataclasses.replace(key, words=key.words[..., :64])
    with pytest.raises(ValueError, match=r"expected key.words \[batch, tiles, heads, rows, 128\]"):
        decode_attention(q, wrong, value, lengths)
    wrong = dataclasses.replace(value, scale=value.scale.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"value.scale of int16 \(the bits of float16\)"):
        decode_attention(q, key, wrong, lengths)
    q, key, value, lengths, _ = arguments(CASES["plus4"], (10, 20), num_tiles=1)
    with pytest.raises(NotImplementedError, match="values with scales of tokens, not of channels"):
        channels = dataclasses.replace(key, waves=None)
        decode_attention(q, key, channels, lengths, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="values without waves or means that are apart; got"):
        decode_attention(q, key, dataclasses.replace(value, waves=key.waves), lengths)
    with pytest.raises(ValueError, match=r"expected q \[2, 2, query heads per KV head, 256\]"):
        decode_attention(q[..., :128], key, value, lengths)
    wrong = arguments(CASES["plus4"], (10, 20), num_tiles=2)[1].waves
    with pytest.raises(ValueError, match=r"key\.waves with angles \(1, 1, 64\) of tiles"):
        decode_attention(q, dataclasses.replace(key, waves=wrong), value, lengths)
    wrong = dataclasses.replace(key, scale=key.scale[:, :, :1])
    with pytest.raises(ValueError, match=r"key.scale of channels \[2, 1, 2 heads \* groups"):
        decode_attention(q, wrong, value, lengths)
    q, key, value, lengths, _ = arguments(CASES["kivi2"], (10,), num_tiles=1)
    for rows in (0, 3, 6):  # of channels, for two heads
        wrong = jnp.zeros((1, 1, rows, 128), jnp.int16)
        with pytest.raises(ValueError, match="2 heads \\* groups of 128 tokens, 128"):
            decode_attention(q, dataclasses.replace(key, scale=wrong), value, lengths)
    wrong = dataclasses.replace(key, zero=key.zero[:, :, :4])
    with pytest.raises(ValueError, match=r"key.zero like key.scale, \(1, 1, 8, 128\); got"):
        decode_attention(q, wrong, value, lengths)
    sixteen = {n: jnp.repeat(getattr(key, n), 2, axis=2) for n in ("scale", "zero")}
    for kernel in ("mosaic_tpu", "mosaic_gpu"):
        if kernel == "mosaic_gpu" and jax.__version_info__ < (0, 11):
            continue  # which it asks for first
        with pytest.raises(NotImplementedError, match="groups of at least 32 tokens; got 16"):
            short = dataclasses.replace(key, **sixteen)
            decode_attention(q, short, value, lengths, implementation=kernel)
    q, key, value, lengths, _ = arguments(CASES["cubic4-d80"], (10,), num_tiles=1)
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs head_dim to divide 128"):
        decode_attention(q, key, value, lengths, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=r"needs codes of single .*; got codes of eight"):
        vectors = arguments(CASES["vector2"], (10,), num_tiles=2)[:4]
        decode_attention(*vectors, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="expected bits to be one of"):
        tiles.pack(jnp.zeros((128, 1, 16), jnp.uint8), 5)
    with pytest.raises(ValueError, match="multiple of 16"):
        tiles.pack(jnp.zeros((128, 1, 24), jnp.uint8), 4)


def test_bad_vector_codes():
    q, key, value, lengths, _ = arguments(CASES["vector2"], (10,), num_tiles=2)
    for message, changes in (
        (r"expected key.words int16\[batch", dict(words=key.words.astype(jnp.int32))),
        ("key.bits must be 1 or 2; got 3", dict(bits=3)),
        (r"expected key.table \(256, 8\); got \(16, 8\)", dict(table=key.table[:16])),
        (r"expected key.scale \(1, 2, 2, 128\); got", dict(scale=key.scale[:, :1])),
        ("key needs both weight and mean", dict(weight=None)),
        ("3 windows, which do not divide", dict(mean=jnp.zeros((1, 2, 3, 2, 128)))),
        (r"expected q \[1, 2, query heads per KV head, 128\]", dict(apart=False)),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(q, dataclasses.replace(key, **changes), value, lengths)
    for other in (dataclasses.replace(value, apart=True), arguments(CASES["cubic4"], (10,))[2]):
        with pytest.raises(ValueError, match="key and value of one kind, and values without"):
            decode_attention(q, key, other, lengths)
    spoil = lambda a: a.at[:, 1:].set(jnp.asarray(np.float16(np.nan).view(np.int16)))
    spoilt = dataclasses.replace(
        value, scale=spoil(value.scale), mean=value.mean.at[:, 1:].set(np.nan)
    )
    run = jax.jit(functools.partial(decode_attention, implementation="xla"))
    jax.tree.map(
        np.testing.assert_array_equal, run(q, key, value, lengths), run(q, key, spoilt, lengths)
    )
