"""What a scheme is, and the registry.

A scheme is a function of its options that returns a function from `LayerShape` to `LayerScheme`;
the registry gives it a string form, `"nqkv:bits=3,block_size=64"`. A new file in this folder with a
`@register`ed function is a new scheme, everywhere.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import numbers
import os
import pkgutil
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nqkv_jax.cache import KVCache, LayerCache
from nqkv_jax.checks import one_of
from nqkv_jax.quantizers.base import Quantizer
from nqkv_jax.quantizers.tiled import in_tiles
from nqkv_jax.side import Window, body_capacity, init_side
from nqkv_jax.tiles import TOKENS

DTYPES = {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "float32": jnp.float32}

# What options of several schemes may be.
ScaleDtype = Literal[*DTYPES]
Keys = Literal["rotated", "unrotated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Where a layer stands, and what a token is there: num_kv_heads x head_dim a side."""

    num_kv_heads: int
    head_dim: int
    layer: int = 0
    num_layers: int = 1

    @property
    def hidden(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How one layer is cached.

    Attributes:
      key, value: the quantizers of the body.
      sinks: first tokens that stay in full precision, on both sides.
      key_window, value_window: which of the latest tokens do.
      rotated: whether keys are stored after RoPE. If not, `key.dequantize` must rotate
      (`Unrotated`).
    """

    key: Quantizer
    value: Quantizer
    sinks: int = 0
    key_window: Window = Window()
    value_window: Window = Window()
    rotated: bool = True

    def check(self, shape: LayerShape) -> None:
        """Raises ValueError if the layer's shape or the windows do not fit the quantizers."""
        if self.sinks < 0:
            raise ValueError(f"scheme: expected sinks >= 0; got sinks={self.sinks}")
        for side, quantizer, window in (
            ("key", self.key, self.key_window),
            ("value", self.value, self.value_window),
        ):
            quantizer.check(shape.num_kv_heads, shape.head_dim)
            if window.chunk % quantizer.group:
                raise ValueError(
                    f"scheme: {side}s are encoded {quantizer.group} tokens at a time, so their "
                    f"residual must be a multiple of {quantizer.group}; got {window}"
                )
        if self.value.wants_keys and self.key_window != self.value_window:
            raise ValueError(
                "scheme: values are encoded by what their keys are, so both sides must have one "
                f"window; got {self.key_window} and {self.value_window}"
            )

    def _in_tiles(self, shape: LayerShape, capacity: list[int]) -> list[Quantizer]:
        """The quantizers, in tiles if they can be, of bodies of so many tokens."""
        quantizers, windows = (self.key, self.value), (self.key_window, self.value_window)
        sizes = shape.num_kv_heads, shape.head_dim
        tiled = [in_tiles(q, w.chunk, *sizes) for q, w in zip(quantizers, windows, strict=True)]
        filled = [w.chunk % t.group for t, w in zip(tiled, windows, strict=True)]  # token by token
        # Whole tiles may have room for a sixteenth more than the body needs: that is worth a
        # kernel, which reads two sides.
        room = [16 * (-n % t.group) <= n for t, n in zip(tiled, capacity, strict=True)]
        if (any(filled) and not all(t.group == TOKENS for t in tiled)) or not all(room):
            return [q if f else t for q, t, f in zip(quantizers, tiled, filled, strict=True)]
        return tiled

    def _period(
        self, key: Quantizer, value: Quantizer, window: int | None, most: int
    ) -> int | None:
        """Of bodies (see `Side`) of `most` tokens, in a layer with a sliding window."""
        # Values that look at keys do so by their positions.
        if window is None or self.value.wants_keys:
            return None
        chunks = self.key_window.chunk, self.value_window.chunk
        unit = math.lcm(TOKENS, key.group, value.group, *chunks)
        # What a side writes over is older than the window, even if the other is behind: no side is
        # ahead of the latest token.
        period = max(-(-window // unit), 2) * unit  # one tile alone no kernel for GPUs would read
        return period if period < most else None

    def init(
        self, shape: LayerShape, *, batch: int, max_len: int, dtype, window: int | None = None,
        keep_all: bool = False,
    ) -> LayerCache:  # fmt: skip
        """An empty cache of this layer.

        Args:
          window: the layer's sliding window; None if it attends to all tokens.
          keep_all: have room for all tokens even so, encoded as they would be without.
        """
        if getattr(dtype, "__name__", str(dtype)) not in DTYPES:
            raise ValueError(f"cache: expected dtype to be one of {', '.join(DTYPES)}; got {dtype}")
        self.check(shape)
        own = [body_capacity(w, self.sinks, max_len) for w in (self.key_window, self.value_window)]
        heads, head_dim = shape.num_kv_heads, shape.head_dim
        key, value = self._in_tiles(shape, own)
        # Attention walks both bodies in steps of whole groups, as far as both can be encoded.
        group = math.lcm(key.group, value.group)
        common = -(-min(own) // group) * group
        period = self._period(key, value, window, common)
        ring = period is not None and not keep_all
        if ring:
            own, common = (period, period), period
        sizes = dict(
            max_len=max_len, batch=batch, num_kv_heads=heads, head_dim=head_dim, dtype=dtype
        )
        side = lambda quantizer, window, capacity, **how: init_side(
            quantizer,
            window,
            num_sinks=self.sinks,
            capacity=max(capacity, common),
            period=period,
            **sizes,
            **how,
        )
        return LayerCache(
            key=side(key, self.key_window, own[0], rotates=period is not None and self.rotated),
            value=side(value, self.value_window, own[1]),
            lengths=jnp.zeros(batch, jnp.int32), overflow=jnp.zeros(batch, jnp.int32),
            max_len=max_len, num_kv_heads=heads, head_dim=head_dim, dtype=jnp.dtype(dtype),
            rotated=self.rotated and period is None, window=window if ring else None,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedLayers:
    """What a registered function returns if its layers were calibrated on one model.

    Attributes:
      layer: LayerShape -> LayerScheme.
      check: raises ValueError for a model, as `Scheme.check_model` takes it, that is another.
    """

    layer: Callable[[LayerShape], LayerScheme]
    check: Callable[[Any], None]

    def __call__(self, shape: LayerShape) -> LayerScheme:
        return self.layer(shape)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A named way to cache every layer of a model. `str(scheme)` is its string form.

    Attributes:
      name: as registered.
      options: those that differ from the defaults, in the order of the signature.
      layer: what the registered function returned. `get` calls it once per name and options, so
        that equal schemes are equal as static arguments of `jit`, and others are not.
      summary: the first line of the function's docstring.
    """

    name: str
    options: tuple[tuple[str, object], ...]
    layer: Callable[[LayerShape], LayerScheme] = dataclasses.field(repr=False)
    summary: str = dataclasses.field(compare=False, repr=False)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}:{options}" if options else self.name

    def check_model(self, lm: Any) -> None:
        """Raises ValueError if the scheme was calibrated on another model than `lm`.

        `lm` has the protocol of `nqkv_jax.evaluation`. Shapes are checked when a layer is made.
        """
        if isinstance(self.layer, CalibratedLayers):
            self.layer.check(lm)

    def init(
        self,
        *,
        num_layers: int,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        windows: Sequence[int | None] | None = None,
        dtype=jnp.bfloat16,
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens.

        Args:
          windows: the sliding window of every layer, None for one that attends to all tokens. Those
            that have one keep no more than they see (in steps of 128 tokens, and at least 256)
            where the scheme allows it, and need it in `attend`, too. None: all layers keep all
            tokens.
          dtype: of sinks, residual and full-precision bodies; keys and values are rounded to it on
            entry.

        Raises:
          ValueError: the model's shape does not fit the scheme, or a size is not positive.
        """
        sizes = dict(num_layers=num_layers, batch=batch, max_len=max_len,
                     num_kv_heads=num_kv_heads, head_dim=head_dim)  # fmt: skip
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
                raise ValueError(f"{self}: expected {name} >= 1, a whole number; got {size!r}")
        # What is static is written to files, too: NumPy's are Python's from here on.
        num_layers, batch, max_len, num_kv_heads, head_dim = map(int, sizes.values())
        windows = self._windows(windows, num_layers)
        shapes = (
            LayerShape(num_kv_heads=num_kv_heads, head_dim=head_dim, layer=i, num_layers=num_layers)
            for i in range(num_layers)
        )
        layers = tuple(
            self.layer(s).init(s, batch=batch, max_len=max_len, dtype=dtype, window=window)
            for s, window in zip(shapes, windows, strict=True)
        )
        return KVCache(layers=layers, scheme=str(self))

    def _windows(
        self, windows: Sequence[int | None] | None, num_layers: int
    ) -> Sequence[int | None]:
        windows = (None,) * num_layers if windows is None else tuple(windows)
        whole = lambda w: isinstance(w, numbers.Integral) and not isinstance(w, bool) and w >= 1
        if len(windows) != num_layers or not all(w is None or whole(w) for w in windows):
            raise ValueError(
                f"{self}: expected windows to be a whole number >= 1, or None, for each of "
                f"{num_layers} layers; got {windows}"
            )
        return tuple(w if w is None else int(w) for w in windows)

    def abstract(self, **sizes) -> KVCache:
        """What `init` would allocate, as shapes: count its `nbytes` without spending them."""
        return jax.eval_shape(lambda: self.init(**sizes))


_REGISTRY: dict[str, Callable] = {}


def register(name: str) -> Callable[[Callable], Callable]:
    """Names a scheme: a function of keyword options that returns LayerShape -> LayerScheme.

    An option that is annotated with `Literal[...]` takes only these values: any other is a
    ValueError, and `choices` tells them.
    """

    def decorate(function: Callable) -> Callable:
        if name in _REGISTRY and _REGISTRY[name].__wrapped__ is not function:
            raise ValueError(
                f"schemes.register: there is already a scheme named {name!r}; choose another name"
            )

        @functools.wraps(function)
        def checked(**options):
            for key, valid in _literals(function).items():
                if key in options:
                    one_of(f"{name}: {key}", options[key], valid)
            return function(**options)

        _REGISTRY[name] = checked
        return checked

    return decorate


def _literals(function: Callable) -> dict[str, tuple]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {
        p.name: typing.get_args(p.annotation)
        for p in parameters
        if typing.get_origin(p.annotation) is Literal
    }


def _load_all() -> None:
    package = importlib.import_module("nqkv_jax.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"nqkv_jax.schemes.{module.name}")


def names() -> list[str]:
    """All registered schemes, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def defaults(name: str) -> dict[str, object]:
    """The options of a scheme with their defaults."""
    function = _registered(name)
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def choices(name: str) -> dict[str, tuple]:
    """The values of those options of a scheme that take one of a few."""
    return _literals(_registered(name))


def _registered(name: str) -> Callable:
    _load_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown scheme {name!r}; there are: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def _parse(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def get(spec: "str | Scheme", **options) -> Scheme:
    """The scheme of a string such as `"nqkv"` or `"nqkv:bits=3,block_size=64"`.

    Args:
      options: override those of the string.

    Raises:
      ValueError: no such scheme or option (the message lists what exists), or a bad value.
    """
    if isinstance(spec, Scheme):
        if options:
            raise ValueError(
                f"schemes.get: options go with a name; got the scheme {spec} and {options}"
            )
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"schemes.get: expected a name such as 'nqkv:bits=3'; got {spec!r}")
    name, _, rest = spec.partition(":")
    name = name.strip()
    known = defaults(name)
    given = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"scheme {spec!r}: expected option=value; got {item!r}. "
                f"Example: {name}:{next(iter(known), 'option')}=..."
            )
        if key.strip() in given:
            raise ValueError(f"scheme {spec!r}: option {key.strip()} is given twice")
        given[key.strip()] = _parse(value.strip())
    given |= options
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"scheme {name!r} has no option {key!r}; it has: "
                f"{', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}"
            )
        given[key] = value = os.fspath(value) if isinstance(value, os.PathLike) else value
        _check_value(name, key, value, known[key])
    changed = tuple((k, given[k]) for k in known if k in given and given[k] != known[k])
    return _build(name, _REGISTRY[name], changed, tuple(_version(value) for _, value in changed))


def _version(value: object) -> tuple[int, ...] | None:
    """Of the file that an option names, if it names one: another when that was written again."""
    try:
        found = os.stat(os.path.expanduser(value)) if isinstance(value, str) else None
    except (OSError, ValueError):
        return None
    return found and (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=256)
def _build(
    name: str, function: Callable, options: tuple[tuple[str, object], ...], versions: tuple
) -> Scheme:
    summary = (inspect.getdoc(function) or "").split("\n")[0]
    return Scheme(name, options, function(**dict(options)), summary)


def _check_value(name: str, key: str, value: object, default: object) -> None:
    expected = (
        (int, type(None))
        if default is None
        else (float, int)
        if isinstance(default, float)
        else type(default)
    )
    if not isinstance(value, expected) or (
        isinstance(value, bool) and not isinstance(default, bool)
    ):
        kind = "a whole number" if default is None else f"a value like {default!r}"
        raise ValueError(f"scheme {name!r}: option {key} takes {kind}; got {value!r}")
    if isinstance(value, int | float) and value < 0:
        raise ValueError(f"scheme {name!r}: option {key} must not be negative; got {value!r}")
    if isinstance(value, str):
        check_text(name, key, value)


def check_text(name: str, key: str, value: str) -> None:
    """Raises ValueError unless the string form of a scheme can hold a text, such as a path.

    A cache that is saved names its scheme by that.
    """
    if "," in value or _parse(value.strip()) != value:
        raise ValueError(
            f"scheme {name!r}: option {key}={value!r} cannot be written in a scheme's name, which "
            "has commas between options. Take a path with a letter in front, and without commas"
        )


def block_window(name: str, residual: int) -> Window:
    """The window of `residual` tokens that are encoded together; 0 for none."""
    if residual == 1:
        raise ValueError(
            f"{name}: residual is how many tokens wait in full precision to be encoded together: 0 "
            f"for none, or at least 2; got {residual}"
        )
    return Window(chunk=residual or 1)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
