"""The contract between quantizers and everything that stores or attends to what they made.

A quantizer is written for one sequence and one *group* of tokens, `[group, heads, head_dim]`: 1
token for per-token schemes, 32..128 for schemes with per-channel scales. Callers `vmap` it over
groups and batch, so a payload leaf of shape S is stored as `[batch, groups, *S]` and every scheme
shares one cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nqkv_jax.pallas_kernels.decode_attention import TiledCodes, VectorCodes
from nqkv_jax.rotary import Rotary, RotaryAngles

Payload = Any  # a pytree of arrays: all that is stored for one group
State = Any  # a pytree of arrays: what a quantizer keeps per sequence; () for most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a quantizer may know about the tokens besides their values.

    Attributes:
      positions: i32[tokens], absolute positions; None outside a cache.
      rotary: how the model rotates keys: called with (x, positions); None for models without RoPE.
      state: the quantizer's own per-sequence state.
      keys: [tokens, heads, head_dim], the keys of the tokens that `observe` is given, as the cache
        stores them. Only for quantizers that want them.
      implementation: see `KVCache.with_implementation`.
    """

    positions: jax.Array | None = None
    rotary: Rotary | RotaryAngles | None = None
    state: State = ()
    keys: jax.Array | None = None
    implementation: str = dataclasses.field(default="auto", metadata={"static": True})


class Quantizer:
    """A pair of pure functions between one group of tokens and its payload.

    Subclasses are frozen dataclasses, registered as pytrees: hyper-parameters are static fields,
    calibrated arrays are leaves. `check` is called once, outside `jit`, before anything is
    allocated.
    """

    # What the cache has to bring beside the tokens themselves. A quantizer of values that wants
    # keys needs the same window on both sides.
    wants_queries = False
    wants_keys = False

    # Whether keys are turned by `context.rotary` when they are decoded: the cache then encodes them
    # as they were before RoPE. A quantizer that does not say so must leave them as they are.
    rotates = False

    @property
    def group(self) -> int:
        """Tokens of a payload."""
        return 1

    @property
    def step(self) -> int:
        """Tokens that are encoded together: `group`, or a divisor of it, if payloads can be filled
        little by little (`splice`)."""
        return self.group

    def check(self, heads: int, head_dim: int) -> None:
        """Raises ValueError, saying what would be valid, if this shape cannot be quantized."""

    def init_state(self, heads: int, head_dim: int) -> State:
        """The state of a sequence of which nothing has been encoded yet."""
        return ()

    def observe(self, x: jax.Array, context: Context) -> State:
        """The new state, after seeing `x` [tokens, heads, head_dim] that is about to be encoded.

        The cache calls it once per flushed chunk, in order, so that the state, and with it every
        stored bit, does not depend on how many tokens were appended at a time.
        """
        return context.state

    def observe_query(self, q: jax.Array, context: Context) -> State:
        """The new state, after the queries `q` [heads, query heads per KV head, head_dim] of one
        token, rotated if the cached keys are, not scaled.

        The cache calls it in the order of the tokens; before a chunk is observed, for every token
        up to the one whose arrival makes the chunk due. Only if `wants_queries`.
        """
        return context.state

    def quantize(self, x: jax.Array, context: Context) -> Payload:
        """Encodes `x` [group, heads, head_dim], any float dtype."""
        raise NotImplementedError

    def splice(
        self, body: Payload, x: jax.Array, first: jax.Array, last: jax.Array, context: Context
    ) -> Payload:
        """Encodes `x` [n, heads, head_dim], the tokens first + [0, n) of a sequence, into its body,
        leaves [groups, ...]: those below `last`, both i32[]. Other tokens stay what they are.

        Only for a `step` below `group`. The bits are those of `quantize`.
        """
        raise NotImplementedError

    def round_trip(self, x: jax.Array, context: Context) -> jax.Array:
        """What `x` decodes to, in float32; of tokens that are encoded together, `step` or more."""
        return self.dequantize(self.quantize(x, context), context)

    def dequantize(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        """Decodes one group: [group, heads, head_dim], keys ready for rotated queries (see
        `rotates`)."""
        raise NotImplementedError

    # A linear map that a quantizer applies before coding need not be undone on every cached token:
    # on keys it moves to the query, on values to the output. A folded token may have more or fewer
    # channels than head_dim (several products per key, values as weights of a codebook), and a
    # folded value may have 1 head that all heads share. The defaults say "nothing to fold".

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        """(q', shift) such that <q, key> = <q', folded key> + shift.

        `q` is [..., heads, head_dim] with KV heads; q' is [..., heads, channels of a folded key],
        those that meet `waves` at the end; `shift` is [..., heads] or None for zero.
        """
        return q, None

    def dequantize_folded(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        """Like `dequantize`, without the map that `fold_queries` or `unfold_output` takes over."""
        return self.dequantize(payload, context, dtype)

    def waves(self, context: Context, dtype=jnp.float32) -> jax.Array | None:
        """[tokens, channels] that folded keys have beside those of `dequantize_folded`, alike for
        all heads and sequences, so that they need not be stored: functions of the position, of
        which `context.rotary` has the angles. None for none. `fold_queries` returns as many."""
        return None

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes | VectorCodes | None:
        """What a fused kernel reads of a body, leaves [batch, groups, ...], in place of calling
        `dequantize_folded`; None if the payload is not in tiles. `context` has the positions of the
        body's tokens and the model's rotary."""
        return None

    def unfold_output(self, out: jax.Array, context: Context) -> jax.Array:
        """Turns a weighted mean of folded values [..., heads, channels] into one of values
        [..., heads, head_dim]."""
        return out


class Wrapper(Quantizer):
    """A quantizer that encodes with another one, `inner`, and asks of the cache what that asks.

    State and folding are not passed on: a wrapper may have a state of its own, and a map that
    `inner` could fold need not commute with what is done around it. Nor does RoPE: around a
    quantizer that `rotates`, what is done before coding would be undone after a rotation, so that
    `check` refuses one.
    """

    inner: Quantizer

    @property
    def wants_queries(self) -> bool:
        return self.inner.wants_queries

    @property
    def wants_keys(self) -> bool:
        return self.inner.wants_keys

    @property
    def rotates(self) -> bool:
        return self.inner.rotates

    @property
    def group(self) -> int:
        return self.inner.group

    def check(self, heads: int, head_dim: int) -> None:
        if self.inner.rotates:
            raise ValueError(
                f"{type(self).__name__}: expected a quantizer that does not rotate keys itself, as "
                f"it works on keys before RoPE and on what is decoded; got {self.inner}. Where "
                "that is Unrotated, put Unrotated around the whole"
            )
        self.inner.check(heads, head_dim)


def decoded_once(x: jax.Array) -> jax.Array:
    """`x` that a quantizer decoded: on CPUs an array, where XLA would decode an element again for
    each that reads it."""

    def on_cpu(x):
        if jax.__version_info__ >= (0, 11):
            return jax.lax.optimization_barrier(x)
        # Before, what follows a barrier was fused with what precedes it; but not with a scatter.
        return x.at[(0,) * x.ndim].multiply(jnp.ones((), x.dtype), mode="promise_in_bounds")

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x)
