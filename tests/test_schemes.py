"""The registry, the string form, and the bits that schemes really store."""

from typing import Literal

import jax
import jax.numpy as jnp
import pytest

import nqkv_jax as nq


def stored_bits(spec: str, num_kv_heads: int, head_dim: int) -> float:
    sizes = dict(num_layers=1, batch=1, max_len=1024, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return nq.schemes.get(spec).abstract(**sizes).stored_bits


@pytest.mark.parametrize(
    "spec, heads, head_dim, bits",
    [
        ("nqkv", 32, 128, 4.0625),  # nqkv.md: hidden 4096, blocks of 256, 16-bit scales
        ("nqkv:bits=3", 32, 128, 3.0625),
        ("nqkv:bits=2,scale_dtype=float32", 32, 128, 2.125),
        ("nqkv:block_size=64", 32, 128, 4.25),
        ("nqkv", 32, 80, 4.0625),  # OPT-2.7b: blocks straddle heads
        ("nqkv", 3, 64, 4 + 16 / 192),  # SmolLM2: 256 does not divide 192
        ("none", 32, 128, 16),
        ("fp8", 32, 128, 8.125),
        ("int8:group_size=128", 32, 128, 8.25),
        ("int4", 32, 128, 4.5),
        ("int2", 32, 128, 2.5),
        ("kivi", 32, 128, 3.0),  # kivi.md: never "2 bits"
        ("kivi:bits=4", 8, 128, 5.0),
        ("kivi:bits=4,group_size=64", 8, 128, 4.5),
    ],
)
def test_stored_bits(spec, heads, head_dim, bits):
    assert stored_bits(spec, heads, head_dim) == bits


def test_opt_table_of_bytes_per_token():
    """opt.md: bytes per token of a 16-bit and of an NF4-256 cache, for every OPT size."""
    table = {
        (12, 12, 64): (36864, 9360),
        (24, 32, 64): (196608, 49920),
        (32, 32, 80): (327680, 83200),
        (32, 32, 128): (524288, 133120),
        (64, 72, 128): (2359296, 599040),
    }
    for (layers, heads, head_dim), expected in table.items():
        sizes = dict(num_layers=layers, batch=1, num_kv_heads=heads, head_dim=head_dim)
        for spec, per_token in zip(("none", "nqkv"), expected, strict=True):
            count = lambda n, spec=spec, sizes=sizes: (
                nq.schemes.get(spec).abstract(max_len=n, **sizes).nbytes
            )
            assert count(2048) - count(1920) == 128 * per_token


def test_string_form_round_trips():
    scheme = nq.schemes.get("nqkv: bits=3 , block_size=64", scale_dtype="bfloat16")
    assert str(scheme) == "nqkv:bits=3,block_size=64,scale_dtype=bfloat16"
    assert nq.schemes.get(str(scheme)) == scheme and hash(nq.schemes.get(str(scheme))) == hash(
        scheme
    )
    assert nq.schemes.get(scheme) is scheme
    assert str(nq.schemes.get("none")) == "none"
    # Defaults and order make no difference; equal schemes are one object and compile once.
    assert nq.schemes.get("nqkv:bits=4") is nq.schemes.get("nqkv")
    assert nq.schemes.get("nqkv:sinks=1,bits=3") is nq.schemes.get("nqkv:bits=3,sinks=1")


def test_schemes_with_other_layers_are_not_equal():
    """They are static arguments of `jit`: equal ones share a program."""
    make = lambda bits: nq.schemes.get("nqkv", bits=bits).layer
    assert nq.schemes.Scheme("mine", (), make(2), "") != nq.schemes.Scheme("mine", (), make(4), "")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nqvk", "unknown scheme 'nqvk'; there are: .*kivi.*none.*nqkv"),
        ("", "unknown scheme ''"),
        ("nqkv:bit=3", "no option 'bit'; it has: bits=4, block_size=None"),
        ("none:bits=3", "no option 'bits'; it has: none"),
        ("nqkv:bits", "expected option=value; got 'bits'"),
        ("nqkv:bits=4,bits=3", "option bits is given twice"),
        (5, "expected a name such as .*; got 5"),
        ("nqkv:residual=-1", "option residual must not be negative; got -1"),
        ("nqkv:sinks=-1", "option sinks must not be negative; got -1"),
        ("kvquant:outliers=-0.5", "option outliers must not be negative; got -0.5"),
        ("int4:residual=1", "int4: residual is how many tokens .* at least 2; got 1"),
        ("kivi:group_size=1,residual=1", "kivi: expected group_size >= 2"),
        ("nqkv:bits=four", "option bits takes a value like 4; got 'four'"),
        ("nqkv:bits=True", "option bits takes a value like 4; got True"),
        ("nqkv:bits=5", "nqkv: bits: expected one of 2, 3, 4; got 5"),
        ("nqkv:block_size=4.5", "block_size takes a whole number; got 4.5"),
        ("nqkv:codebook=nf", "expected one of normal_float, lloyd_max.*got 'nf'"),
        ("nqkv:scale_dtype=int8", "expected one of float16, bfloat16, float32; got 'int8'"),
        ("nqkv:centre=True", "needs residual >= 16"),
        ("kivi:residual=100", "positive multiple of it.*residual=100, group_size=32"),
        ("kivi:keys=before", "expected one of rotated, unrotated; got 'before'"),
        ("fp8:format=e3m4", "expected one of e4m3, e5m2"),
    ],
)
def test_bad_specs_say_what_exists(spec, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get(spec)


@pytest.mark.parametrize("path", ["a,b.json", "2024", " a.json"])
def test_a_path_that_no_name_can_hold_is_refused(path):
    """A saved cache is loaded by the scheme's name."""
    with pytest.raises(ValueError, match=r"allocation=.* cannot be written in a scheme's name"):
        nq.schemes.get("kvq", allocation=path)


def test_paths_are_options(tmp_path):
    scheme = nq.schemes.get("kvquant", calibration=tmp_path / "some.safetensors")
    assert str(scheme) == f"kvquant:calibration={tmp_path}/some.safetensors"
    assert nq.schemes.get(str(scheme)) == scheme


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nqkv:block_size=100", r"block_size must divide .* = 192: one of .*64, 96, 192"),
        ("kivi:group_size=48,residual=48", "group_size to divide head_dim=64, .*; got 48"),
        ("nqkv:block_size=0", r"block_size must divide .* = 192: .*; got 0. Take block_size=8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_allocated(spec, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get(spec).init(num_layers=1, batch=1, max_len=64, num_kv_heads=3, head_dim=64)


def test_choices_are_what_is_accepted():
    assert nq.schemes.choices("turboquant")["variant"] == ("mse", "prod")
    assert nq.schemes.choices("nqkv")["bits"] == (2, 3, 4) and nq.schemes.choices("none") == {}
    for name in nq.schemes.names():
        for option, valid in nq.schemes.choices(name).items():
            assert nq.schemes.defaults(name)[option] in valid
            for value in valid:
                nq.schemes.get(name, **{option: value})
            wrong = max(valid) + 17 if isinstance(valid[0], int) else "nonsense"
            with pytest.raises(ValueError, match=f"{name}: {option}: expected one of {valid[0]}"):
                nq.schemes.get(name, **{option: wrong})
    with pytest.raises(ValueError, match="unknown scheme 'nqvk'"):
        nq.schemes.choices("nqvk")


def test_text_options_say_what_they_take():
    """But for paths, whose default is empty."""
    for name in nq.schemes.names():
        defaults = nq.schemes.defaults(name).items()
        texts = {key for key, default in defaults if default and isinstance(default, str)}
        assert texts <= set(nq.schemes.choices(name))


@pytest.mark.usefixtures("own_registry")
def test_literals_are_checked_in_a_direct_call():
    @nq.schemes.register("mine")
    def mine(*, side: "Literal['left', 'right']" = "left", bits: int = 4):
        return lambda shape: (side, bits)

    assert mine(side="right")(None) == ("right", 4)
    assert nq.schemes.choices("mine") == {"side": ("left", "right")}
    with pytest.raises(ValueError, match="mine: side: expected one of left, right; got 'top'"):
        mine(side="top")


def test_residual_must_hold_whole_groups():
    group = nq.BlockQuantizer(nq.codebooks.uniform(4), block_size=32, axis="tokens", scale="minmax")
    layer = nq.schemes.LayerScheme(key=group, value=group, key_window=nq.Window(chunk=48))
    with pytest.raises(ValueError, match=r"keys are encoded 32 tokens at a time.*multiple of 32"):
        layer.check(nq.schemes.LayerShape(num_kv_heads=2, head_dim=32))


@pytest.mark.usefixtures("own_registry")
def test_a_new_scheme_needs_nothing_but_a_function():
    @nq.schemes.register("keys-only")
    def keys_only(*, bits: int = 4):
        """4-bit keys, full-precision values."""
        key = nq.BlockQuantizer(nq.codebooks.lloyd_max_normal(bits), block_size=32, scale="rms")
        return lambda shape: nq.schemes.LayerScheme(key=key, value=nq.FullPrecision())

    assert stored_bits("keys-only", 2, 32) == (4.5 + 16) / 2
    cache = nq.schemes.get("keys-only:bits=2").init(
        num_layers=1, batch=1, max_len=9, num_kv_heads=2, head_dim=32
    )
    q = jnp.ones((1, 4, 2, 32), jnp.bfloat16)
    out, cache = jax.jit(nq.attend)(q, q, q, cache)
    assert out.shape == q.shape and int(cache.lengths[0]) == 4
    with pytest.raises(ValueError, match="already a scheme named 'keys-only'"):
        nq.schemes.register("keys-only")(lambda: None)
