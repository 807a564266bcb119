"""Maxima and sums over the rows of a square, of which four warps of a GPU have 16 each.

Pallas has these, too; there every thread leaves what it has of the columns for every other warp,
which is 8 times as much, and meets in the same banks of shared memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import WARPS

COLUMNS = 8  # of a register's tile, two of them in a thread


def max_over_rows(square: jax.Array, exchange, interpret: bool) -> jax.Array:
    """f32[group], of `square` f32[64, group].

    Args:
      exchange: f32[4, group] in shared memory, that all warps have done with: it may be used again
        once they have met after this.
    """
    return _over_rows(square, exchange, interpret, jnp.max, arith.maximumf)


def sum_over_rows(square: jax.Array, exchange, interpret: bool) -> jax.Array:
    """Likewise."""
    return _over_rows(square, exchange, interpret, jnp.sum, arith.addf)


def _over_rows(square, exchange, interpret, reduce, combine):
    if interpret:
        return reduce(square, axis=0)
    layout = plgpu.Layout.WGMMA
    shape = plgpu.ShapeDtypeStruct(square.shape[1:], jnp.float32, layout=layout.reduce(0))
    run = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=shape)
    return run(functools.partial(_exchanged, combine=combine))(square, exchange)


def _exchanged(context, square, exchange, *, combine) -> mgpu.FragmentedArray:
    pair, index = ir.VectorType.get((2,), ir.F32Type.get()), ir.IndexType.get()
    # By tile of columns, and by half of a warp's rows.
    own = [combine(*halves) for halves in square.registers.reshape(-1, 2)]
    for distance in (4, 8, 16):  # threads with other rows
        own = [combine(x, utils.shfl_bfly(x, distance)) for x in own]
    warp, thread = utils.warp_idx(sync=False), utils.thread_idx()
    column = arith.remui(thread, utils.c(4, thread.type))
    column = arith.index_castui(index, arith.muli(column, utils.c(2, thread.type)))
    columns = [arith.addi(column, utils.c(n * COLUMNS, index)) for n in range(len(own))]
    warp = arith.index_castui(index, arith.remui(warp, utils.c(WARPS, warp.type)))
    for x, at in zip(own, columns, strict=True):
        vector.store(x, exchange, [warp, at])
    utils.warpgroup_barrier()
    layout = mgpu.WGMMA_COL_LAYOUT
    found = np.empty(layout.registers_shape(square.shape[1:]), object)
    for n, at in enumerate(columns):
        of_warps = [vector.load(pair, exchange, [utils.c(w, index), at]) for w in range(WARPS)]
        found.flat[n] = functools.reduce(combine, of_warps)
    return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)
