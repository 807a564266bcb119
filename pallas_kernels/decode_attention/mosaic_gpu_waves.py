"""Waves in the GPU kernel: what cosines and sines of a token's angle add to its scores.

By the addition theorems: queries are turned to where half a tile starts, and meet its 64 places on
the tensor core.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import Waves
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, Plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_products import (
    add_product,
    load_columns,
    store_columns,
)

HALVES = tiles.TOKENS // ROWS  # of a tile


def padded(a: jax.Array, axis: int, plan: Plan) -> jax.Array:
    """With as many rows along an axis as waves have."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = 0, plan.wave_rows - a.shape[axis]
    return jnp.pad(a, pad)


def operands(waves: Waves, plan: Plan) -> list[jax.Array]:
    """Cosines and sines of where halves of tiles start f32[2 * tiles, 2, rows], and of the places
    float16[64, 2 * rows]."""
    halves = jax.tree.map(lambda a: a[None, ::ROWS], waves.places)  # [1, 2, 1, R / 2]
    starts = halves.moved(jax.tree.map(lambda a: a[:, None], waves.starts))
    starts = jnp.stack([starts.cos, starts.sin], axis=2)[:, :, :, 0]
    starts = starts.reshape(-1, *starts.shape[2:])
    places = [padded(a[:ROWS, 0], 1, plan) for a in (waves.places.cos, waves.places.sin)]
    return [padded(starts, 2, plan), jnp.concatenate(places, axis=1).astype(jnp.float16)]


def turn(queries, starts, turned, plan: Plan) -> None:
    """Leaves queries in `turned` float16[*Plan.turned_shape].

    Args:
      queries: what meets cosines and sines, of a head, in global memory, float16[2 * rows, group].
      starts: of a unit, in shared memory, f32[*Plan.starts_shape].
    """
    square = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
    row = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1))
    by_row = lambda x: jax.lax.broadcast_in_dim(x, (ROWS, plan.group), (0,))
    for c in range(0, plan.wave_rows, ROWS):
        rows = pl.ds(c, ROWS)
        cosine, sine = (
            square(queries.at[pl.ds(part * plan.wave_rows + c, ROWS)]).astype(jnp.float32)
            for part in range(2)
        )
        # All before anything is left, which no load would overtake.
        angles = [[row(starts.at[n, part, rows]) for part in range(2)] for n in range(plan.halves)]
        for n, angle in enumerate(angles):
            cos, sin = map(by_row, angle)
            parts = cosine * cos + sine * sin, sine * cos - cosine * sin
            for part, x in enumerate(parts):
                rows = pl.ds(part * plan.wave_rows + c, ROWS)
                columns = turned.at[pl.ds(n * plan.group, plan.group), rows]
                store_columns(columns, x.astype(jnp.float16), 32, plan)


def leave(places, turned, shift, plan: Plan) -> None:
    """Leaves what a unit's tokens get in `shift` f32[*Plan.wave_shape]: of the places, float16[64,
    2 * rows] in global memory, with what `turn` left."""
    # The same for every program: the cache of a multiprocessor has them.
    places = plgpu.load(places, layout=plgpu.Layout.WGMMA, optimized=False)
    product = _by_wgmma if plan.machine.has_wgmma and not plan.interpret else _by_mma
    squares = product(places, turned, plan)
    if plan.group <= 8:  # whose registers suffice
        squares = list(squares)  # before one is left, which no load would overtake
    for n, square in enumerate(squares):
        _leave_half(n, square, shift, plan)


def _by_wgmma(places: jax.Array, turned, plan: Plan) -> list[jax.Array]:
    """f32[64, group] for each half tile. All warps need the same columns: one product of all is
    faster than theirs would be, of which each would load the columns."""

    def run(accumulator):
        plgpu.wgmma(accumulator, places, turned.transpose((1, 0)))
        return accumulator[...]

    found = pl.run_scoped(run, plgpu.ACC((ROWS, turned.shape[0]), jnp.float32))
    return [found[:, n * plan.group : (n + 1) * plan.group] for n in range(plan.halves)]


def _by_mma(places: jax.Array, turned, plan: Plan) -> Iterator[jax.Array]:
    """Likewise, one after the other."""
    none = plgpu.layout_cast(jnp.zeros((ROWS, plan.group), jnp.float32), plgpu.Layout.WGMMA)
    for n in range(plan.halves):
        columns = turned.at[pl.ds(n * plan.group, plan.group)]
        columns = load_columns(columns, 1, 32, plan.interpret)
        yield add_product(none, places, columns, 1, plan.interpret)


def _leave_half(n: int, square: jax.Array, shift, plan: Plan) -> None:
    """f32[64, group], of the tokens of half a tile."""
    tile, half = divmod(n, HALVES)
    fields = ROWS // plan.field
    if plan.interpret:
        rows = pl.ds(tile * plan.field, plan.field)
        shift[pl.ds(half * fields, fields), rows] = square.reshape(fields, plan.field, plan.group)
        return
    # Of which Pallas would store the rows of a field, but not cut them.
    run = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    run(functools.partial(_leave, n=n, plan=plan))(shift, square)


def _leave(context, shift: ir.Value, square: mgpu.FragmentedArray, *, n: int, plan: Plan) -> None:
    number = lambda n: arith.constant(ir.IndexType.get(), n)
    tile, half = divmod(n, HALVES)
    places = square.layout.thread_idxs(square.shape)
    for (place, column), register in zip(places, square.registers.flat, strict=True):
        field = arith.divui(place, number(plan.field))
        field = arith.addi(field, number(half * (ROWS // plan.field)))
        row = arith.addi(arith.remui(place, number(plan.field)), number(tile * plan.field))
        vector.store(register, shift, [field, row, column])


def of_field(shift, k: jax.Array) -> jax.Array:
    """f32 square, for the rows of field k."""
    return plgpu.load(shift.at[k], layout=plgpu.Layout.WGMMA, optimized=False)
