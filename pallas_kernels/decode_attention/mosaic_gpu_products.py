"""Products of what a GPU has in registers with a few columns: `mma.sync`, warp by warp.

The rows of an operand belong to four warps, 16 of each 64. `wgmma` would have them multiply the
same columns; but where rows have columns of their own (queries with the scales of their tile,
weights of their block), a warp only needs those, and what it multiplies needs neither a descriptor
nor a wait: the compiler puts other work between.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS, WARPS, Plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_words import swizzled

SQUARE = 16  # rows of a warp, and elements that one instruction sums over


@functools.lru_cache
def _columns_layout(group: int, shares: int) -> plgpu.Layout:
    """Of [shares * group, K], of which each warp has the rows of its share: all of those an
    instruction takes, two neighbours of a row in a register."""
    replicated = fragmented_array.Replicated(WARPS // shares)
    warps = {1: (replicated,), WARPS: (-7,)}.get(shares, (-7, replicated))
    layout = mgpu.TiledLayout(
        fragmented_array.Tiling(((shares * group, 8), (group, 8), (8, 8), (2,))),
        warp_dims=warps,
        lane_dims=(-3, -2),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def load_columns(source, shares: int, lanes: int, interpret: bool) -> jax.Array:
    """For `add_product`: float16[shares * group, K] in shared memory, `lanes` side by side."""
    if interpret:
        return source[...]
    rows, depth = source.shape
    layout = _columns_layout(rows // shares, shares)
    load = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(lanes)["transforms"]),),
        return_type=plgpu.ShapeDtypeStruct((rows, depth), jnp.float16, layout=layout),
    )(functools.partial(_load, layout=layout, lanes=lanes))
    return load(source)


def _load(context, source: ir.Value, *, layout, lanes: int) -> mgpu.FragmentedArray:
    def load(n):
        part = utils.memref_slice(source, (slice(None), slice(n, n + 1)))
        return mgpu.FragmentedArray.load_tiled(part, 2 * lanes, layout=layout.to_mgpu())

    # Lanes by lanes: of all at once, neighbours would be in registers far apart, and an instruction
    # takes them side by side.
    parts = [load(n) for n in range(source.type.shape[1])]
    registers = np.concatenate([part.registers for part in parts], axis=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=parts[0].layout, _is_signed=None)


def store_columns(target, rows: jax.Array, lanes: int, plan: Plan) -> None:
    """For `load_columns`: leaves float16[64, group] transposed, `lanes` side by side."""
    if plan.interpret or plan.machine.stores_matrices:
        target.transpose((1, 0))[...] = rows
        return
    run = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(lanes)["transforms"]), plgpu.Layout.WGMMA)
    )
    run(functools.partial(_store, lanes=lanes))(target, rows)


def _store(context, target: ir.Value, rows: mgpu.FragmentedArray, *, lanes: int) -> None:
    # Threads have two neighbours of a row; of 8 rows and columns, a warp turns them at once.
    number, turned = ir.IntegerType.get_signless(32), np.empty(rows.registers.size, object)
    for i, register in enumerate(rows.registers.flat):
        turned[i] = utils.inline_ptx(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
            utils.bitcast(register, number),
            result_types=number,
            convergent=True,
        )
        turned[i] = utils.bitcast(turned[i], register.type)
    layout = mgpu.TiledLayout(
        fragmented_array.Tiling(((8, ROWS), (8, SQUARE), (8, 8), (2,))),
        warp_dims=(-6,),
        lane_dims=(-3, -2),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    registers = turned.reshape(layout.registers_shape(rows.shape[::-1]))
    columns = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
    columns.store_tiled(target, 2 * lanes)


def add_product(
    sums: jax.Array, left: jax.Array, columns: jax.Array, shares: int, interpret: bool
) -> jax.Array:
    """f32[rows, group]: sums + left @ own^T, with float16 left [rows, K].

    Args:
      columns: float16[shares * group, K]; of each 64 rows of `left`, every share has its own.
    """
    if interpret:
        return sums + _of_own(left, columns, shares)
    wgmma = plgpu.Layout.WGMMA  # that of accumulators in general
    product = plgpu.inline_mgpu(
        arg_types=(wgmma, wgmma, _columns_layout(columns.shape[0] // shares, shares)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=wgmma),
    )(_add_product)
    return product(sums, left, columns)


def _of_own(left: jax.Array, columns: jax.Array, shares: int) -> jax.Array:
    cut = left.reshape(-1, shares, ROWS // shares, left.shape[1])
    own = columns.reshape(shares, -1, columns.shape[1])
    found = jnp.einsum("msrk,sgk->msrg", cut, own, preferred_element_type=jnp.float32)
    return found.reshape(left.shape[0], -1)


def _add_product(context, sums, left, columns) -> mgpu.FragmentedArray:
    layouts = mgpu.MMALayouts(left.mlir_dtype)
    (rows, depth), group = left.shape, sums.shape[1]

    def as_layout(registers, shape, layout):
        registers = registers.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    # Registers by tile of 64 rows, 8 columns, and by half of a warp's 16 rows.
    left = left.registers.reshape(rows // ROWS, depth // SQUARE, 2, 2)
    own = columns.registers.reshape(depth // SQUARE, 2, group // 8)
    product = mgpu.mma(
        as_layout(sums.registers, (rows, group), layouts.acc),
        as_layout(left, (rows, depth), layouts.lhs),
        as_layout(np.swapaxes(own, 1, 2), (depth, group), layouts.rhs),
    )
    registers = product.registers.reshape(sums.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)
