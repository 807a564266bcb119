"""Copies from global into shared memory that are under way while a program computes.

From Hopper on they are bulk copies, which a barrier counts. Before, all threads copy 16 bytes at a
time (`cp.async`), and wait for groups of such copies. Pallas has these only for two axes.
"""

import functools
import math
from typing import NamedTuple

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import THREADS, Plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_words import swizzled

CHUNK = 16  # bytes that a thread copies at a time
LINE = 128  # bytes of the L2 cache that arrive together


def start(source, target, arrived, plan: Plan, lanes: int | None = None) -> None:
    """Starts the copy of a slice of global memory, of which `arrived` tells if copies are bulk.

    Args:
      lanes: side by side in `target`, if that is swizzled.
    """
    if plan.bulk_copies:
        plgpu.copy_gmem_to_smem(source, target, arrived)
        return
    transforms = () if lanes is None else swizzled(lanes)["transforms"]
    run = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms)))
    run(functools.partial(_start, lanes=lanes))(source, target)


def prefetch(source, plan: Plan) -> None:
    """Asks for a slice of global memory, whose second and later axes are contiguous, to be brought
    into the L2 cache."""
    if plan.bulk_copies:
        plgpu.async_prefetch(source)
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_prefetch)(source)


def end_group(plan: Plan) -> None:
    """What was started until now is a group, empty or not. Bulk copies have barriers instead."""
    if plan.bulk_copies:
        return

    def end(context):
        nvvm.cp_async_commit_group()

    plgpu.inline_mgpu()(end)()


def wait(arrived, plan: Plan) -> None:
    """Until a unit is there: the oldest group of as many as units have room, for all threads."""
    if plan.bulk_copies:
        plgpu.barrier_wait(arrived)
        return

    def wait_for_all(context):
        nvvm.cp_async_wait_group(plan.stages - 1)
        utils.warpgroup_barrier()

    plgpu.inline_mgpu()(wait_for_all)()


def meet(plan: Plan) -> None:
    """Waits until all warps are here: what each has written to shared memory can be loaded then."""
    if plan.interpret:
        plgpu.commit_smem()
    else:
        plgpu.inline_mgpu()(lambda context: utils.warpgroup_barrier())()


def commit(plan: Plan) -> None:
    """Likewise; also for bulk copies to where it was loaded from, and for `wgmma`."""
    if plan.bulk_copies:
        plgpu.commit_smem()
    else:
        meet(plan)


def _prefetch(context, source: ir.Value) -> None:
    kind, origin = ir.MemRefType(source.type), _address(source, 1)
    (count, *inner), item = kind.shape, kind.element_type.width // 8
    strides, _ = kind.get_strides_and_offset()
    if strides[1:] != utils.get_contiguous_strides(inner):
        raise ValueError(f"expected contiguous axes, but for the first; got {kind}")
    lines = -(-math.prod(inner) * item // LINE)  # of each of the first axis
    for line, inside in _numbers(count * lines):
        outer = arith.muli(arith.divui(line, _number(lines)), _number(strides[0] * item))
        place = arith.muli(arith.remui(line, _number(lines)), _number(LINE))
        place = arith.extui(origin.type, arith.addi(outer, place))
        utils.inline_ptx("prefetch.global.L2 [$0];", arith.addi(origin, place), predicate=inside)


def _numbers(count: int):
    """Below `count`, each for one thread; and whether there is one for it, if not for all."""
    thread = arith.andi(utils.thread_idx(), _number(THREADS - 1))  # which it is: see `_places`
    for first in range(0, count, THREADS):
        number, inside = arith.addi(thread, _number(first)), None
        if first + THREADS > count:
            inside = arith.cmpi(arith.CmpIPredicate.ult, number, _number(count))
        yield number, inside


class _Axis(NamedTuple):
    """Of the chunks of a slice; strides in bytes, in global and in shared memory."""

    size: int
    source: int
    target: int


def _start(context, source: ir.Value, target: ir.Value, *, lanes: int | None) -> None:
    axes = _axes(ir.MemRefType(source.type), lanes)
    origin, there = _address(source, 1), _address(target, 3)
    for chunk, inside in _numbers(math.prod(axis.size for axis in axes)):
        found, to = _places(chunk, axes, lanes)
        utils.inline_ptx(
            f"cp.async.cg.shared.global [$0], [$1], {CHUNK};",
            arith.addi(there, to),
            arith.addi(origin, arith.extui(origin.type, found)),
            predicate=inside,
        )


def _axes(source: ir.MemRefType, lanes: int | None) -> list[_Axis]:
    """From the fastest to the slowest, of a slice that goes to shared memory as it is, or in tiles
    of 8 rows and `lanes` columns."""
    *lead, rows, columns = source.shape
    *strides, row, one = source.get_strides_and_offset()[0]
    item = source.element_type.width // 8
    if one != 1 or columns * item % CHUNK:
        raise ValueError(f"expected rows of whole chunks of {CHUNK} bytes; got {source}")
    lanes_here = columns if lanes is None else lanes
    chunks, tile = lanes_here * item // CHUNK, 1 if lanes is None else 8
    axes = [_Axis(chunks, CHUNK, CHUNK)]
    size = lambda: math.prod(axis.size for axis in axes) * CHUNK
    axes.append(_Axis(tile, row * item, size()))
    beside = _Axis(columns // lanes_here, lanes_here * item, size())
    axes.append(_Axis(rows // tile, tile * row * item, columns * item * tile))
    for count, stride in zip(reversed(lead), reversed(strides), strict=True):
        axes.append(_Axis(count, stride * item, axes[-1].target * axes[-1].size))
    # Last: often no power of 2, and nothing has to be divided by the size of the last.
    return [axis for axis in (*axes, beside) if axis.size > 1]


def _places(chunk: ir.Value, axes: list[_Axis], lanes: int | None) -> tuple[ir.Value, ir.Value]:
    """Where a chunk is, and goes to, in bytes. Most sizes are powers of 2, and a thread's number is
    known to be small: of all this the compiler leaves a few shifts."""
    source = target = _number(0)
    for n, axis in enumerate(axes):
        size = _number(axis.size)
        at = chunk if n == len(axes) - 1 else arith.remui(chunk, size)
        chunk = arith.divui(chunk, size)
        source = arith.addi(source, arith.muli(at, _number(axis.source)))
        target = arith.addi(target, arith.muli(at, _number(axis.target)))
    if lanes is not None:  # the number of a chunk is combined with that of its line of 128 bytes
        line = arith.shrui(target, _number(7))
        line = arith.andi(line, _number(2 * lanes // CHUNK - 1))
        target = arith.xori(target, arith.shli(line, _number(4)))
    return source, target


def _number(n: int) -> ir.Value:
    return utils.c(n, ir.IntegerType.get_signless(32))


def _address(slice_: ir.Value, space: int) -> ir.Value:
    """Where it begins, in global (1) or shared (3) memory."""
    pointer, wanted = utils.memref_ptr(slice_), llvm.PointerType.get(space)
    if pointer.type != wanted:
        pointer = llvm.addrspacecast(wanted, pointer)
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if space == 3 else 64), pointer)
