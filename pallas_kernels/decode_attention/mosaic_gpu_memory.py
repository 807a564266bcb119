"""The shared memory of a program of the GPU kernel, and the copies into it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_copies as copies
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, Plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_words import swizzled


class Memory(NamedTuple):
    """Buffers of a program; those that arrive with a unit have a slot for each stage ahead."""

    queries: Any  # float16[group, head_dim], or transposed if they wait for scales of channels
    words: tuple[Any, Any]  # of keys and values, int16[stages, *Plan.word_shape]
    high: tuple[list, list]  # of 3 bits, int16[stages, *Plan.high_shape]
    token_scales: tuple[list, list]  # and zeros, int16[stages, *Plan.scale_shape]
    channel_scales: list  # of keys, and zeros, int16[stages, *Plan.channel_shape]
    scaled_queries: list  # float16[*Plan.scaled_shape]
    channel_shift: list  # float16[*Plan.shift_shape]
    # Of the waves, as in `mosaic_gpu_waves`.
    starts: list  # f32[stages, *Plan.starts_shape]
    turned: list  # float16[*Plan.turned_shape]
    shift: list  # f32[*Plan.wave_shape]
    weights: Any  # float16[*Plan.weight_shape]
    exchange: Any  # f32[*Plan.exchange_shape]
    # Barriers, if copies are bulk, else None.
    queries_arrived: Any
    unit_arrived: Any  # for each stage

    @classmethod
    def of(cls, scratch) -> "Memory":
        """Of the references to what `memory` asks for."""
        lasting, in_turn = scratch
        return cls(**lasting, **{k: v for group in in_turn for k, v in group.items()})

    def arrived(self, slot: int | jax.Array):
        """The barrier of the unit in a slot, or None."""
        return None if self.unit_arrived is None else self.unit_arrived.at[slot]


def memory(plan: Plan) -> tuple[dict, Any]:
    """What a program asks for: fields of `Memory` that last, and groups of them that take turns in
    one place."""
    channels, waves = plan.key.channels, plan.wave_rows > 0
    f32, f16, i16 = jnp.float32, jnp.float16, jnp.int16
    smem = plgpu.SMEM

    operand, of_channels = swizzled(32), swizzled(plan.query_lanes)
    queries = smem((plan.group, plan.head_dim), f16, **of_channels)
    if channels:
        queries = smem((plan.head_dim, plan.group), f16)
    lasting = dict(
        queries=queries,
        words=tuple(
            smem((plan.stages, *plan.word_shape(side)), i16, **swizzled(plan.lanes(side)))
            for side in plan.sides
        ),
        high=tuple(
            [smem((plan.stages, *plan.high_shape(side)), i16, **swizzled(plan.lanes(side)))]
            * side.high
            for side in plan.sides
        ),
        token_scales=tuple(
            [smem((plan.stages, *plan.scale_shape(side)), i16)] * side.token_arrays
            for side in plan.sides
        ),
        channel_scales=[smem((plan.stages, *plan.channel_shape), i16)] * plan.key.channel_arrays,
        starts=[smem((plan.stages, *plan.starts_shape), f32)] * waves,
        shift=[smem(plan.wave_shape, f32)] * waves,
        exchange=smem(plan.exchange_shape, f32),
        queries_arrived=None,
        unit_arrived=None,
    )
    if plan.bulk_copies:
        lasting["queries_arrived"] = plgpu.Barrier(num_arrivals=1)
        lasting["unit_arrived"] = plgpu.Barrier(
            num_arrivals=_copies(plan), num_barriers=plan.stages
        )
    turned = dict(turned=[smem(plan.turned_shape, f16, **operand)] * waves)
    scaled = dict(
        scaled_queries=[smem(plan.scaled_shape, f16, **of_channels)] * channels,
        channel_shift=[smem(plan.shift_shape, f16, **operand)] * plan.key.shifted,
    )
    weights = dict(weights=smem(plan.weight_shape, f16, **operand))
    in_turn = (turned, scaled, weights) if plan.scaled_by_part else (turned, scaled | weights)
    return lasting, plgpu.RefUnion(*in_turn)


def _copies(plan: Plan) -> int:
    """Of a unit, as `fetch` makes them."""
    copies = plan.key.channel_arrays + (plan.wave_rows > 0)
    for side in plan.sides:
        copies += plan.columns(side) * (side.pieces + side.high)
        copies += side.token_arrays
    return copies


class Source(NamedTuple):
    """Where a unit comes from: arrays in global memory, as the kernel is given them."""

    words: tuple[Any, Any]  # int16[batch * tiles, heads * rows, channels]: a copy has five axes
    token_scales: tuple[list, list]
    channel_scales: list
    starts: list


def fetch(
    source: Source, smem: Memory, batch: jax.Array, head: jax.Array, tile: jax.Array,
    slot: int | jax.Array, plan: Plan,
) -> None:  # fmt: skip
    """Starts the copies of the unit that begins with `tile`."""
    copy = functools.partial(copies.start, arrived=smem.arrived(slot), plan=plan)
    for s, side in enumerate(plan.sides):
        unit = source.words[s].at[pl.ds(batch * side.num_tiles + tile, plan.tiles)]
        first_row = head * plan.stored_rows(side)
        for column in range(plan.columns(side)):
            stored_column, lane = divmod(column * plan.width(side), plan.stored_width)
            lanes, count = pl.ds(lane, plan.width(side)), plan.field
            for piece in range(side.pieces):
                row = first_row + (stored_column * side.pieces + piece) * count
                there = smem.words[s].at[slot, piece, column]
                copy(unit.at[:, pl.ds(row, count), lanes], there, lanes=plan.lanes(side))
            for high in smem.high[s]:
                count = count * side.pieces // 2
                row = first_row + plan.low_rows(side) + stored_column * count
                there = high.at[slot, column]
                copy(unit.at[:, pl.ds(row, count), lanes], there, lanes=plan.lanes(side))
    for side, arrays, targets in zip(
        plan.sides, source.token_scales, smem.token_scales, strict=True
    ):
        first = jax.lax.div(head, jnp.int32(side.heads)) * side.blocks
        for array, target in zip(arrays, targets, strict=True):
            of_unit = batch, pl.ds(tile, plan.tiles), pl.ds(first, side.blocks)
            copy(array.at[of_unit], target.at[slot])
    for array, target in zip(source.channel_scales, smem.channel_scales, strict=True):
        groups = pl.ds(head * plan.key.groups, plan.key.groups)
        copy(
            array.at[batch, pl.ds(tile, plan.tiles), groups],
            target.at[slot, pl.ds(0, plan.tiles)],
        )
    for starts, target in zip(source.starts, smem.starts, strict=True):
        first = tile * (plan.halves // plan.tiles)
        copy(starts.at[pl.ds(first, plan.halves)], target.at[slot])


def announce(
    source: Source, batch: jax.Array, head: jax.Array, tile: jax.Array, plan: Plan
) -> None:
    """Has the unit that begins with `tile` brought into the L2 cache, from where `fetch` is faster.

    Not the starts of waves: they are the same for all programs, and there already.
    """
    of_unit = lambda side: pl.ds(batch * side.num_tiles + tile, plan.tiles)
    arrays = []
    for side, words in zip(plan.sides, source.words, strict=True):
        count = plan.stored_rows(side)
        arrays.append(words.at[of_unit(side), pl.ds(head * count, count)])
    for side, of_tokens in zip(plan.sides, source.token_scales, strict=True):
        first = jax.lax.div(head, jnp.int32(side.heads)) * side.blocks
        of_head = batch, pl.ds(tile, plan.tiles), pl.ds(first, side.blocks)
        arrays += [array.at[of_head] for array in of_tokens]
    groups = pl.ds(head * plan.key.groups, plan.key.groups)
    of_head = batch, pl.ds(tile, plan.tiles), groups
    arrays += [array.at[of_head] for array in source.channel_scales]
    for array in arrays:
        copies.prefetch(array, plan)


def load_rows(bits, interpret: bool) -> jax.Array:
    """int16[64], of the rows of an operand, from `bits` int16[tiles, 64 / tiles] in shared memory:
    also where that is not contiguous, for which Pallas has no load."""
    if interpret:
        return bits[...].reshape(ROWS)
    row = plgpu.Layout.WGMMA.reduce(1)
    load = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.int16, layout=row),
    )(_load_rows)
    return load(bits)


def _load_rows(context, bits: ir.Value) -> mgpu.FragmentedArray:
    layout, (_, field) = mgpu.WGMMA_ROW_LAYOUT, ir.MemRefType(bits.type).shape
    number = ir.VectorType.get((1,), ir.MemRefType(bits.type).element_type)
    registers = np.empty(layout.registers_shape((ROWS,)), object)
    size = arith.constant(ir.IndexType.get(), field)
    for i, (row,) in enumerate(layout.thread_idxs((ROWS,))):
        found = memref.load(bits, [arith.divui(row, size), arith.remui(row, size)])
        registers.flat[i] = vector.broadcast(number, found)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def store(target, x: jax.Array) -> None:
    """To global memory, also where that is less than a cache line for each warp."""
    if jax.__version_info__ < (0, 12):
        target[...] = x
    else:
        plgpu.store(target, x, optimized=False)
