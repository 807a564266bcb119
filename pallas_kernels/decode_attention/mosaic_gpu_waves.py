"""Waves in the GPU kernel: what cosines and sines of a token's angle add to its scores.

By the addition theorems: queries are turned to where half a tile starts, and meet its 64 places on
the tensor core.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import Waves
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, Plan

HALVES = tiles.TOKENS // ROWS  # of a tile


def operands(waves: Waves, q: jax.Array, plan: Plan) -> list[jax.Array]:
    """Of q [B, Hkv, G, R]: its cosines and sines f32[B, Hkv, 2, rows, group], those of where halves
    of tiles start f32[2 * tiles, 2, rows], and those of the places float16[64, 2 * rows]."""
    pad = lambda a, axis: jnp.pad(
        a, [(0, 0)] * axis + [(0, plan.wave_rows - a.shape[axis])] + [(0, 0)] * (a.ndim - axis - 1)
    )
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, plan.group - q.shape[2]), (0, 0)))
    queries = jnp.stack(jnp.split(jnp.swapaxes(q, 2, 3), 2, axis=2), axis=2)
    halves = jax.tree.map(lambda a: a[None, ::ROWS], waves.places)  # [1, 2, 1, R / 2]
    starts = halves.moved(jax.tree.map(lambda a: a[:, None], waves.starts))
    starts = jnp.stack([starts.cos, starts.sin], axis=2)[:, :, :, 0]
    starts = starts.reshape(-1, *starts.shape[2:])
    places = [pad(a[:ROWS, 0], 1) for a in (waves.places.cos, waves.places.sin)]
    return [
        pad(queries, 3),
        pad(starts, 2),
        jnp.concatenate(places, axis=1).astype(jnp.float16),
    ]


def load(queries, starts, tile: jax.Array, plan: Plan) -> list:
    """What `turn` needs for the unit that begins with `tile`, from global memory: for each 64 rows
    the queries' cosines and sines, and for each half tile those of its start.

    Args:  queries: those of a head.
    """
    square = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
    row = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    found = []
    for begin in range(0, plan.wave_rows, ROWS):
        rows = pl.ds(begin, ROWS)
        at = [starts.at[tile * HALVES + n] for n in range(plan.halves)]
        found.append(
            (
                [square(queries.at[part, rows]) for part in range(2)],
                [[row(start.at[part, rows]) for part in range(2)] for start in at],
            )
        )
    return found


def load_places(places) -> jax.Array:
    """The operand of a product, float16[64, 2 * rows]: from global memory, as it is the same for
    every program, and the cache of a multiprocessor has it."""
    return plgpu.load(places, layout=plgpu.Layout.WGMMA, optimized=False)


def turn(loaded: list, turned, plan: Plan) -> None:
    """Leaves queries in `turned` float16[*Plan.turned_shape]."""
    by_row = lambda x: jax.lax.broadcast_in_dim(x, (ROWS, plan.group), (0,))
    for c, ((cosine, sine), starts) in enumerate(loaded):
        for n, start in enumerate(starts):
            cos, sin = map(by_row, start)
            parts = cosine * cos + sine * sin, sine * cos - cosine * sin
            for part, x in enumerate(parts):
                rows = pl.ds(part * plan.wave_rows + c * ROWS, ROWS)
                columns = turned.at[pl.ds(n * plan.group, plan.group), rows]
                columns.transpose((1, 0))[...] = x.astype(jnp.float16)


def product(places: jax.Array, turned, plan: Plan) -> jax.Array:
    """f32: of the operand of `load_places` with the rows that `turn` left."""
    if plan.interpret:  # which has no products with an operand in registers
        return jnp.dot(places, turned[...].T, preferred_element_type=jnp.float32)

    def run(accumulator):
        plgpu.wgmma(accumulator, places, turned.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, turned.shape[0]), jnp.float32))


def leave(product: jax.Array, shift, plan: Plan) -> None:
    """Leaves what a unit's tokens get in `shift` f32[*Plan.wave_shape], of the product f32[64,
    2 * tiles * group] of places with queries."""
    if plan.interpret:
        found = product.reshape(-1, plan.field, plan.tiles, HALVES, plan.group)
        shift[...] = jnp.transpose(found, (3, 0, 2, 1, 4)).reshape(plan.wave_shape)
        return
    kinds = plgpu.RefType(), plgpu.Layout.WGMMA
    plgpu.inline_mgpu(arg_types=kinds)(functools.partial(_leave, plan=plan))(shift, product)


def _leave(context, shift: ir.Value, product: mgpu.FragmentedArray, *, plan: Plan) -> None:
    # Whose columns Pallas would cut, but not put into every other field.
    number = lambda n: arith.constant(ir.IndexType.get(), n)
    square, fields = (ROWS, plan.group), ROWS // plan.field
    cut = np.split(product.registers, plan.halves, axis=1)
    for n, registers in enumerate(cut):
        tile, half = divmod(n, HALVES)
        places = product.layout.thread_idxs(square)
        for (place, column), register in zip(places, registers.flat, strict=True):
            field = arith.addi(arith.divui(place, number(plan.field)), number(half * fields))
            row = arith.addi(arith.remui(place, number(plan.field)), number(tile * plan.field))
            vector.store(register, shift, [field, row, column])


def of_field(shift, k: jax.Array) -> jax.Array:
    """f32 square, for the rows of field k."""
    return plgpu.load(shift.at[k], layout=plgpu.Layout.WGMMA, optimized=False)
