"""Words in the registers of a GPU: two of 16 bits share one, and are turned together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS


def swizzled(lanes: int) -> dict:
    """Options of a buffer in shared memory that the tensor core reads, of 2 bytes and so many lanes
    side by side."""
    tiling, swizzle = plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)
    return dict(transforms=(tiling, swizzle))


def rotate_pairs(words: jax.Array, amount: jax.Array | int, interpret: bool) -> jax.Array:
    """int16 words [64 * m, 8 * n], of which neighbours in a row are rotated as one number of 32
    bits, by `amount` to the right (i32[], modulo 32).

    Bits thus cross from one word to the other: the caller masks what is not its own. The GPU has no
    shift of two words at a time, and the compiler would make six instructions of one.
    """
    amount = jnp.asarray(amount, jnp.int32) & 31
    if interpret:
        pairs = words.reshape(*words.shape[:-1], -1, 2)
        pairs = jax.lax.bitcast_convert_type(pairs, jnp.uint32)
        amount = amount.astype(jnp.uint32)
        pairs = (pairs >> amount) | (pairs << ((32 - amount) & 31))
        return jax.lax.bitcast_convert_type(pairs, jnp.int16).reshape(words.shape)
    amount = jnp.full(words.shape, amount, jnp.int32)
    layout = plgpu.Layout.WGMMA
    rotate = plgpu.inline_mgpu(
        arg_types=(layout, plgpu.Layout.WG_SPLAT(words.shape)),
        return_type=plgpu.ShapeDtypeStruct(words.shape, jnp.int16, layout=layout),
    )(_rotate)
    return rotate(words, amount)


def _rotate(context, words: mgpu.FragmentedArray, amount: mgpu.FragmentedArray):
    (by,) = amount.registers.flat
    return mgpu.FragmentedArray(
        _registers=_rotated(words.registers, by),
        _layout=words.layout,
        _is_signed=words.is_signed,
    )


def _rotated(registers: np.ndarray, by: ir.Value) -> np.ndarray:
    pair, found = ir.IntegerType.get_signless(32), np.empty_like(registers)
    for i, register in enumerate(registers.flat):
        number = utils.bitcast(register, pair)
        found.flat[i] = utils.bitcast(llvm.intr_fshr(number, number, by), register.type)
    return found


def load_words(words, token_axis: int, lanes: int, interpret: bool) -> jax.Array:
    """An operand: int16 [64, n], or [n, 64] if tokens are axis 1, of `words` [tiles, 64 / tiles, n]
    in shared memory, with `lanes` side by side. Rows are two axes, which arrive in one copy."""
    if interpret:
        return _folded_array(words[...], token_axis)
    n = words.shape[2]
    load = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(lanes)["transforms"]),),
        return_type=plgpu.ShapeDtypeStruct(
            (n, ROWS) if token_axis else (ROWS, n), jnp.int16, layout=plgpu.Layout.WGMMA
        ),
    )(functools.partial(_load, token_axis=token_axis, lanes=lanes))
    return load(words)


def _folded_array(words: jax.Array, token_axis: int) -> jax.Array:
    found = words.reshape(-1, words.shape[2])
    return found.T if token_axis else found


def _load(context, words: ir.Value, *, token_axis: int, lanes: int, layout=mgpu.WGMMA_LAYOUT):
    rows = utils.memref_fold(words, 0, 2)  # of tiles, in eights
    rows = utils.memref_transpose(rows, (1, 0, 3, 2)) if token_axis else rows
    return mgpu.FragmentedArray.load_tiled(rows, 2 * lanes, is_signed=True, layout=layout)


def load_shared(words, token_axis: int, lanes: int, interpret: bool) -> jax.Array:
    """The same of words that two tokens share, 8 apart: of [tiles, 32 / tiles, n]. The lower byte
    is the token's own.

    A row of the operand and the one 8 below it are in the same thread: a word is loaded once, and
    turned for the second.
    """
    if interpret:
        found = _folded_array(words[...], 0)
        own = jnp.stack([x.reshape(-1, 8, x.shape[1]) for x in (found, _swapped(found))], axis=1)
        own = own.reshape(ROWS, -1)
        return own.T if token_axis else own
    n, layout = words.shape[2], plgpu.Layout.WGMMA
    shape = (n, ROWS) if token_axis else (ROWS, n)
    double = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(lanes)["transforms"]),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int16, layout=layout),
    )(functools.partial(_of_columns if token_axis else _of_rows, lanes=lanes))
    return double(words)


def _swapped(words: jax.Array) -> jax.Array:
    """With the upper byte below."""
    words = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return jax.lax.bitcast_convert_type(words << 8 | words >> 8, jnp.int16)


def _of_rows(context, words: ir.Value, *, lanes: int):
    # As of 64 rows, whose layout has two groups of 8 for each warp.
    eight = fragmented_array.Tiling(((32, 8), (8, 8), (2,)))
    layout = mgpu.TiledLayout(eight, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    loaded = _load(context, words, token_axis=0, lanes=lanes, layout=layout)
    return _doubled(loaded.registers.reshape(-1), (ROWS, loaded.shape[1]))


def _of_columns(context, words: ir.Value, *, lanes: int):
    loaded = _load(context, words, token_axis=1, lanes=lanes)
    rows, columns = loaded.shape
    registers = loaded.registers.reshape(rows // ROWS, columns // 8, 2)
    return _doubled(registers, (rows, ROWS), axis=2)


def _doubled(registers: np.ndarray, shape: tuple[int, int], axis: int = -1):
    layout = mgpu.WGMMA_LAYOUT
    by = utils.c(8, ir.IntegerType.get_signless(32))
    both = np.stack([registers, _rotated(registers, by)], axis=axis)
    both = both.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=both, _layout=layout, _is_signed=True)
