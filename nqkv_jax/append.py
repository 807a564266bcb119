"""How tokens get into one side of a cache: into sinks and residual as they come, and from there
into the body, a chunk at a time.

What is written for one sequence is vmapped over the batch; encoding runs under one loop outside the
vmap, so that a step in which no sequence completes a chunk costs nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import Context, Payload, Quantizer, State
from nqkv_jax.rotary import Rotary
from nqkv_jax.side import Side


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
    x: jax.Array | None,
    keys: tuple[jax.Array, jax.Array | None] | None,
    start: jax.Array | None,
    first: jax.Array,
    last: jax.Array,
) -> tuple[Payload, State]:
    """Encodes body tokens first + [0, count) as far as they are below `last`; one sequence.

    Token i comes from `x` [S, Hkv, D] if it is not older than `start`, else from the residual (all
    do without x); `keys` are residual and x of the other side. Of `side` only what all sequences
    share is used.
    """
    quantizer, group, slots = side.quantizer, side.quantizer.group, side.slots
    token = first + jnp.arange(count)

    def gather(residual, x):
        if x is None:
            return residual[token % slots]
        rows = x[jnp.clip(token - start, 0, x.shape[0] - 1)]
        if not slots:
            return rows
        return jnp.where((token < start)[:, None, None], residual[token % slots], rows)

    rows, positions = gather(residual, x), side.counted(token) + side.num_sinks
    if side.rotates and rotary is not None:
        rows = rotary(rows, positions)
    context = Context(
        positions=positions,
        rotary=rotary,
        state=state,
        keys=None if keys is None else gather(*keys),
    )
    observed = quantizer.observe(rows, context)
    state = jax.tree.map(lambda new, old: jnp.where(first < last, new, old), observed, state)
    if side.window.chunk % group:
        context = Context(
            positions=positions, rotary=rotary, state=state, implementation=side.implementation
        )
        if side.ring:
            return _splice_ring(side, body, rows, first, last, context), state
        return quantizer.splice(body, rows, first, last, context), state
    split = lambda a: a.reshape(count // group, group, *a.shape[1:])
    quantize = lambda r, p: quantizer.quantize(r, Context(positions=p, rotary=rotary, state=state))
    payload = jax.vmap(quantize)(split(rows), split(positions))
    index = first // group + jnp.arange(count // group)
    wanted = index * group < last
    if side.ring:  # of those that have one place, the latest
        wanted &= index * group >= last - side.capacity
        index = index % side.num_groups
    return jax.tree.map(lambda b, p: _write(b, p, index, wanted), body, payload), state


def _splice_ring(
    side: Side, body: Payload, rows: jax.Array, first: jax.Array, last: jax.Array, context: Context
) -> Payload:
    """`Quantizer.splice` of tokens whose places in the body begin anew at its end."""
    capacity, count = side.capacity, rows.shape[0]
    place = first % capacity
    # What is encoded at a time does not straddle the end.
    rounds = 1 if count == side.window.chunk else 1 + -(-count // capacity)
    for i in range(rounds):
        skip = i * capacity - place  # of the tokens, those that come before this round
        begin, end = jnp.maximum(-skip, 0), jnp.clip(last - first - skip, 0, capacity)
        left = functools.partial(jnp.roll, shift=-jnp.maximum(skip, 0), axis=0)
        there = dataclasses.replace(context, positions=left(context.positions))
        body = side.quantizer.splice(body, left(rows), begin, end, there)
    return body


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
      keys: residual [B, slots, Hkv, D] (before these tokens) and x of the key side, likewise.
    """
    wants_queries = side.quantizer.wants_queries
    keys = keys if side.quantizer.wants_keys else None
    num_sinks, window, size = side.num_sinks, side.window, x.shape[1]
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

    return dataclasses.replace(store(side, x, lengths, new_lengths), body=carry[0], state=carry[1])


def store(side: Side, x: jax.Array, lengths: jax.Array, new_lengths: jax.Array) -> Side:
    """Puts the tokens of `append_side` into sinks and residual, those that stay in it."""
    num_sinks, slots, offset = side.num_sinks, side.slots, jnp.arange(x.shape[1])
    if not num_sinks + slots:
        return side

    def one(exact, x, before, after):
        token = before + offset
        slot, stays = token, token < 0  # among the sinks
        if slots:
            slot = jnp.where(stays, token, token % slots)
            stays = stays | (token >= after - slots)
        return _write(exact, x, num_sinks + slot, (token < after) & stays)

    exact = jax.vmap(one)(side.exact, x, lengths - num_sinks, new_lengths - num_sinks)
    return dataclasses.replace(side, exact=exact)


def append_token(
    side: Side,
    x: jax.Array,
    lengths: jax.Array,
    new_lengths: jax.Array,
    *,
    queries: jax.Array | None = None,
) -> Side:
    """Like `append_side` of x [B, 1, Hkv, D], to a side that waits (`Side.waits`) for `flush`."""
    side = store(side, x, lengths, new_lengths)
    if not side.quantizer.wants_queries:
        return side

    def observe(state, queries, fresh):
        observed = side.quantizer.observe_query(queries[0], Context(state=state))
        return jax.tree.map(lambda new, old: jnp.where(fresh, new, old), observed, state)

    state = jax.vmap(observe)(side.state, queries, new_lengths > lengths)
    return dataclasses.replace(side, state=state)


class Waiting(NamedTuple):
    """A side that waits (`Side.waits`), one token after `lengths` i32[B] tokens at the most."""

    side: Side
    lengths: jax.Array
    new_lengths: jax.Array
    rotary: Rotary | None
    keys: jax.Array | None  # residual of the key side, for quantizers that want it


def flush(waiting: Sequence[Waiting]) -> list[Side]:
    """Encodes the chunks that are due. If chunks are of more than a token, nothing is done, under
    one condition, if none is.

    All of the sides have the same window, so that as a rule they are due together.
    """
    spans = [(w.side.encoded(w.lengths), w.side.encoded(w.new_lengths)) for w in waiting]

    # Loops of one round, or none: what they carry stays in place. That the round is 0 XLA does not
    # know: what is the same in every round it would do outside, for every token.
    def encode(i, carry, w, first, last):
        chunk = w.side.window.chunk
        run = functools.partial(_encode, w.side, w.rotary, chunk)
        keys = None if w.keys is None else (w.keys, None)
        begin = first + i * chunk
        body, state = jax.vmap(run)(*carry, w.side.residual, None, keys, None, begin, last)
        # Nor that a state is the same as before.
        return body, jax.lax.optimization_barrier(state)

    # A loop for each, so that they share the memory that encoding takes.
    def encode_all(_, carry):
        each = zip(waiting, carry, spans, due, strict=True)
        one = lambda w, first, last: functools.partial(encode, w=w, first=first, last=last)
        return [jax.lax.fori_loop(0, n, one(w, *span), c) for w, c, span, n in each]

    carry = [(w.side.body, w.side.state) for w in waiting]
    if waiting[0].side.window.chunk == 1:  # due with every token, once the residual is full
        each = zip(carry, waiting, spans, strict=True)
        carry = [encode(0, c, w, *span) for c, w, span in each]
    else:
        due = [jnp.any(last > first).astype(jnp.int32) for first, last in spans]
        carry = jax.lax.fori_loop(0, functools.reduce(jnp.maximum, due), encode_all, carry)
    return [
        dataclasses.replace(w.side, body=body, state=state)
        for w, (body, state) in zip(waiting, carry, strict=True)
    ]
