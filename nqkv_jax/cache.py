"""The cache: sinks | body | residual for keys and for values of every layer.

See `nqkv_jax.side` for where tokens are, and `nqkv_jax.append` for how they get there. After every
token, full residuals are encoded: layer by layer, or (`KVCache.defer_flush`) of all layers at once,
with the last.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.append import Waiting, append_side, append_token, flush
from nqkv_jax.pallas_kernels.decode_attention import IMPLEMENTATIONS
from nqkv_jax.rotary import Rotary
from nqkv_jax.side import Side

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Unflushed:
    """A token was appended, and a chunk that it made due is still in the residual.

    Attributes:
      lengths: i32[B], before that token.
      rotary: how the model rotates keys.
    """

    lengths: jax.Array
    rotary: Rotary | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer; `lengths` i32[B] valid tokens, `overflow` i32[B] tokens turned away.

    `unflushed` is only there between a token whose flush was put off, and the flush.

    With a `window`, bodies are rings with room for it and more (`Scheme.init`). All positions in a
    body, those that keys are rotated to, too, are then counted from where the ring last began, as
    if a sequence began there: attention depends on differences of positions alone. So quantizers
    and kernels see an ordinary body; `attend` turns queries to where either of two rounds began,
    and asks twice.
    """

    key: Side = dataclasses.field(repr=False)
    value: Side = dataclasses.field(repr=False)
    lengths: jax.Array
    overflow: jax.Array
    unflushed: Unflushed | None = None
    max_len: int = dataclasses.field(metadata=_STATIC)
    num_kv_heads: int = dataclasses.field(metadata=_STATIC)
    head_dim: int = dataclasses.field(metadata=_STATIC)
    dtype: jnp.dtype = dataclasses.field(metadata=_STATIC)
    rotated: bool = dataclasses.field(metadata=_STATIC)  # whether keys are stored after RoPE
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)  # None: all tokens

    @property
    def implementation(self) -> str:
        """See `KVCache.with_implementation`."""
        return self.key.implementation

    @property
    def wants_queries(self) -> bool:
        """Whether `append` needs the queries of the tokens."""
        return self.key.quantizer.wants_queries or self.value.quantizer.wants_queries

    def with_implementation(self, implementation: str) -> "LayerCache":
        """See `KVCache.with_implementation`."""
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"cache: expected implementation to be one of {IMPLEMENTATIONS}; got "
                f"{implementation!r}"
            )
        by = lambda side: dataclasses.replace(side, implementation=implementation)
        return dataclasses.replace(self, key=by(self.key), value=by(self.value))

    def check_flushed(self) -> None:
        """Raises ValueError if a flush was put off, and has not come since."""
        if self.unflushed is not None:
            raise ValueError(
                "cache: expected every token in all layers, the last one last, as residuals have "
                "no room for more; call attend with layer=0, 1, ..., or cache.flush() after a token"
            )

    def take(self, sequences: jax.Array) -> "LayerCache":
        """See `KVCache.take`."""
        self.check_flushed()
        return dataclasses.replace(
            self,
            key=self.key.take(sequences),
            value=self.value.take(sequences),
            lengths=self.lengths[sequences],
            overflow=self.overflow[sequences],
        )

    def reset(self, where: jax.Array) -> "LayerCache":
        """See `KVCache.reset`."""
        self.check_flushed()
        return dataclasses.replace(
            self,
            key=self.key.reset(where),
            value=self.value.reset(where),
            lengths=jnp.where(where, 0, self.lengths),
            overflow=jnp.where(where, 0, self.overflow),
        )

    def append(
        self,
        k: jax.Array,
        v: jax.Array,
        num_new: jax.Array,
        rotary: Rotary | None,
        queries: jax.Array | None = None,
        *,
        defer_flush: bool = False,
    ) -> "LayerCache":
        """Appends `num_new` i32[B] of the S tokens k, v [B, S, Hkv, D], in the dtype of the cache.

        Tokens past `max_len` are counted, not stored. `queries` [B, S, Hkv, G, D] are those of the
        same tokens, rotated if the cached keys are, not scaled; needed if `wants_queries`. With
        `defer_flush`, see `KVCache.defer_flush`.
        """
        self.check_flushed()
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise ValueError(
                f"cache: expected keys and values in its dtype, {self.dtype.name}; got "
                f"{k.dtype.name} and {v.dtype.name}. `attend` rounds them"
            )
        if self.wants_queries and queries is None:
            raise ValueError(
                "cache: this scheme encodes keys by the queries that they will meet; append needs "
                "queries [batch, tokens, num_kv_heads, group, head_dim]. `attend` brings them"
            )
        wanted = self.lengths + num_new
        lengths = jnp.minimum(wanted, self.max_len)
        one_token, beside = k.shape[1] == 1, dict(queries=queries, keys=(self.key.residual, k))

        def append(side, x):
            if one_token and side.waits:
                return append_token(side, x, self.lengths, lengths, queries=queries)
            return append_side(side, x, self.lengths, lengths, rotary, **beside)

        layer = dataclasses.replace(
            self,
            key=append(self.key, k),
            value=append(self.value, v),
            lengths=lengths,
            overflow=self.overflow + wanted - lengths,
        )
        if not (one_token and (self.key.waits or self.value.waits)):
            return layer
        unflushed = Unflushed(lengths=self.lengths, rotary=rotary)
        layer = dataclasses.replace(layer, unflushed=unflushed)
        return layer if defer_flush else _flush((layer,))[0]


def _flush(layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
    """Encodes what waits, under one condition for all sides of the same window."""
    by_window: dict = {}
    for i, layer in enumerate(layers):
        for name in ("key", "value"):
            side = getattr(layer, name)
            if layer.unflushed is None or not side.waits:
                continue
            waiting = Waiting(
                side=side,
                lengths=layer.unflushed.lengths,
                new_lengths=layer.lengths,
                rotary=layer.unflushed.rotary,
                keys=layer.key.residual if side.quantizer.wants_keys else None,
            )
            by_window.setdefault(side.window, {})[i, name] = waiting
    changed = [dict(unflushed=None) for _ in layers]
    for group in by_window.values():
        flushed = flush(list(group.values()))
        for (i, name), side in zip(group, flushed, strict=True):
            changed[i][name] = side
    return tuple(dataclasses.replace(a, **new) for a, new in zip(layers, changed, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The caches of all layers, a pytree of arrays: carry it through `jit`, donate it, shard it."""

    layers: tuple[LayerCache, ...]
    scheme: str = dataclasses.field(metadata=_STATIC)  # the string form, for messages
    deferring: bool = dataclasses.field(default=False, metadata=_STATIC)  # see `defer_flush`

    def __repr__(self) -> str:
        one = self.layers[0]
        return (
            f"KVCache(scheme={self.scheme!r}, layers={len(self.layers)}, max_len={one.max_len}, "
            f"num_kv_heads={one.num_kv_heads}, head_dim={one.head_dim}, dtype={one.dtype}, "
            f"lengths={self.lengths})"
        )

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def max_len(self) -> int:
        return self.layers[0].max_len

    @property
    def lengths(self) -> jax.Array:
        """i32[B], tokens cached per sequence."""
        return self.layers[0].lengths

    @property
    def overflow(self) -> jax.Array:
        """i32[B], tokens that did not fit into `max_len` and were not stored, in any layer."""
        return jnp.max(jnp.stack([layer.overflow for layer in self.layers]), axis=0)

    def positions(self, num_tokens: int) -> jax.Array:
        """i32[B, num_tokens], positions of the next tokens."""
        return self.lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]

    def take(self, sequences) -> "KVCache":
        """The cache of other sequences of the batch: in another order, some of them repeated (to
        sample several continuations, or for the beams of a search), or left out.

        Args:
          sequences: i32[N], indices into the batch. Traced ones out of range take the first or the
            last sequence, as indices do in JAX.

        Raises: ValueError: they are no whole numbers, or out of range.
        """
        index = jnp.asarray(sequences)
        if index.ndim != 1 or not index.size or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                "cache: take expects the indices of sequences, one or more whole numbers in a row; "
                f"got {sequences!r}"
            )
        traced = isinstance(index, jax.core.Tracer)
        if not traced and not (0 <= index.min() and index.max() < self.batch):
            raise ValueError(
                f"cache: take expects indices of its {self.batch} sequences, 0 to {self.batch - 1};"
                f" got {sequences!r}"
            )
        return dataclasses.replace(self, layers=tuple(a.take(index) for a in self.layers))

    def reset(self, where=None) -> "KVCache":
        """The same cache, of which some sequences are empty, as after `init`: others can begin
        there.

        Args:
          where: bool[B], which sequences; None for all.

        Raises: ValueError: `where` has another dtype or shape.
        """
        where = jnp.ones(self.batch, bool) if where is None else jnp.asarray(where)
        if where.shape != (self.batch,) or where.dtype != bool:
            raise ValueError(
                f"cache: reset expects `where` to be bool[{self.batch}], True for each sequence "
                f"that is to be empty; got {where.dtype} of shape {where.shape}"
            )
        return dataclasses.replace(self, layers=tuple(a.reset(where) for a in self.layers))

    def with_implementation(self, implementation: str) -> "KVCache":
        """The same cache, whose tokens are decoded one by one by what is asked for.

        Args:
          implementation: "auto": by the fused kernel where the platform is a TPU, and it can serve
            the scheme, else by XLA. "xla": without kernels. A kernel's name, such as "mosaic_gpu"
            for NVIDIA GPUs since Ampere, asks for that one, where anything is encoded; with it come
            those that append tokens and attend to sinks and residual, where they can serve. Kernels
            are not partitioned: in a program for several devices, call `attend` in
            `jax.shard_map(..., check_vma=False)`.

        Raises: ValueError: there is no such implementation.
        """
        layers = tuple(layer.with_implementation(implementation) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def defer_flush(self) -> "KVCache":
        """The same cache, in which chunks that a token makes due wait for the last layer.

        When `attend` appends the token there, those of all layers are encoded under one condition,
        or one for each window where keys and values have different ones. That leaves the same bits,
        and on a GPU it saves waiting: a condition is evaluated by the host. For programs that call
        `attend` with layer=0, 1, ... for each token. (Prompts are not put off.)
        """
        return dataclasses.replace(self, deferring=True)

    def flush(self) -> "KVCache":
        """Puts nothing off any more, and encodes what still waits: after the last layer, nothing
        does."""
        return dataclasses.replace(self, layers=_flush(self.layers), deferring=False)

    def append(
        self,
        layer: int,
        k: jax.Array,
        v: jax.Array,
        num_new: jax.Array,
        rotary: Rotary | None,
        queries: jax.Array | None = None,
    ) -> "KVCache":
        """`LayerCache.append` to one layer."""
        new = self.layers[layer].append(k, v, num_new, rotary, queries, defer_flush=self.deferring)
        layers = (*self.layers[:layer], new, *self.layers[layer + 1 :])
        if self.deferring and layer == len(layers) - 1:
            # Here, where the last layer's attention reads what was encoded. After it, the compiler
            # would not know that nothing reads the body any more, and copy it.
            layers = _flush(layers)
        return dataclasses.replace(self, layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of every array of the cache, scales, states and lengths included."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def stored_bits(self) -> float:
        """Bits per element of the body, from the arrays that are there; 0 without a body.

        A property of what is allocated, whether or not it is filled. Sinks, residual and states
        come on top: see `nbytes` and `effective_bits`.
        """
        bodies = [s for layer in self.layers for s in (layer.key, layer.value)]
        stored = sum(a.size * a.dtype.itemsize for s in bodies for a in jax.tree.leaves(s.body))
        tokens = sum(s.capacity for s in bodies) * self.batch
        layer = self.layers[0]
        return 8 * stored / max(tokens * layer.num_kv_heads * layer.head_dim, 1)

    @property
    def effective_bits(self) -> float:
        """Bits per element of a cache that is full: all of `nbytes`, over max_len tokens."""
        layer = self.layers[0]
        elements = 2 * len(self.layers) * layer.num_kv_heads * layer.head_dim
        return 8 * self.nbytes / (self.batch * self.max_len * elements)

    @property
    def token_bytes(self) -> float:
        """Bytes of one encoded token of one sequence, in all layers that keep all tokens; 0 without
        a body."""
        both = [s for layer in self.layers for s in (layer.key, layer.value)]
        sides = [side for side in both if side.num_groups and not side.ring]
        return sum(
            a.size * a.dtype.itemsize / (self.batch * side.capacity)
            for side in sides
            for a in jax.tree.leaves(side.body)
        )

    def check(self) -> "KVCache":
        """Returns the cache; not for use in `jit`.

        Raises:
          ValueError: tokens were turned away, or the layers do not hold the same number of them; or
            the cache is traced.
        """
        if any(isinstance(layer.lengths, jax.core.Tracer) for layer in self.layers):
            raise ValueError(
                "cache: check() needs the lengths as numbers; got a cache that jax.jit or another "
                "transformation traces. Return it from the function, and check what comes back"
            )
        lengths = [tuple(int(n) for n in layer.lengths) for layer in self.layers]
        if len(set(lengths)) > 1:
            raise ValueError(
                "cache: expected every layer to hold the same tokens; lengths per layer are "
                f"{lengths}. Call attend once per layer with layer=0, 1, ..."
            )
        lost = [int(n) for n in self.overflow]
        if any(lost):
            raise ValueError(
                f"cache: max_len={self.max_len} is too small: {lost} tokens per sequence did not "
                "fit and were not stored; what was cached before is intact. Allocate "
                f"scheme.init(..., max_len=...) for at least {self.max_len + max(lost)} tokens"
            )
        return self
