"""Words in the registers of a GPU: two of 16 bits share one, and are turned together."""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


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
    (by,), pair = amount.registers.flat, ir.IntegerType.get_signless(32)
    registers = words.registers.copy()
    for i, register in enumerate(registers.flat):
        number = utils.bitcast(register, pair)
        number = llvm.intr_fshr(number, number, by)
        registers.flat[i] = utils.bitcast(number, register.type)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=words.layout, _is_signed=words.is_signed
    )
