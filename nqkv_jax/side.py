"""One side (keys or values) of one layer of a cache: where tokens are.

A side keeps its first tokens in full precision (*sinks*), then the tokens that its quantizer has
encoded (*body*), and the latest tokens in full precision (*residual*, a ring). How many tokens are
where is a closed form of the length alone (`Window`), so that nothing but `lengths` has to be
tracked, sequences of a batch are independent, and appending token by token or all at once leaves
the same bits. `nqkv_jax.append` is how they get there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax.checks import is_whole
from nqkv_jax.quantizers.base import Context, Payload, Quantizer, State

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
        whole = is_whole(self.keep) and is_whole(self.chunk)
        if not whole or self.keep < 0 or self.chunk < 1:
            raise ValueError(
                f"Window: expected keep >= 0 and chunk >= 1, whole numbers; got {self}"
            )
        for name in ("keep", "chunk"):
            object.__setattr__(self, name, int(getattr(self, name)))

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

    def leads(self, other: "Window") -> bool:
        """Whether tokens may be encoded here that wait on a side with the window `other`."""
        # At most tokens - keep are encoded, and one more of those that are not there yet; and no
        # fewer than tokens - keep - chunk + 1.
        return self.keep - self.immediate < other.keep + other.chunk - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Keys or values of one layer.

    Attributes:
      exact: [B, num_sinks + slots, Hkv, D], sinks and residual: one array, as attention sees
      both. The token at position p of the residual is in its slot (p - num_sinks) % slots.
      body: payload leaves [B, groups, ...]; group g holds tokens num_sinks + [g, g + 1) * group.
      state: the quantizer's per-sequence state, leaves [B, ...].
      quantizer: a pytree; static unless it is calibrated.
      period: body token t is encoded as if it were token t % period; None for t itself. See
        `LayerCache.window`.
      rotates: keys are rotated when they are encoded, and not before.
      implementation: see `KVCache.with_implementation`.
    """

    exact: jax.Array = dataclasses.field(repr=False)
    body: Payload = dataclasses.field(repr=False)
    state: State = dataclasses.field(repr=False)
    quantizer: Quantizer
    window: Window = dataclasses.field(metadata=_STATIC)
    num_sinks: int = dataclasses.field(metadata=_STATIC)
    period: int | None = dataclasses.field(default=None, metadata=_STATIC)
    rotates: bool = dataclasses.field(default=False, metadata=_STATIC)
    implementation: str = dataclasses.field(default="auto", metadata=_STATIC)

    @property
    def sinks(self) -> jax.Array:
        """[B, num_sinks, Hkv, D], the first tokens."""
        return self.exact[:, : self.num_sinks]

    @property
    def residual(self) -> jax.Array:
        """[B, slots, Hkv, D], the latest."""
        return self.exact[:, self.num_sinks :]

    @property
    def slots(self) -> int:
        """Of the residual: `window.capacity`, but no more than there can be tokens."""
        return self.exact.shape[1] - self.num_sinks

    @property
    def num_groups(self) -> int:
        return jax.tree.leaves(self.body)[0].shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that the body has room for."""
        return self.num_groups * self.quantizer.group

    @property
    def waits(self) -> bool:
        """Whether a chunk can be encoded after the token that makes it due is in the residual."""
        return self.num_groups > 0 and self.window.capacity > 0

    @property
    def ring(self) -> bool:
        """Whether the body has room for the latest `period` tokens only, t in place t % period."""
        return self.period is not None and self.capacity == self.period

    def counted(self, token: jax.Array) -> jax.Array:
        """Which token a body token is encoded as."""
        return token if self.period is None else token % self.period

    def encoded(self, lengths: jax.Array) -> jax.Array:
        """Body tokens of sequences of `lengths` tokens."""
        return self.window.encoded(jnp.maximum(lengths - self.num_sinks, 0))

    def take(self, sequences: jax.Array) -> "Side":
        """See `KVCache.take`."""
        own = jax.tree.map(lambda a: a[sequences], (self.exact, self.body, self.state))
        return dataclasses.replace(self, **dict(zip(("exact", "body", "state"), own, strict=True)))

    def reset(self, where: jax.Array) -> "Side":
        """See `KVCache.reset`; tokens stay where they are, as none of them is in a length."""
        if not jax.tree.leaves(self.state):
            return self
        empty = self.quantizer.init_state(*self.exact.shape[2:])
        one = lambda old, new: jnp.where(where.reshape(-1, *[1] * new.ndim), new, old)
        return dataclasses.replace(self, state=jax.tree.map(one, self.state, empty))


def body_capacity(window: Window, num_sinks: int, max_len: int) -> int:
    """Tokens that can ever be encoded on one side of a cache of `max_len` tokens."""
    return window.encoded(max(max_len - num_sinks, 0))


@functools.lru_cache
def _payload_shape(structure, arrays: tuple, num_kv_heads: int, head_dim: int, dtype) -> Payload:
    """Shapes of the payload of one group. Cached, as tracing it for every layer takes seconds."""
    arrays = [jax.ShapeDtypeStruct(*a) for a in arrays]
    quantizer = jax.tree.unflatten(structure, arrays)
    name, shape = type(quantizer).__name__, (quantizer.group, num_kv_heads, head_dim)

    def one(arrays):
        quantizer = jax.tree.unflatten(structure, arrays)
        context = Context(
            positions=jnp.zeros(quantizer.group, jnp.int32),
            state=quantizer.init_state(num_kv_heads, head_dim),
        )
        payload = quantizer.quantize(jnp.zeros(shape, dtype), context)
        return payload, quantizer.dequantize(payload, context)

    payload, decoded = jax.eval_shape(one, arrays)
    if not jax.tree.leaves(payload):
        raise ValueError(
            f"{name}: expected quantize to return arrays, a pytree of them; got {payload!r}"
        )
    if getattr(decoded, "shape", None) != shape:
        raise ValueError(
            f"{name}: expected dequantize to return an array [group, heads, head_dim] of shape "
            f"{shape}, as quantize takes it; got {decoded!r}"
        )
    return payload


def init_side(
    quantizer: Quantizer,
    window: Window,
    *,
    num_sinks: int,
    capacity: int,
    max_len: int,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
    period: int | None = None,
    rotates: bool = False,
) -> Side:
    """An empty side; its body has room for `capacity` tokens, in whole groups, and sinks and
    residual for no more than `max_len`."""
    group = quantizer.group
    if window.chunk % quantizer.step:
        raise ValueError(
            f"cache: expected chunk to be a multiple of the {quantizer.step} tokens that the "
            f"quantizer encodes together; got chunk={window.chunk}"
        )
    arrays, structure = jax.tree.flatten(quantizer)
    shapes = tuple((a.shape, jnp.dtype(a.dtype)) for a in arrays)
    payload = _payload_shape(structure, shapes, num_kv_heads, head_dim, jnp.dtype(dtype))
    zeros = lambda a: jnp.zeros((batch, -(-capacity // group), *a.shape), a.dtype)
    # Nothing ever enters a state where nothing is encoded.
    state = quantizer.init_state(num_kv_heads, head_dim) if capacity else ()
    num_sinks = min(num_sinks, max_len)
    exact = num_sinks + min(window.capacity, max_len - num_sinks)
    return Side(
        exact=jnp.zeros((batch, exact, num_kv_heads, head_dim), dtype),
        body=jax.tree.map(zeros, payload),
        state=jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), state),
        # What it has learned belongs to the scheme, and would be gone with a cache that is donated.
        quantizer=jax.tree.map(jnp.copy, quantizer),
        window=window,
        num_sinks=num_sinks,
        period=period,
        rotates=rotates,
    )
