"""What a program of the GPU kernel does: an online softmax over the units of a split."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_channels as channels
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_copies as copies
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_waves as waves
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_exchange import (
    max_over_rows,
    sum_over_rows,
)
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_memory import (
    Memory,
    announce,
    fetch,
    load_rows,
    store,
)
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, Plan, Side
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_products import (
    add_product,
    load_columns,
    store_columns,
)
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_words import (
    load_shared,
    load_words,
    rotate_pairs,
)

# Unseen scores, and the first maximum: exp(UNSEEN - FLOOR) is 0, and nothing is infinite.
UNSEEN, FLOOR = -1e30, -1e29
LOG2_E = math.log2(math.e)
# Weights, scaled as values are, become float16 for products, of about 2^LIFT at most: where one
# token has nearly all of the weight and small values, as first ones have, others keep their bits.
LIFT = 15


class Queries(NamedTuple):
    """Of a column of the keys."""

    operand: jax.Array  # of products with factors, see `load_columns`
    total: jax.Array | None  # f32 square, their sums, if something is added to all levels
    shift: jax.Array | None  # f32 square, what scales of channels add whatever codes are


def program(lengths, first, queries, *refs, plan: Plan, treedef):
    """Attends to the tokens of a split.

    Args:
      lengths, first: int32[B]
      queries: float16, as `Memory.queries`, of every sequence, head and chunk; and in rows that
        follow, what meets waves.
      refs: leaves of a `Source` and of the other operand of waves, outputs, and shared memory.
      treedef: of the former.
    """
    source, places = jax.tree.unflatten(treedef, refs[: treedef.num_leaves])
    *outputs, scratch = refs[treedef.num_leaves :]
    smem = Memory.of(scratch)
    split, head, batch = (jax.lax.axis_index(name) for name in ("split", "head", "batch"))
    unit_tokens = plan.tiles * tiles.TOKENS
    length, oldest = lengths[batch], first[batch]
    div = lambda a, b: jax.lax.div(a, jnp.int32(b))
    begin = div(oldest, unit_tokens)
    units = jnp.maximum(div(length + (unit_tokens - 1), unit_tokens) - begin, 0)
    each = div(units + (plan.splits - 1), plan.splits)
    begin = begin + split * each
    steps = jnp.clip(units - split * each, 0, each)

    def first_tile(unit):
        # The last unit is moved back to fit; what an earlier one has seen is masked out.
        return jnp.clip(unit * plan.tiles, 0, plan.num_tiles - plan.tiles)

    def fetch_step(step, slot):
        @pl.when(step < steps)
        def _():
            tile = first_tile(begin + step)
            fetch(source, smem, batch, div(head, plan.chunks), tile, slot, plan)

        copies.end_group(plan)

    def announce_step(step):
        @pl.when(step < steps)
        def _():
            announce(source, batch, div(head, plan.chunks), first_tile(begin + step), plan)

    lanes = None if plan.key.channels else plan.query_lanes
    own_queries = queries.at[batch, head]
    if plan.wave_rows:
        own_queries = own_queries.at[pl.ds(0, plan.head_dim)]
    copies.start(own_queries, smem.queries, smem.queries_arrived, plan, lanes)
    for slot in range(plan.stages):
        fetch_step(jnp.int32(slot), slot)
    if plan.bulk_copies:  # else they are in the first group
        plgpu.barrier_wait(smem.queries_arrived)

    square = (ROWS, plan.group)
    zeros = lambda *s: plgpu.layout_cast(jnp.zeros(s, jnp.float32), plgpu.Layout.WGMMA)
    by_row = lambda x: jax.lax.broadcast_in_dim(x, square, (0,))
    by_column = lambda x: jax.lax.broadcast_in_dim(x, square, (1,))
    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    row_of_square = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=plgpu.Layout.WGMMA)
    log = plan.field.bit_length() - 1
    token_of_row = lambda row: (row >> log) * tiles.TOKENS + (row & (plan.field - 1))
    float32 = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)

    def per_token(array, slot, block, k):
        """int16[64], bits of float16, of the tokens of field k."""
        bits = array.at[slot, :, block, pl.ds(k * plan.field, plan.field)]
        return load_rows(bits, plan.interpret)

    def shift_unit(slot, places):
        """Leaves what waves add to the scores of a unit."""
        meeting_waves = queries.at[batch, head, pl.ds(plan.head_dim, 2 * plan.wave_rows)]
        waves.turn(meeting_waves, smem.starts[0].at[slot], smem.turned[0], plan)
        copies.commit(plan)
        waves.leave(places, smem.turned[0], smem.shift[0], plan)
        copies.meet(plan)

    def of_own(parts):
        """Each row of the part for its share of the rows."""
        log = (ROWS // len(parts)).bit_length() - 1
        share, own = row_of_square >> log, parts[0]
        for n, part in enumerate(parts[1:], start=1):
            own = jnp.where(share == n, part, own)
        return own

    def full(value, rows, depth=ROWS):
        """An operand."""
        numbers = jnp.full((rows, depth), value, jnp.float16)
        return plgpu.layout_cast(numbers, plgpu.Layout.WGMMA)

    max_rows = functools.partial(max_over_rows, interpret=plan.interpret)
    sum_rows = functools.partial(sum_over_rows, interpret=plan.interpret)
    add = functools.partial(add_product, interpret=plan.interpret)
    load_right = functools.partial(load_columns, interpret=plan.interpret)

    def load_queries(n):
        """`Queries` with the scales of set n, for each column of the keys."""
        width, shares = plan.width(plan.key), plan.key_shares
        queries = smem.scaled_queries[0].at[n] if plan.key.channels else smem.queries
        found = []
        for c in range(plan.columns(plan.key)):
            of_column = queries.at[:, pl.ds(c * width, width)]
            operand = load_right(
                of_column if width < plan.head_dim else queries, shares, plan.query_lanes
            )
            total = shift = None
            if plan.needs_totals:
                total = add(zeros(*square), full(1, ROWS, width), operand, shares)
            if plan.key.shifted and c == 0:
                parts = load_right(smem.channel_shift[0].at[n], shares, 32)
                shift = add(zeros(*square), full(1, ROWS), parts, shares)
            found.append(Queries(operand, total, shift))
        return found

    def scores_of(found, queries, slot, part, n):
        """f32 square, of field n of a part, from the products of its columns with queries."""
        scores, (levels, arrays) = None, (plan.key.levels, smem.token_scales[0])
        per_block, k = plan.columns(plan.key) // plan.key.blocks, part * plan.per_part + n
        # What levels have beyond factors, of which scales of channels have seen to the middle.
        more = 0 if plan.key.channels else levels.ratio
        more = more - levels.centre if levels.even else more
        for b in range(plan.key.blocks):
            columns = slice(b * per_block, (b + 1) * per_block)
            s = functools.reduce(jnp.add, found[columns])
            if levels.even:
                s = s * jnp.float32(levels.unit(n // plan.key.pieces))
            if plan.needs_totals:
                total = functools.reduce(jnp.add, [q.total for q in queries[columns]])
                s = s + total * jnp.float32(more)
            if plan.key.shifted:
                s = s + queries[0].shift
            if not plan.key.channels:
                scale, *zero = (float32(per_token(array, slot, b, k)) for array in arrays)
                s = s * by_row(scale * jnp.float32(levels.slope))
                if plan.key.zero:
                    s = s + total * by_row(*zero)
            scores = s if scores is None else scores + s
        if plan.wave_rows:
            scores = scores + waves.of_field(smem.shift[0], k)
        if plan.soft_cap is not None:
            # tanh, whose approximation would be off by up to 5e-4.
            doubled = jnp.exp(scores * jnp.float32(2 / plan.soft_cap))
            cap = jnp.float32(plan.soft_cap)
            scores = cap - 2 * cap / (doubled + jnp.float32(1))
        return scores

    needs_constant = plan.value.off_centre

    rotate = functools.partial(rotate_pairs, interpret=plan.interpret)
    zero = (length >> 31).astype(jnp.int16)  # see `Levels.factor`

    def load(s, slot, piece, column, part, token_axis, own=slice(None)):
        """Of a side, a column of a unit, or some channels of it, with tokens along an axis: words
        whose part is where levels take it, of even fields and of odd ones if they have 3 bits."""
        side, levels = plan.sides[s], plan.sides[s].levels
        how = dict(token_axis=token_axis, lanes=plan.lanes(side), interpret=plan.interpret)
        low = load_words(smem.words[s].at[slot, piece, column, :, :, own], **how)
        low = rotate(low, part * (plan.per_part * plan.narrow_bits) - levels.first)
        if levels.floats:
            return (levels.widen(low, rotate(low, levels.first - 8), zero),)
        if not side.high:
            return (low,)
        (high,) = smem.high[s]
        high = load_shared(high.at[slot, column, :, :, own], **how)
        third = tiles.high_bit(part * plan.per_part) - levels.first - levels.low_bits
        return levels.merge(low, rotate(high, third), zero)

    def factor(side: Side, words, n):
        """Of field n of a part."""
        field = n // side.pieces
        return side.levels.factor(words[field % len(words)], field, zero, plan.interpret)

    def heaviness(score, arrays):
        """f32 square: the logarithm of the largest weight, scaled as values are, in 2^-10 of 2, and
        2^23 + 15 * 2^10. `arrays` int16[64] for each block.

        The bits of a float16 are 2^10 times its logarithm, less up to 0.09 * 2^10, and those 15;
        below the exponent of 2^23 they are a number.
        """
        float_of = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
        logarithm = lambda a: float_of((a.astype(jnp.int32) & 0x7FFF) | 0x4B000000)
        largest = functools.reduce(jnp.maximum, [logarithm(scale) for scale, *_ in arrays])
        return score * jnp.float32(2**10 * LOG2_E) + by_row(largest)

    def weigh(p, seen, n, arrays, constant):
        """Leaves weights for field n of a part, scaled as values are, block by block; adds what
        does not depend on the codes to the constants. `seen` bool[64], `arrays` int16[64] for each
        block"""
        merged = []
        for b, (c, of_block) in enumerate(zip(constant, arrays, strict=True)):
            # What is stored for unseen tokens may be NaN.
            scale, *zero = (jnp.where(seen, float32(a), jnp.float32(0)) for a in of_block)
            columns = smem.weights.at[n, pl.ds(b * plan.group, plan.group)]
            store_columns(columns, (p * by_row(scale)).astype(jnp.float16), 32, plan)
            if needs_constant:
                # Of the middle of the levels: rounded weights meet the distance from there.
                c = c + p * by_row(plan.value.levels.middle(scale, *zero or [None]))
            merged.append(c)
        return tuple(merged)

    def attend(slot, unit, part, carry):
        """Merges the fields of one part of a unit's words. What is carried is relative to
        2^maximum."""
        if plan.scaled_by_part:
            channels.scale_queries(smem, slot, part, plan)
        numerators, denominator, constant, maximum = carry
        before = jnp.maximum(oldest, unit * unit_tokens)
        shown = jnp.maximum(length - before, 0).astype(jnp.uint32)

        def seen(row, k):
            # One comparison: what comes before is a large number without a sign.
            token = token_of_row(row) + (first_tile(unit) * tiles.TOKENS + k * plan.field - before)
            return token.astype(jnp.uint32) < shown

        of_set = functools.cache(load_queries)  # in turn: all at once are many registers
        queries = lambda n: of_set(n // plan.fields_of_set if plan.key.channels else 0)
        found = [[] for _ in range(plan.per_part)]
        for c, piece in itertools.product(range(plan.columns(plan.key)), range(plan.key.pieces)):
            words = load(0, slot, piece, c, part, 0)
            for n in range(piece, plan.per_part, plan.key.pieces):
                q, left = queries(n)[c], factor(plan.key, words, n)
                found[n].append(add(zeros(*square), left, q.operand, plan.key_shares))
        scores = []
        for n, of_columns in enumerate(found):
            s = scores_of(of_columns, queries(n), slot, part, n)
            seen_here = seen(row_of_square, part * plan.per_part + n)
            scores.append(jnp.where(seen_here, s, jnp.float32(UNSEEN)))
        # Before anything is left in shared memory, which no load would overtake.
        of_tokens = [
            [
                [per_token(a, slot, b, part * plan.per_part + n) for a in smem.token_scales[1]]
                for b in range(plan.value.blocks)
            ]
            for n in range(plan.per_part)
        ]
        heaviest = functools.reduce(jnp.maximum, map(heaviness, scores, of_tokens))
        heaviest = max_rows(heaviest, smem.exchange.at[0]) * jnp.float32(2**-10)
        top = jnp.maximum(maximum, heaviest - jnp.float32(2**13 + 15 + LIFT))
        old = jnp.exp2(maximum - top)
        denominator = denominator * by_column(old)
        if needs_constant:
            constant = tuple(c * by_column(old) for c in constant)
        # All warps met for the maximum: none still reads the weights of the part before.
        for n, s in enumerate(scores):
            p = jnp.exp2(s * jnp.float32(LOG2_E) - by_column(top))
            denominator = denominator + p
            k = part * plan.per_part + n
            constant = weigh(p, seen(rows, k), n, of_tokens[n], constant)
        copies.meet(plan)
        merged = []
        for operand, numerator in zip(plan.operands, numerators, strict=True):
            whole = operand.count == plan.width(plan.value)
            own = slice(None) if whole else pl.ds(operand.first, operand.count)
            blocks = pl.ds(operand.block * plan.group, operand.blocks * plan.group)
            numerator = numerator * jax.lax.broadcast_in_dim(old, numerator.shape, (1,))
            levels, none = plan.value.levels, zeros(*numerator.shape)
            total = none
            for piece in range(plan.value.pieces):
                words = load(1, slot, piece, operand.column, part, 1, own)
                for n in range(piece, plan.per_part, plan.value.pieces):
                    weights = load_right(smem.weights.at[n, blocks], operand.blocks, 32)
                    left = factor(plan.value, words, n)
                    if levels.even:
                        found = add(none, left, weights, operand.blocks)
                        unit = jnp.float32(levels.unit(n // plan.value.pieces))
                        numerator = numerator + found * unit
                        total = add(total, full(1, operand.count), weights, operand.blocks)
                    else:
                        numerator = add(numerator, left, weights, operand.blocks)
            if levels.even:
                numerator = numerator - total * jnp.float32(levels.centre)
            merged.append(numerator)
        if plan.scaled_by_part:  # these reads come before the next part's queries are written
            copies.meet(plan)
        return tuple(merged), denominator, constant, top

    def step(i, carry):
        slot = jax.lax.rem(i, jnp.int32(plan.stages))
        copies.wait(smem.arrived(slot), plan)
        if plan.stages == 1 and not plan.interpret:
            announce_step(i + 1)  # which has no room before this one is done with
        if plan.wave_rows:
            shift_unit(slot, *places)
        if plan.key.channels and not plan.scaled_by_part:  # for all parts
            channels.scale_queries(smem, slot, 0, plan)
        # A loop, not copies: the compiler would compute all factors of a word at once, and they
        # do not fit into the registers.
        one = lambda part, carry: attend(slot, begin + i, part, carry)
        carry = jax.lax.fori_loop(0, plan.parts, one, carry)
        copies.commit(plan)  # all have read what is copied over now
        fetch_step(i + plan.stages, slot)
        return carry

    floor = plgpu.layout_cast(
        jnp.full((plan.group,), FLOOR, jnp.float32), plgpu.Layout.WGMMA.reduce(0)
    )
    numerators = tuple(zeros(operand.count, plan.group) for operand in plan.operands)
    constant = tuple(zeros(*square) for _ in range(plan.value.blocks))
    start = (numerators, zeros(*square), constant, floor)
    numerators, denominator, constant, maximum = jax.lax.fori_loop(0, steps, step, start)
    # From registers: shared memory for these would cost a program.
    # Two places in turn: by the time one is used again, all warps have met and have read it.
    sums = [*constant, denominator] if needs_constant else [denominator]
    *totals, denominator = [sum_rows(x, smem.exchange.at[n % 2]) for n, x in enumerate(sums)]
    numerator_gmem, denominator_gmem, maximum_gmem = (a.at[batch, head, split] for a in outputs)
    for operand, numerator in zip(plan.operands, numerators, strict=True):
        numerator = numerator * jnp.float32(plan.value.levels.slope)
        if needs_constant:
            own = totals[operand.block : operand.block + operand.blocks]
            own = [jax.lax.broadcast_in_dim(total, numerator.shape, (1,)) for total in own]
            numerator = numerator + (own[0] if len(own) == 1 else of_own(own))
        channel = pl.ds(operand.column * plan.width(plan.value) + operand.first, operand.count)
        whole = operand.count == plan.head_dim
        store(numerator_gmem if whole else numerator_gmem.at[channel], numerator)
    store(denominator_gmem, denominator)
    store(maximum_gmem, maximum * jnp.float32(1 / LOG2_E))
