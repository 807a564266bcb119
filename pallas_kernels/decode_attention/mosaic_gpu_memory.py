"""The shared memory of a program of the GPU kernel, and the copies into it."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, STAGES, Plan, Side


class Memory(NamedTuple):
    """Buffers of a program; those that arrive with a unit have a slot for each stage ahead."""

    queries: Any  # float16[group, head_dim], or transposed if they wait for scales of channels
    words: tuple[Any, Any]  # of keys and values, int16[STAGES, *Plan.word_shape]
    token_scales: tuple[list, list]  # and zeros, int16[STAGES, *Plan.scale_shape]
    channel_scales: list  # of keys, and zeros, int16[STAGES, *Plan.channel_shape]
    scaled_queries: list  # float16[*Plan.scaled_shape]
    channel_shift: list  # float16[*Plan.shift_shape]
    # Of the waves, as in `mosaic_gpu_waves`.
    turned: list  # float16[*Plan.turned_shape]
    shift: list  # f32[*Plan.wave_shape]
    weights: Any  # float16[*Plan.weight_shape]
    queries_arrived: Any
    unit_arrived: Any  # for each stage

    @classmethod
    def of(cls, scratch) -> "Memory":
        """Of the references to what `memory` asks for."""
        lasting, in_turn = scratch
        return cls(**lasting, **{k: v for group in in_turn for k, v in group.items()})


def memory(plan: Plan) -> tuple[dict, Any]:
    """What a program asks for: fields of `Memory` that last, and groups of them that take turns in
    one place."""
    channels, waves = plan.key.channels, plan.wave_rows > 0
    f32, f16, i16 = jnp.float32, jnp.float16, jnp.int16
    smem = plgpu.SMEM

    def swizzled(lanes):
        tiling, swizzle = plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)
        return dict(transforms=(tiling, swizzle))

    operand, of_channels = swizzled(32), swizzled(min(plan.lanes(plan.key), 32))
    queries = smem((plan.group, plan.head_dim), f16, **of_channels)
    if channels:
        queries = smem((plan.head_dim, plan.group), f16)
    lasting = dict(
        queries=queries,
        words=tuple(
            smem((STAGES, *plan.word_shape(side)), i16, **swizzled(plan.lanes(side)))
            for side in plan.sides
        ),
        token_scales=tuple(
            [smem((STAGES, *plan.scale_shape(side)), i16)] * side.token_arrays
            for side in plan.sides
        ),
        channel_scales=[smem((STAGES, *plan.channel_shape), i16)] * plan.key.channel_arrays,
        shift=[smem(plan.wave_shape, f32)] * waves,
        queries_arrived=plgpu.Barrier(num_arrivals=1),
        unit_arrived=plgpu.Barrier(num_arrivals=_copies(plan), num_barriers=STAGES),
    )
    turned = dict(turned=[smem(plan.turned_shape, f16, **operand)] * waves)
    scaled = dict(
        scaled_queries=[smem(plan.scaled_shape, f16, **of_channels)] * channels,
        channel_shift=[smem(plan.shift_shape, f16, **operand)] * plan.key.shifted,
    )
    weights = dict(weights=smem(plan.weight_shape, f16, **operand))
    in_turn = (turned, scaled, weights) if plan.scaled_by_part else (turned, scaled | weights)
    # An interpreter has no memory that is shared, and no need of it.
    return lasting, plgpu.RefUnion(*in_turn)


def _copies(plan: Plan) -> int:
    """Of a unit, as `fetch` makes them."""
    copies = plan.key.channel_arrays
    for side in plan.sides:
        # The high bits of 3 come twice.
        copies += plan.columns(side) * plan.tiles * (side.pieces if side.planes == 1 else 3)
        copies += side.token_arrays
    return copies


class Source(NamedTuple):
    """Where a unit comes from: arrays in global memory, as the kernel is given them."""

    words: tuple[Any, Any]
    token_scales: tuple[list, list]
    channel_scales: list


def fetch(
    source: Source, memory: Memory, batch: jax.Array, head: jax.Array, tile: jax.Array,
    slot: int | jax.Array, plan: Plan,
) -> None:  # fmt: skip
    """Starts the copies of the unit that begins with `tile`."""
    done = memory.unit_arrived.at[slot]
    copy = lambda a, b: plgpu.copy_gmem_to_smem(a, b, done)
    for side, words, target in zip(plan.sides, source.words, memory.words, strict=True):
        for n, column in itertools.product(range(plan.tiles), range(plan.columns(side))):
            for rows, lanes, to in _word_copies(side, column, plan):
                piece, plane, at = to
                copy(
                    words.at[batch, tile + n, head, rows, lanes],
                    target.at[slot, piece, plane, column, pl.ds(n * plan.field + at, rows.size)],
                )
    for side, arrays, targets in zip(
        plan.sides, source.token_scales, memory.token_scales, strict=True
    ):
        first = jax.lax.div(head, jnp.int32(side.heads)) * side.blocks
        for array, target in zip(arrays, targets, strict=True):
            of_unit = batch, pl.ds(tile, plan.tiles), pl.ds(first, side.blocks)
            copy(array.at[of_unit], target.at[slot])
    for array, target in zip(source.channel_scales, memory.channel_scales, strict=True):
        groups = pl.ds(head * plan.key.groups, plan.key.groups)
        copy(
            array.at[batch, pl.ds(tile, plan.tiles), groups],
            target.at[slot, pl.ds(0, plan.tiles)],
        )


def _word_copies(side: Side, column: int, plan: Plan):
    """Of a column of a tile: (rows, lanes) in memory, and (piece, plane, first row) of where to."""
    width = plan.width(side)
    stored_column, lane = divmod(column * width, plan.stored_width)
    lanes = pl.ds(lane, width)
    low = plan.field * side.pieces  # rows of words with the low bits
    for piece in range(side.pieces):
        yield pl.ds(stored_column * low + piece * plan.field, plan.field), lanes, (piece, 0, 0)
    if side.planes == 2:  # a word has high bits for two rows: twice, so that each has its own
        high = low // 2
        begin = plan.head_dim // plan.stored_width * low + stored_column * high
        for at in (0, high):
            yield pl.ds(begin, high), lanes, (0, 1, at)


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
