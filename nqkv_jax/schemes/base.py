"""What a scheme is.

A scheme is a function of its options that returns a function from `LayerShape` to `LayerScheme`;
the registry gives it a string form, `"nqkv:bits=3,block_size=64"`. A new file in this folder with a
`@register`ed function is a new scheme, everywhere.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nqkv_jax.cache import KVCache, LayerCache
from nqkv_jax.checks import is_whole
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

    Keys are cached after RoPE, unless their quantizer rotates what it decodes (`Unrotated`).
    """

    key: Quantizer
    value: Quantizer
    sinks: int = 0
    key_window: Window = Window()
    value_window: Window = Window()

    @property
    def rotated(self) -> bool:
        """Whether keys are cached after RoPE."""
        return not self.key.rotates

    def check(self, shape: LayerShape) -> None:
        """Raises ValueError if the layer's shape or the windows do not fit the quantizers."""
        if self.sinks < 0:
            raise ValueError(f"scheme: expected sinks >= 0; got sinks={self.sinks}")
        for side, quantizer, window in (
            ("key", self.key, self.key_window),
            ("value", self.value, self.value_window),
        ):
            _check_quantizer(side, quantizer)
            if not isinstance(window, Window):
                raise ValueError(f"scheme: expected {side}_window to be a Window; got {window!r}")
            quantizer.check(shape.num_kv_heads, shape.head_dim)
            if window.chunk % quantizer.group:
                raise ValueError(
                    f"scheme: {side}s are encoded {quantizer.group} tokens at a time, so their "
                    f"residual must be a multiple of {quantizer.group}; got {window}"
                )
        if self.value.rotates:
            raise ValueError(
                "scheme: values are not rotated; got a quantizer for them that rotates what it "
                f"decodes: {self.value}"
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


def _check_quantizer(side: str, quantizer: Any) -> None:
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"scheme: expected {side}s to have a quantizer, an instance of a subclass of "
            f"nqkv_jax.Quantizer; got {quantizer!r}"
        )
    for leaf in jax.tree.leaves(quantizer):
        if isinstance(leaf, Quantizer):
            raise ValueError(
                f"scheme: expected {type(leaf).__name__} to be a pytree, so that a cache can carry "
                "it: put @jax.tree_util.register_dataclass above its "
                "@dataclasses.dataclass(frozen=True)"
            )
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"scheme: expected the leaves of {type(quantizer).__name__} to be arrays; got "
                f"{leaf!r}. Other fields need dataclasses.field(metadata={{'static': True}})"
            )


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

    def __reduce__(self):
        """Pickled and copied by its string form: what is registered need not be."""
        from nqkv_jax.schemes.registry import get

        return get, (str(self),)

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
            that have one keep no more than they see, where the scheme allows it and `max_len` is
            more than that, and need it in `attend`, too: in steps of 128 tokens, or of the least
            common multiple with the scheme's residual and groups, and at least two of them. None:
            all layers keep all tokens.
          dtype: of sinks, residual and full-precision bodies; keys and values are rounded to it on
            entry.

        Raises:
          ValueError: the model's shape does not fit the scheme, or a size is not positive.
        """
        sizes = dict(num_layers=num_layers, batch=batch, max_len=max_len,
                     num_kv_heads=num_kv_heads, head_dim=head_dim)  # fmt: skip
        for name, size in sizes.items():
            if not is_whole(size) or size < 1:
                raise ValueError(f"{self}: expected {name} >= 1, a whole number; got {size!r}")
        # What is static is written to files, too: NumPy's are Python's from here on.
        num_layers, batch, max_len, num_kv_heads, head_dim = map(int, sizes.values())
        windows = self._windows(windows, num_layers)
        shapes = (
            LayerShape(num_kv_heads=num_kv_heads, head_dim=head_dim, layer=i, num_layers=num_layers)
            for i in range(num_layers)
        )
        layers = tuple(
            self._layer_scheme(s).init(s, batch=batch, max_len=max_len, dtype=dtype, window=window)
            for s, window in zip(shapes, windows, strict=True)
        )
        return KVCache(layers=layers, scheme=str(self))

    def _layer_scheme(self, shape: LayerShape) -> LayerScheme:
        layer = self.layer(shape)
        if not isinstance(layer, LayerScheme):
            raise ValueError(
                f"{self}: expected a LayerScheme for layer {shape.layer}; its function returned "
                f"{layer!r}"
            )
        return layer

    def _windows(
        self, windows: Sequence[int | None] | None, num_layers: int
    ) -> Sequence[int | None]:
        if windows is None:
            windows = (None,) * num_layers
        given, windows = windows, tuple(windows) if isinstance(windows, Iterable) else ()
        good = lambda w: w is None or (is_whole(w) and w >= 1)
        if len(windows) != num_layers or not all(map(good, windows)):
            raise ValueError(
                f"{self}: expected windows to be a whole number >= 1, or None, for each of "
                f"{num_layers} layers; got {given!r}"
            )
        return tuple(w if w is None else int(w) for w in windows)

    def abstract(self, **sizes) -> KVCache:
        """What `init` would allocate, as shapes: count its `nbytes` without spending them."""
        return jax.eval_shape(lambda: self.init(**sizes))


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
