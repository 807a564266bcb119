"""Schemes of one's own: what can be registered, their options, and what a quantizer must be."""

import copy
import dataclasses
import functools
import pathlib
import pickle
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nqkv_jax as nq
from nqkv_jax.quantizers import Context, OutlierTokens, Quantizer, QueryAware, ResidualSketch
from nqkv_jax.schemes import LayerScheme, register

pytestmark = pytest.mark.usefixtures("own_registry")
SIZES = dict(num_layers=1, batch=1, max_len=64, num_kv_heads=2, head_dim=32)
FULL = nq.FullPrecision()
TURNED = nq.Unrotated(FULL)


def plain(**options):
    return lambda shape: LayerScheme(key=FULL, value=FULL)


# --- registering


@pytest.mark.parametrize("name", ["", "a:b", "a,b", "a=b", "a b", "-a", None, 5, plain])
def test_names_that_a_string_form_cannot_begin_with(name):
    with pytest.raises(ValueError, match="expected a name of letters, digits"):
        register(name)


def test_a_cell_can_be_run_twice():
    cell = """
@register("mine")
def mine(*, sinks: int = {sinks}):
    return lambda shape: LayerScheme(key=FULL, value=FULL, sinks=sinks)
"""
    for sinks in (2, 3):
        exec(cell.format(sinks=sinks), dict(globals()))
        assert nq.schemes.get("mine").init(**SIZES).layers[0].key.num_sinks == sinks
    with pytest.raises(ValueError, match="already a scheme named 'mine'"):
        register("mine")(plain_without_options)
    with pytest.raises(ValueError, match="already a scheme named 'nqkv'"):
        register("nqkv")(plain_without_options)


def plain_without_options():
    return plain()


@pytest.mark.parametrize(
    "function", [lambda bits: 0, lambda *bits: 0, lambda **bits: 0, lambda bits=4, /: 0]
)
def test_options_have_names_and_defaults(function):
    with pytest.raises(
        ValueError, match="expected every option of 'mine' to have a name and a def"
    ):
        register("mine")(function)


# --- options


def typed(
    *,
    file: str | None = None,
    fraction: float = 1,
    bits: int | None = 4,
    side: Literal["left", None] = None,
    fast: bool = False,
    either: "int | str" = 3,
    path: pathlib.Path = "",
    below: float = -1.0,
    pair: tuple[int, int] = (1, 2),
    anything: Any = None,
    untyped=None,
):
    """Every kind of annotation."""
    return plain()


@pytest.fixture(autouse=True)
def _typed(own_registry):
    register("typed")(typed)


@pytest.mark.parametrize(
    "spec",
    [
        "typed:file=a/b.json", "typed:fraction=0.5", "typed:fraction=2", "typed:bits=None",
        "typed:side=left", "typed:fast=True", "typed:either=x", "typed:either=7",
        "typed:below=-2.5", "typed:path=a/b", "typed:anything=x", "typed:anything=1.5",
        "typed:untyped=3",
    ],
)  # fmt: skip
def test_annotations_say_what_an_option_takes(spec):
    scheme = nq.schemes.get(spec)
    assert str(scheme) == spec and nq.schemes.get(str(scheme)) is scheme
    assert scheme.init(**SIZES).scheme == spec


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(file=3), "option file takes a text; got 3"),
        (dict(fraction="x"), "option fraction takes a value like 1; got 'x'"),
        (dict(fraction=True), "option fraction takes a value like 1; got True"),
        (dict(fraction=float("nan")), "fraction=nan cannot be written in a scheme's name"),
        (dict(bits=4.5), "option bits takes a value like 4; got 4.5"),
        (dict(bits=-1), "option bits must not be negative; got -1"),
        (dict(side="top"), "typed: side: expected one of left, None; got 'top'"),
        (dict(fast=1), "option fast takes a value like False; got 1"),
        (dict(either=1.5), "option either takes a value like 3; got 1.5"),
        (dict(pair=(3, 4)), r"option pair=\(3, 4\) cannot be written in a scheme's name"),
        (dict(pair="x"), r"option pair takes a value like \(1, 2\); got 'x'"),
        (dict(anything=[1, 2]), r"anything=\[1, 2\] cannot be written in a scheme's name"),
        (dict(untyped="x"), "option untyped takes a whole number; got 'x'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nq.schemes.get("typed", **options)


def test_literals_in_other_annotations_and_truth_values_beside_numbers():
    seen = []

    @register("mine")
    def mine(*, side: Literal["k", "v"] | None = None, size: Annotated[int, "tokens"] = 3,
             flag: bool | int = 0):  # fmt: skip
        seen.append((side, size, flag))
        return nq.schemes.get("none").layer

    assert nq.schemes.choices("mine") == {"side": ("k", "v", None)}
    with pytest.raises(ValueError, match="mine: side: expected one of k, v, None; got 'z'"):
        nq.schemes.get("mine:side=z")
    with pytest.raises(ValueError, match=r"option size takes a value like 3; got 'x'"):
        nq.schemes.get("mine:size=x")
    for spec in ("mine:side=k,size=4", "mine:flag=1", "mine:flag=True", "mine:flag=False", "mine"):
        assert str(nq.schemes.get(spec)) == spec
    assert seen == [("k", 4, 0), (None, 3, 1), (None, 3, True), (None, 3, False), (None, 3, 0)]
    assert [type(flag) for *_, flag in seen[1:]] == [int, bool, bool, int]


def test_numbers_of_numpy_are_options():
    scheme = nq.schemes.get("nqkv", bits=np.int64(3), sinks=np.int32(2))
    assert scheme is nq.schemes.get("nqkv:bits=3,sinks=2") and str(scheme) == "nqkv:bits=3,sinks=2"


@pytest.mark.parametrize(
    "again", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy]
)
def test_schemes_are_copied_by_name(again):
    scheme = nq.schemes.get("nqkv:bits=3")
    assert again(scheme) is scheme


# --- layers and quantizers


def init(key=FULL, value=FULL, **options):
    register("own")(lambda: lambda shape: LayerScheme(key=key, value=value, **options))
    return nq.schemes.get("own").init(**SIZES)


@dataclasses.dataclass(frozen=True)
class NoPytree(Quantizer):
    bits: int = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf(Quantizer):
    bits: int = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Double(Quantizer):
    """Stores twice the tokens, and gives back what `change` makes of them."""

    change: object = dataclasses.field(metadata={"static": True})
    store: object = dataclasses.field(default=lambda x: x, metadata={"static": True})

    def quantize(self, x, context: Context):
        return self.store(x)

    def dequantize(self, payload, context, dtype=jnp.float32):
        return self.change(payload)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(key=nq.BlockQuantizer),
            "expected keys to have a quantizer, an instance .*BlockQuant",
        ),
        (dict(value=None), "expected values to have a quantizer.*got None"),
        (dict(key=NoPytree()), "expected NoPytree to be a pytree.*register_dataclass"),
        (dict(key=nq.Unrotated(NoPytree())), "expected NoPytree to be a pytree"),
        (dict(key=Leaf()), "expected the leaves of Leaf to be arrays; got 4. .*'static': True"),
        (dict(key_window=3), "expected key_window to be a Window; got 3"),
        (dict(key=Double(lambda x: x, lambda x: ())), r"Double: expected quantize .* got \(\)"),
        (dict(key=Double(lambda x: x[0])), r"dequantize .* of shape \(1, 2, 32\).*\(2, 32\)"),
        (dict(value=Double(lambda x: None)), "Double: expected dequantize .* got None"),
        (dict(value=nq.Unrotated(FULL)), "values are not rotated; got .*Unrotated"),
        (dict(key=nq.Unrotated(nq.Unrotated(FULL))), "Unrotated: .*would be rotated twice"),
        (dict(key=nq.Transformed(TURNED, (nq.Hadamard(),))), "Transformed: .*around the whole"),
        (dict(key=ResidualSketch(TURNED)), "ResidualSketch: expected a quantizer that does not ro"),
        (dict(key=OutlierTokens(inner=TURNED, outliers=1, buffer=1)), "OutlierTokens: .*rotate"),
        (dict(key=QueryAware(inner=TURNED, block=8, strength=1.0)), "QueryAware: .*rotate keys"),
    ],
)
def test_quantizers_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        init(**options)


@pytest.mark.parametrize("layer", [None, FULL, (FULL, FULL)])
def test_layers_that_are_none(layer):
    register("own")(lambda: lambda shape: layer)
    with pytest.raises(ValueError, match="own: expected a LayerScheme for layer 0; its function"):
        nq.schemes.get("own").init(**SIZES)


def test_a_function_that_returns_no_function():
    register("own")(lambda: LayerScheme(key=FULL, value=FULL))
    with pytest.raises(
        ValueError, match="expected the function that was registered to return a fu"
    ):
        nq.schemes.get("own")


def test_keys_are_rotated_once_whoever_does_it():
    """What is cached depends on the quantizer alone, so that no scheme can say it wrongly."""
    rotary = nq.Rotary(inverse_frequencies=jnp.float32(0.3) ** jnp.arange(16.0))
    q, k, v = (
        jax.random.normal(key, (1, 9, 2, 32)) for key in jax.random.split(jax.random.key(0), 3)
    )
    attend = jax.jit(functools.partial(nq.attend, rotary=rotary))
    outs, hadamard = [], nq.Transformed(FULL, (nq.Hadamard(),))
    keys = ((FULL, True), (TURNED, False), (hadamard, True), (nq.Unrotated(hadamard), False))
    for key, rotated in keys:
        layer = LayerScheme(key=key, value=FULL)
        assert layer.rotated == rotated
        shape = nq.schemes.LayerShape(num_kv_heads=2, head_dim=32)
        cache = layer.init(shape, batch=1, max_len=16, dtype=jnp.float32)
        cache = nq.KVCache(layers=(cache,), scheme="own")
        _, cache = attend(q[:, :8], k[:, :8], v[:, :8], cache)
        outs.append(attend(q[:, 8:], k[:, 8:], v[:, 8:], cache)[0])
    expected, _ = attend(q, k, v)
    for out in outs:
        np.testing.assert_allclose(out, expected[:, 8:], atol=1e-5)
