"""Levels that are looked up in the registers of a GPU, in tables of bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


def look_up(words: jax.Array, at: int, levels: tuple[float, ...], interpret: bool) -> jax.Array:
    """float16 `levels`, 8 or 16 of them, of the codes that begin at bit `at` of int16 words
    [64 * m, 8 * n].

    An instruction (`prmt`) takes four bytes of eight, by as many indices of 4 bits. Two registers
    have four codes: with 16 levels they are indices into both halves of the lower bytes of levels
    and of the upper ones, and their highest bits say which half. That is 14 or 15 instructions on
    four codes, 9 or 10 with 8 levels.
    """
    if interpret:
        codes = (words >> at) & (len(levels) - 1)
        select = lambda found, n: jnp.where(codes == n, jnp.float16(levels[n]), found)
        start = jnp.full(words.shape, levels[0], jnp.float16)
        return functools.reduce(select, range(1, len(levels)), start)
    layout = plgpu.Layout.WGMMA
    run = plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(words.shape, jnp.float16, layout=layout),
    )(functools.partial(_look_up, at=at, levels=levels))
    return run(words)


def _look_up(context, words: mgpu.FragmentedArray, *, at: int, levels: tuple[float, ...]):
    of_both = _tables(levels)
    number, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F16Type.get())
    registers = [utils.bitcast(register, number) for register in words.registers.flat]
    found = np.empty_like(words.registers)
    for i in range(0, len(registers), 2):
        # A nibble of every byte: of the one register, and above it of the other.
        codes = _select(0x00F0_00F0, _shifted(registers[i + 1], at - 4), _shifted(registers[i], at))
        codes = _bytes(codes, codes, _constant(0x2020))
        index = arith.andi(codes, _constant(0x7777))
        halves = arith.shrui(codes, _constant(1))
        halves = arith.ori(arith.andi(halves, _constant(0x4444)), _constant(0x3210))
        planes = []
        for table in of_both:
            of_halves = [_bytes(*table[n : n + 2], index) for n in range(0, len(table), 2)]
            planes.append(_bytes(*of_halves, halves) if len(of_halves) > 1 else of_halves[0])
        for n, order in enumerate((0x6240, 0x7351)):
            found.flat[i + n] = utils.bitcast(_bytes(*planes, _constant(order)), pair)
    return mgpu.FragmentedArray(_registers=found, _layout=words.layout, _is_signed=None)


def _tables(levels: tuple[float, ...]) -> list[list[ir.Value]]:
    """The lower bytes of float16 levels and the upper ones, four in a number."""
    planes = np.asarray(levels, np.float16).view(np.uint8).reshape(-1, 2).T
    return [[_constant(n) for n in np.ascontiguousarray(p).view(np.uint32)] for p in planes]


def _constant(bits: int) -> ir.Value:
    signed = int(np.uint32(bits).view(np.int32))
    return utils.c(signed, ir.IntegerType.get_signless(32))


def _shifted(number: ir.Value, right: int) -> ir.Value:
    if right == 0:
        return number
    return (arith.shrui if right > 0 else arith.shli)(number, _constant(abs(right)))


def _select(mask: int, there: ir.Value, elsewhere: ir.Value) -> ir.Value:
    """Bits of `there` where `mask` has ones: one operation on three numbers."""
    return arith.ori(
        arith.andi(there, _constant(mask)), arith.andi(elsewhere, _constant(mask ^ 0xFFFF_FFFF))
    )


def _bytes(low: ir.Value, high: ir.Value, which: ir.Value) -> ir.Value:
    """Of the eight bytes of two numbers, the four that the nibbles of `which` say."""
    return utils.inline_ptx(
        "prmt.b32 $0, $1, $2, $3;", low, high, which, result_types=ir.IntegerType.get_signless(32)
    )
