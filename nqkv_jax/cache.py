"""The cache: sinks | body | residual for keys and for values of every layer.

One side (keys or values) of one layer keeps its first tokens in full precision (*sinks*), then the
tokens that its quantizer has encoded (*body*), and the latest tokens in full precision (*residual*,
a ring). How many tokens are where is a closed form of the length alone (`Window`), so that nothing
but `lengths` has to be tracked, sequences of a batch are independent, and appending token by token
or all at once leaves the same bits.

What is written for one sequence is vmapped over the batch; encoding runs under one loop outside the
vmap, so that a step in which no sequence completes a chunk costs nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import Context, Payload, Quantizer, State
from nqkv_jax.rotary import Rotary

_STATIC = {"static": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Which tokens of one side are in full precision.

    Attributes:
      keep: latest tokens that stay in full precision after a flush.
      chunk: tokens that are encoded at a time; the residual grows to keep + chunk, then one chunk
      leaves.

    `keep=0, chunk=1` has no residual: a token is encoded as it arrives, and attention sees it as
    decoded. With a residual, attention sees the current token in full precision and the flush comes
    after. KIVI's keys are `keep=0, chunk=128`, its values `keep=128, chunk=1`.
    """

    keep: int = 0
    chunk: int = 1

    def __post_init__(self):
        if self.keep < 0 or self.chunk < 1:
            raise ValueError(f"Window: expected keep >= 0 and chunk >= 1; got {self}")

    @property
    def capacity(self) -> int:
        """Slots of the residual ring."""
        return 0 if self.immediate else self.keep + self.chunk

    @property
    def immediate(self) -> bool:
        return self.keep == 0 and self.chunk == 1

    def encoded(self, tokens):
        """How many of `tokens` (int or array, without sinks) are encoded once they are appended."""
        waiting = tokens - self.keep
        waiting = max(waiting, 0) if isinstance(waiting, int) else jnp.maximum(waiting, 0)
        return waiting // self.chunk * self.chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Keys or values of one layer.

    Attributes:
      sinks: [B, num_sinks, Hkv, D], the first tokens.
      body: payload leaves [B, groups, ...]; group g holds tokens num_sinks + [g, g + 1) * group.
      residual: [B, capacity, Hkv, D]; the token at position p is in slot (p - num_sinks) %
      capacity.
      state: the quantizer's per-sequence state, leaves [B, ...].
      quantizer: a pytree; static unless it is calibrated.
    """

    sinks: jax.Array
    body: Payload
    residual: jax.Array
    state: State
    quantizer: Quantizer
    window: Window = dataclasses.field(metadata=_STATIC)

    @property
    def num_sinks(self) -> int:
        return self.sinks.shape[1]

    @property
    def num_groups(self) -> int:
        return jax.tree.leaves(self.body)[0].shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that the body has room for."""
        return self.num_groups * self.quantizer.group

    def encoded(self, lengths: jax.Array) -> jax.Array:
        """Body tokens of sequences of `lengths` tokens."""
        return self.window.encoded(jnp.maximum(lengths - self.num_sinks, 0))


def body_capacity(window: Window, num_sinks: int, max_len: int) -> int:
    """Tokens that can ever be encoded on one side of a cache of `max_len` tokens."""
    return window.encoded(max(max_len - num_sinks, 0))


@functools.lru_cache
def _payload_shape(structure, arrays: tuple, num_kv_heads: int, head_dim: int, dtype) -> Payload:
    """Shapes of the payload of one group. Cached, as tracing it for every layer takes seconds."""

    def one(arrays):
        quantizer = jax.tree.unflatten(structure, arrays)
        context = Context(
            positions=jnp.zeros(quantizer.group, jnp.int32),
            state=quantizer.init_state(num_kv_heads, head_dim),
        )
        return quantizer.quantize(
            jnp.zeros((quantizer.group, num_kv_heads, head_dim), dtype), context
        )

    return jax.eval_shape(one, [jax.ShapeDtypeStruct(*a) for a in arrays])


def init_side(
    quantizer: Quantizer,
    window: Window,
    *,
    num_sinks: int,
    capacity: int,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
) -> Side:
    """An empty side; its body has room for `capacity` tokens, a multiple of the group."""
    group = quantizer.group
    if window.chunk % group:
        raise ValueError(
            f"cache: expected chunk to be a multiple of the quantizer's group of {group} tokens; "
            f"got chunk={window.chunk}"
        )
    arrays, structure = jax.tree.flatten(quantizer)
    shapes = tuple((a.shape, jnp.dtype(a.dtype)) for a in arrays)
    payload = _payload_shape(structure, shapes, num_kv_heads, head_dim, jnp.dtype(dtype))
    zeros = lambda a: jnp.zeros((batch, capacity // group, *a.shape), a.dtype)
    state = quantizer.init_state(num_kv_heads, head_dim)
    full = lambda tokens: jnp.zeros((batch, tokens, num_kv_heads, head_dim), dtype)
    return Side(
        sinks=full(num_sinks),
        body=jax.tree.map(zeros, payload),
        residual=full(window.capacity),
        state=jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), state),
        quantizer=quantizer,
        window=window,
    )


def _write(buffer: jax.Array, rows: jax.Array, index: jax.Array, keep: jax.Array) -> jax.Array:
    """Writes `rows` to `buffer[index]` where `keep`; one sequence."""
    # Out-of-range rows are dropped, so that pads and tokens past max_len cannot reach what is
    # cached.
    index = jnp.where(keep, index, buffer.shape[0] + jnp.arange(index.shape[0]))
    return buffer.at[index].set(rows, mode="drop", unique_indices=True)


def _encode(
    side: Side,
    rotary: Rotary | None,
    count: int,
    body: Payload,
    state: State,
    residual: jax.Array,
    x: jax.Array,
    keys: tuple[jax.Array, jax.Array] | None,
    start: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[Payload, State]:
    """Encodes body tokens first + [0, count) as far as they are below `last`; one sequence.

    Token i comes from `x` [S, Hkv, D] if it is not older than `start`, else from the residual;
    `keys` are residual and x of the other side. Of `side` only what all sequences share is used.
    """
    quantizer, group, capacity = side.quantizer, side.quantizer.group, side.window.capacity
    token = first + jnp.arange(count)

    def gather(residual, x):
        rows = x[jnp.clip(token - start, 0, x.shape[0] - 1)]
        if not capacity:
            return rows
        return jnp.where((token < start)[:, None, None], residual[token % capacity], rows)

    rows, positions = gather(residual, x), token + side.num_sinks
    context = Context(
        positions=positions,
        rotary=rotary,
        state=state,
        keys=None if keys is None else gather(*keys),
    )
    observed = quantizer.observe(rows, context)
    state = jax.tree.map(lambda new, old: jnp.where(first < last, new, old), observed, state)
    split = lambda a: a.reshape(count // group, group, *a.shape[1:])
    quantize = lambda r, p: quantizer.quantize(r, Context(positions=p, rotary=rotary, state=state))
    payload = jax.vmap(quantize)(split(rows), split(positions))
    index = first // group + jnp.arange(count // group)
    return jax.tree.map(
        lambda b, p: _write(b, p, index, index * group < last), body, payload
    ), state


def _observe_queries(
    quantizer: Quantizer,
    state: State,
    queries: jax.Array,
    start: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> State:
    """The state after the queries of tokens [first, last), the first of `queries` being `start`."""

    # One token at a time: the sums in a state then have one order, however tokens were appended.
    def one(token, state):
        return quantizer.observe_query(queries[token - start], Context(state=state))

    return jax.lax.fori_loop(first, last, one, state)


def append_side(
    side: Side,
    x: jax.Array,
    lengths: jax.Array,
    new_lengths: jax.Array,
    rotary: Rotary | None,
    *,
    queries: jax.Array | None = None,
    keys: tuple[jax.Array, jax.Array] | None = None,
) -> Side:
    """Appends x[b, :new_lengths[b] - lengths[b]] to sequence b.

    Args:
      x: [B, S, Hkv, D] in the dtype of the cache; rows past the valid ones are ignored.
      lengths, new_lengths: i32[B], tokens before and after.
      queries: [B, S, Hkv, G, D], for quantizers that want them.
      keys: residual [B, capacity, Hkv, D] (before these tokens) and x of the key side, likewise.
    """
    wants_queries = side.quantizer.wants_queries
    keys = keys if side.quantizer.wants_keys else None
    num_sinks, window, size = side.num_sinks, side.window, x.shape[1]
    offset = jnp.arange(size)
    # Body tokens are counted from the first token after the sinks; sinks have negative numbers.
    before, after = lengths - num_sinks, new_lengths - num_sinks
    first, last = side.encoded(lengths), side.encoded(new_lengths)
    observe_queries = jax.vmap(functools.partial(_observe_queries, side.quantizer))
    # A chunk that ends at `at` is encoded when `keep` more tokens are there, and their queries are
    # known by then.
    due = lambda at: jnp.clip(at + window.keep, before, after)

    def encode(step, carry, chunks):
        (body, state), count = carry, chunks * window.chunk
        begin = first + step * count
        if wants_queries:
            seen = jnp.where(step == 0, before, due(begin))
            state = observe_queries(state, queries, before, seen, due(begin + count))
        run = functools.partial(_encode, side, rotary, count)
        return jax.vmap(run)(body, state, side.residual, x, keys, before, begin, last)

    carry = (side.body, side.state)
    if side.num_groups:
        most = (size + window.chunk - 1) // window.chunk
        # A state must see the chunks in order; without one, all of them are encoded side by side.
        chunks = 1 if jax.tree.leaves(side.state) else most
        steps = jnp.max((last - first + chunks * window.chunk - 1) // (chunks * window.chunk))
        if window.immediate and chunks == most:
            carry = encode(0, carry, chunks)
        else:
            carry = jax.lax.fori_loop(0, steps, lambda i, c: encode(i, c, chunks), carry)
        if wants_queries:
            seen = jnp.where(steps > 0, due(first + steps * window.chunk), before)
            carry = (carry[0], observe_queries(carry[1], queries, before, seen, after))

    def store(sinks, residual, x, before, after):
        token = before + offset
        fresh = token < after
        sinks = _write(sinks, x, token + num_sinks, fresh & (token < 0))
        if window.capacity:
            latest = fresh & (token >= 0) & (token >= after - window.capacity)
            residual = _write(residual, x, token % window.capacity, latest)
        return sinks, residual

    sinks, residual = side.sinks, side.residual
    if num_sinks or window.capacity:
        sinks, residual = jax.vmap(store)(sinks, residual, x, before, after)
    return dataclasses.replace(side, sinks=sinks, body=carry[0], residual=residual, state=carry[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer; `lengths` i32[B] valid tokens, `overflow` i32[B] tokens turned away."""

    key: Side
    value: Side
    lengths: jax.Array
    overflow: jax.Array
    max_len: int = dataclasses.field(metadata=_STATIC)
    num_kv_heads: int = dataclasses.field(metadata=_STATIC)
    head_dim: int = dataclasses.field(metadata=_STATIC)
    dtype: jnp.dtype = dataclasses.field(metadata=_STATIC)
    rotated: bool = dataclasses.field(metadata=_STATIC)  # whether keys are stored after RoPE

    @property
    def wants_queries(self) -> bool:
        """Whether `append` needs the queries of the tokens."""
        return self.key.quantizer.wants_queries or self.value.quantizer.wants_queries

    def append(
        self,
        k: jax.Array,
        v: jax.Array,
        num_new: jax.Array,
        rotary: Rotary | None,
        queries: jax.Array | None = None,
    ) -> "LayerCache":
        """Appends `num_new` i32[B] of the tokens k, v [B, S, Hkv, D].

        Tokens past `max_len` are counted, not stored. `queries` [B, S, Hkv, G, D] are those of the
        same tokens, rotated if the cached keys are, not scaled; needed if `wants_queries`.
        """
        if self.wants_queries and queries is None:
            raise ValueError(
                "cache: this scheme encodes keys by the queries that they will meet; append needs "
                "queries [batch, tokens, num_kv_heads, group, head_dim]. `attend` brings them"
            )
        wanted = self.lengths + num_new
        lengths = jnp.minimum(wanted, self.max_len)
        beside = dict(queries=queries, keys=(self.key.residual, k))
        return dataclasses.replace(
            self,
            key=append_side(self.key, k, self.lengths, lengths, rotary, **beside),
            value=append_side(self.value, v, self.lengths, lengths, rotary, **beside),
            lengths=lengths,
            overflow=self.overflow + wanted - lengths,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The caches of all layers, a pytree of arrays: carry it through `jit`, donate it, shard it."""

    layers: tuple[LayerCache, ...]
    scheme: str = dataclasses.field(metadata=_STATIC)  # the string form, for messages

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
        return self.lengths[:, None] + jnp.arange(num_tokens)[None, :]

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
        """Bytes of one encoded token of one sequence, in all layers; 0 without a body."""
        sides = [s for layer in self.layers for s in (layer.key, layer.value) if s.num_groups]
        return sum(
            a.size * a.dtype.itemsize / (self.batch * side.capacity)
            for side in sides
            for a in jax.tree.leaves(side.body)
        )

    def check(self) -> "KVCache":
        """Returns the cache; not for use in `jit`.

        Raises:
          ValueError: tokens were turned away, or the layers do not hold the same number of them.
        """
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
