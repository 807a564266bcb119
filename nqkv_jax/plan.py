"""How large a batch and how long a context fit into a memory, for every scheme.

Nothing here is a formula for a scheme's size: the cache is allocated in the abstract, as
`Scheme.init` would allocate it, and its bytes are counted.

    plan(config, ["none", "nqkv"], memory=80 * 2**30, weights=13 * 2**30, contexts=[2048])
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache
from nqkv_jax.checks import whole_numbers
from nqkv_jax.schemes import LayerScheme, LayerShape, Scheme

_LONG = 1 << 16  # tokens: longer than any residual


class CacheShape(Protocol):
    """The sizes that a cache depends on; the configuration of a model has them, among others."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


def cache_sizes(config: CacheShape) -> dict[str, int]:
    """The arguments of `Scheme.init` that the model fixes."""
    return dict(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim, windows=layer_windows(config))  # fmt: skip


def layer_windows(config: CacheShape) -> tuple[int | None, ...] | None:
    """The sliding windows of a model's layers; None if it has none."""
    window = getattr(config, "window", lambda layer: None)
    windows = tuple(window(layer) for layer in range(config.num_layers))
    return windows if any(windows) else None


class AbstractCaches:
    """`Scheme.abstract` for one model, in a small part of the time.

    Layers that are cached alike are allocated once (as shapes), and put in as often as there are.

    Raises: ValueError if the scheme does not fit the model.
    """

    def __init__(self, config: CacheShape, scheme: Scheme, dtype: Any = jnp.bfloat16):
        self._scheme, self._dtype = str(scheme), jnp.dtype(dtype)
        self._kinds: list[tuple[LayerShape, LayerScheme, int | None]] = []
        self._kind_of: list[int] = []  # per layer
        windows = layer_windows(config) or (None,) * config.num_layers
        for layer in range(config.num_layers):
            shape = LayerShape(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
                               layer=layer, num_layers=config.num_layers)  # fmt: skip
            self._add(shape, scheme.layer(shape), windows[layer])

    def _add(self, shape: LayerShape, scheme: LayerScheme, window: int | None) -> None:
        alike = lambda kind: kind[2] == window and _alike(kind[1], scheme)
        kinds = range(len(self._kinds))
        known = next((i for i in kinds if alike(self._kinds[i])), len(kinds))
        if known == len(kinds):
            self._kinds.append((shape, scheme, window))
        self._kind_of.append(known)

    @functools.cache  # noqa: B019  (shapes only, and the object is short-lived)
    def __call__(self, *, batch: int, max_len: int) -> KVCache:
        """The shapes of a cache."""
        layers = [
            jax.eval_shape(functools.partial(
                scheme.init, shape, batch=batch, max_len=max_len, dtype=self._dtype,
                window=window))
            for shape, scheme, window in self._kinds
        ]  # fmt: skip
        return KVCache(layers=tuple(layers[i] for i in self._kind_of), scheme=self._scheme)

    # Of a long cache, as a short one may have no body.

    @property
    def stored_bits(self) -> float:
        """Per element of the body."""
        return self(batch=1, max_len=_LONG).stored_bits

    @property
    def token_bytes(self) -> float:
        """What one more token of one sequence costs, once the sequence is long."""
        return self(batch=1, max_len=_LONG).token_bytes

    @property
    def sequence_bytes(self) -> float:
        """What a sequence costs beside that: sinks, residual, states, and sliding windows."""
        cache = self(batch=1, max_len=_LONG)
        sides = [s for layer in cache.layers for s in (layer.key, layer.value)]
        bodies = [side.body for side in sides if not side.ring]
        return cache.nbytes - sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(bodies))


def _alike(a: LayerScheme, b: LayerScheme) -> bool:
    # Quantizers with calibrated arrays neither compare nor have to be alike.
    return not jax.tree.leaves((a.key, a.value, b.key, b.value)) and a == b


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What fits with one scheme.

    Attributes:
      scheme: its string form.
      stored_bits: per element of the body.
      token_bytes: what one more token of one sequence costs, once the sequence is long.
      sequence_bytes: what a sequence costs beside that: sinks, residual, states, and layers with a
        sliding window.
      largest_batch: context -> sequences of so many tokens that fit.
      largest_context: batch -> tokens that so many sequences can have; by memory alone, which may
        be more than the model's `max_positions`, but for a model with windows in all layers.
    """

    scheme: str
    stored_bits: float
    token_bytes: float
    sequence_bytes: float
    largest_batch: dict[int, int]
    largest_context: dict[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Attributes:
    memory, weights, reserve: bytes; the cache may have memory - weights - reserve.
    max_positions: the context that the model was trained for.
    dtype: of sinks, residual and full-precision caches.
    rows: one per scheme.
    """

    memory: int
    weights: int
    reserve: int
    max_positions: int
    dtype: str
    rows: tuple[PlanRow, ...]

    @property
    def budget(self) -> int:
        return self.memory - self.weights - self.reserve


def plan(
    config: CacheShape,
    names: Iterable[str | Scheme],
    *,
    memory: int,
    weights: int = 0,
    reserve: int = 0,
    contexts: Iterable[int] = (),
    batches: Iterable[int] = (),
    dtype: Any = jnp.bfloat16,
) -> Plan:
    """The largest batch at each context, and the largest context at each batch, for every scheme.

    Args:
      config: the model's sizes.
      names: schemes.
      memory: bytes of the device.
      weights: bytes that the parameters take.
      reserve: bytes that activations and the runtime take; not estimated here.
      contexts, batches: for which to answer.
      dtype: of what a cache keeps in full precision.

    Raises:
      ValueError: weights and reserve leave nothing for a cache, a size is not positive, or a scheme
        does not exist or does not fit the model.
    """
    contexts, batches = list(contexts), list(batches)
    budget = cache_budget(memory, weights, reserve, contexts, batches)
    rows = tuple(
        _row(config, schemes.get(name), budget, contexts, batches, dtype) for name in names
    )
    return Plan(
        memory=memory,
        weights=weights,
        reserve=reserve,
        max_positions=config.max_positions,
        dtype=jnp.dtype(dtype).name,
        rows=rows,
    )


def cache_budget(
    memory: int, weights: int, reserve: int, contexts: Sequence[int], batches: Sequence[int]
) -> int:
    """Bytes that are left for a cache; takes and raises what `plan` does."""
    if memory < 1 or weights < 0 or reserve < 0:
        raise ValueError(
            "plan: expected memory > 0, weights >= 0 and reserve >= 0 bytes; got "
            f"{memory}, {weights}, {reserve}"
        )
    for size in (*contexts, *batches):
        whole_numbers("plan", size=size)
    if wrong := [n for n in (*contexts, *batches) if n < 1]:
        raise ValueError(f"plan: contexts and batches must be positive; got {wrong}")
    budget = memory - weights - reserve
    if budget <= 0:
        raise ValueError(
            f"plan: weights and reserve must leave memory for a cache; they take "
            f"{format_size(weights)} + {format_size(reserve)} of {format_size(memory)}. Give more "
            "memory, or weights of a smaller dtype"
        )
    return budget


def _row(config: CacheShape, scheme: Scheme, budget: int, contexts: list[int], batches: list[int],
         dtype: Any) -> PlanRow:  # fmt: skip
    caches = AbstractCaches(config, scheme, dtype)

    def nbytes(batch: int, length: int) -> int:
        return caches(batch=batch, max_len=length).nbytes

    per_token = caches.token_bytes

    def longest(batch: int) -> int:
        fits = lambda length: nbytes(batch, length) <= budget
        if not per_token and fits(config.max_positions):  # every layer has a window
            return config.max_positions
        return largest(fits, guess=int(budget / batch / max(per_token, 1)))

    return PlanRow(
        scheme=str(scheme),
        stored_bits=caches.stored_bits,
        token_bytes=per_token,
        sequence_bytes=caches.sequence_bytes,
        largest_batch={
            length: largest(lambda batch, length=length: nbytes(batch, length) <= budget,
                            guess=budget // nbytes(1, length))
            for length in contexts
        },
        largest_context={batch: longest(batch) for batch in batches},
    )  # fmt: skip


def largest(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest n >= 0 for which `fits(n)`.

    0 is taken to fit, and whatever is larger than a misfit not to.

    Searched outwards from `guess`, then by bisection: few trials if the guess is good.
    """
    low, high, step = 0, None, 1
    probe = max(guess, 1)
    while high is None or high - low > 1:
        if fits(probe):
            low = probe
        else:
            high = probe
        if high is None:
            probe = low + step
        elif low == 0 and high > step:
            probe = high - step
        else:
            probe = (low + high) // 2
        step *= 2
    return low


_UNITS = {"": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024), ("i", 1024))
} | {"b": 1}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "80GiB" (2^30 each), "80GB" or "80G" (10^9 each), "1.5TiB", "4096".

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(
            f"a size must be a number and a unit such as 80GiB (2^30 bytes each), "
            f"80GB or 80G (10^9), 512MiB; got {text!r}"
        )
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"a size must be at least one byte; got {text!r}")
    return size


def format_size(size: float) -> str:
    """1536 -> "1.50 KiB": three figures and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        # 1000 rather than 1024, so that there are never more than three figures before the point.
        if abs(size) < 1000 or unit == "PiB":
            break
        size /= 1024
    whole = unit == "B" and size == int(size)
    digits = 0 if whole else max(0, 2 - (abs(size) >= 10) - (abs(size) >= 100))
    return f"{size:.{digits}f} {unit}"
