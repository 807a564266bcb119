"""Attention of one query per sequence over sinks and residual, in one launch, by Triton.

XLA takes one for each of: scores, their maximum, exponentials, values without what is unseen, and
their product. Here one program has a KV head of a sequence.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nqkv_jax.pallas_kernels.triton_backend import capped, missing, pltriton

# The platforms of `jax.lax.platform_dependent` on which `attend` takes it, if it is asked to
# (`triton_backend.ASKING`).
PLATFORMS = {"cuda"}
ELEMENTS = 8192  # of keys at a time, at most: with as many of values, and the next, 64 KiB
COLUMNS = 16  # of a tensor core's operand, at least: queries are padded to them
# Unseen scores, and the first maximum: exp(UNSEEN - FLOOR) is 0, and nothing is infinite.
UNSEEN, FLOOR = -1e30, -1e29


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Which token a slot of `exact_attention` has.

    Attributes:
      num_sinks: slots that have the first tokens, in order.
      ring: slots that follow; of n tokens that follow each other the first is in that of its number
        (after the sinks) modulo `ring`.
      window: tokens that are seen, the query's own included; None for all.
    """

    num_sinks: int
    ring: int
    window: int | None = None

    def seen(self, slot: jax.Array, first, length, query) -> jax.Array:
        """bool: whether the token in `slot` i32[...] is there and seen by a query; see
        `exact_attention` for the numbers of a sequence, of shapes that broadcast."""
        place = slot - self.num_sinks
        ahead = place - first
        ahead = jax.lax.rem(ahead, jnp.full_like(ahead, max(self.ring, 1)))
        ahead = jnp.where(ahead < 0, ahead + self.ring, ahead)
        position = jnp.where(place < 0, slot, first + ahead + self.num_sinks)
        seen = (slot < self.num_sinks + self.ring) & (position < length) & (position <= query)
        return seen if self.window is None else seen & (query - position < self.window)


def unsupported(q: jax.Array, keys: jax.Array) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if reason := missing():
        return reason
    if q.shape[-1] not in (64, 128, 256):
        return f"head_dim 64, 128 or 256; got {q.shape[-1]}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != q.dtype:
        return f"bfloat16 or float16; got queries of {q.dtype} and keys of {keys.dtype}"
    return None


def exact_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    length: jax.Array,
    query: jax.Array,
    slots: Slots,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention over the slots that hold what a query sees.

    Args:
      q: [batch, Hkv, G, head_dim], rotated and scaled.
      keys, values: [batch, slots, Hkv, head_dim] in the dtype of q. What is not seen may be NaN.
      first: i32[batch], the first token of the ring, counted from the first after the sinks.
      length: i32[batch], tokens that are there, sinks included.
      query: i32[batch], positions of the queries.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None for no cap.

    Returns: as `decode_attention`: numerator, denominator and maximum.
    """
    batch, heads, group, head_dim = q.shape
    whole = pl.BlockSpec()
    shape = lambda *s: jax.ShapeDtypeStruct((batch, heads, group, *s), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, slots=slots, soft_cap=soft_cap),
        grid=(heads, batch),
        in_specs=[whole] * 6,
        out_specs=[whole] * 3,
        out_shape=[shape(head_dim), shape(), shape()],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="exact_attention",
    )(first, length, query, q, keys, values)


def _kernel(
    first, length, query, q_ref, keys, values, *outputs, slots: Slots, soft_cap: float | None
):
    h, b = (pl.program_id(axis) for axis in range(2))
    numbers = first[b], length[b], query[b]
    group, head_dim = q_ref.shape[2:]
    columns, count = max(COLUMNS, pl.next_power_of_2(group)), keys.shape[1]
    iota = lambda n: jax.lax.broadcasted_iota(jnp.int32, (n,), 0)
    tokens = min(64, ELEMENTS // head_dim)  # at a time
    square, every = (tokens, columns), pl.ds(0, head_dim)
    # Rows beyond the queries repeat the last one.
    row = jnp.minimum(iota(columns), group - 1)
    q = q_ref[b, h, row, every]
    by_column = lambda x: jnp.broadcast_to(x[None, :], square)

    def step(i, carry):
        total, denominator, maximum = carry
        slot = i * tokens + iota(tokens)
        seen = slots.seen(slot, *numbers)
        at = jnp.minimum(slot, count - 1)
        s = pltriton.dot(keys[b, at, h, every], q, trans_b=True)
        s = capped(s, soft_cap)
        s = jnp.where(jnp.broadcast_to(seen[:, None], square), s, jnp.float32(UNSEEN))
        top = jnp.maximum(maximum, jnp.max(s, axis=0))
        old, p = jnp.exp(maximum - top), jnp.exp(s - by_column(top))
        v = values[b, at, h, every]
        v = jnp.where(jnp.broadcast_to(seen[:, None], v.shape), v, jnp.zeros_like(v))
        total = total * jnp.broadcast_to(old[:, None], total.shape)
        total = total + pltriton.dot(p.astype(v.dtype), v, trans_a=True)
        return total, denominator * old + jnp.sum(p, axis=0), top

    nothing = jnp.zeros(columns, jnp.float32)
    start = jnp.zeros((columns, head_dim), jnp.float32), nothing, nothing + jnp.float32(FLOOR)
    total, denominator, maximum = jax.lax.fori_loop(0, -(-count // tokens), step, start)
    maximum = jnp.where(denominator == 0, -jnp.inf, maximum)
    outputs[0][b, h, row, every] = total
    outputs[1][b, h, row], outputs[2][b, h, row] = denominator, maximum
