"""Scales and zeros of the keys' channels in the GPU kernel: they meet the queries, not the keys.

Of a group of tokens, sum_c q_c (scale_c level_c + zero_c). Queries are multiplied by the scales of
each group, and what does not depend on the codes is added by a product of its own, with ones for
keys: as that leaves it in every row, nothing has to be summed over warps.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_copies as copies
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_memory import Memory
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, Plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_products import store_columns


def scale_queries(smem: Memory, slot: jax.Array, part: jax.Array | int, plan: Plan) -> None:
    """Leaves queries, and what is constant, for the fields of a part of the unit in a slot."""
    square = (ROWS, plan.group)
    starts = plan.squares(plan.head_dim)
    rows = [pl.ds(start, ROWS) for start in starts]
    queries = [plgpu.load(smem.queries.at[r], layout=plgpu.Layout.WGMMA) for r in rows]
    by_row = lambda x: jax.lax.broadcast_in_dim(x, square, (0,))

    def of_channels(array, tile, group, rows):
        bits = array.at[slot, tile, group, rows][...]
        return jax.lax.bitcast_convert_type(bits, jnp.float16)

    found = []
    for n, segment in itertools.product(range(plan.sets), range(plan.segments)):
        tile, place = divmod(segment * (ROWS // plan.segments), plan.field)
        field = part * plan.per_part + n * plan.fields_of_set
        token = jnp.asarray(field * plan.field + place, jnp.int32)
        group = jax.lax.div(token, jnp.int32(plan.group_tokens))
        of_rows = [[of_channels(a, tile, group, r) for a in smem.channel_scales] for r in rows]
        found.append((n, segment, of_rows))
    # Only then anything is left, which no load would overtake.
    for n, segment, of_rows in found:
        columns, constant = pl.ds(segment * plan.group, plan.group), None
        for c, (q, (scale, *zero)) in enumerate(zip(queries, of_rows, strict=True)):
            target = smem.scaled_queries[0].at[n, columns, rows[c]]
            # Multiplied two numbers at a time.
            store_columns(target, q * by_row(scale), plan.query_lanes, plan)
            if not plan.key.shifted:
                continue
            q, scale, *zero = (a.astype(jnp.float32) for a in (q, scale, *zero))
            q = q * jnp.float32(1 / plan.key.levels.slope)  # as queries were
            # Of the middle of the levels: rounded queries meet the distance from there.
            middle = plan.key.levels.middle(scale, *zero or [None])
            if starts[c] < c * ROWS:  # some were there before
                row = plgpu.broadcasted_iota(
                    jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
                )
                middle = jnp.where(row >= c * ROWS - starts[c], middle, jnp.float32(0))
            shift = q * by_row(middle)
            constant = shift if constant is None else constant + shift
        if constant is not None:
            target = smem.channel_shift[0].at[n, columns]
            store_columns(target, constant.astype(jnp.float16), 32, plan)
    copies.meet(plan)
