"""Instructions of a whole warp that load, store and multiply matrices."""

import re

import numpy as np

from . import tensor_core
from .arithmetic import TYPES
from .warp import of_all


def _ldmatrix(opcode, operands, program):
    targets, address = operands
    targets = targets if isinstance(targets, tuple) else (targets,)

    def execute(warp, active):
        rows = warp.addresses(address)
        transposed = ".trans" in opcode
        fragments = tensor_core.load_matrices(warp.block.shared, rows, len(targets), transposed)
        for name, value in zip(targets, fragments, strict=True):
            warp.write(name, value, active)

    return of_all(execute)


def _stmatrix(opcode, operands, program):
    address, sources = operands
    sources = sources if isinstance(sources, tuple) else (sources,)

    def execute(warp, active):
        rows, fragments = warp.addresses(address), warp.vector(sources)
        transposed = ".trans" in opcode
        tensor_core.store_matrices(warp.block.shared, rows, fragments, transposed, warp.number)

    return of_all(execute)


def _movmatrix(opcode, operands, program):
    if opcode != "movmatrix.sync.aligned.m8n8.trans.b16":
        raise NotImplementedError(opcode)
    target, source = operands

    def execute(warp, active):
        warp.write(target, tensor_core.transposed(warp.read(source, np.uint32)), active)

    return of_all(execute)


def _wgmma(opcode, operands, program):
    if ".fence." in opcode:
        return of_all(lambda warp, active: None)
    if ".commit_group." in opcode:
        return of_all(lambda warp, active: None)
    if ".wait_group." in opcode:
        if operands != ("0",):
            raise NotImplementedError(f"{opcode} {operands}")
        return of_all(lambda warp, active: warp.finish_products())
    shape, *types = opcode.split(".")[4:]
    rows, columns, depth = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())
    targets, left, descriptor, accumulate, *rest = operands
    in_registers = isinstance(left, tuple)
    known = (["f32", "f16", "f16"], ["f32", "bf16", "bf16"])
    if (rows, depth) != (64, 16) or types not in known or len(targets) != columns // 2:
        raise NotImplementedError(opcode)
    # Signs of the operands, and which are transposed: those in shared memory may be.
    if rest != ["1", "1", "0", "0"][: 3 + (not in_registers)]:
        raise NotImplementedError(f"{opcode} with {rest}")
    kind, used = TYPES[types[1]], (*targets, *(left if in_registers else ()))

    def execute(warp, active):
        for name in targets:  # which may hold nothing yet: NaN, if it is added to
            if name not in warp.registers:
                warp.write(name, np.full(32, 0xFFFFFFFF, np.uint32), active)
        for name in used:
            warp.under_way.setdefault(name, warp.registers[name])
        numbers = [
            None if isinstance(name, tuple) else int(warp.read(name, np.uint64)[0])
            for name in (left, descriptor)
        ]

        def product():
            for name in used:
                if warp.registers[name] is not warp.under_way[name]:
                    raise RuntimeError(f"{name} was written before a product was waited for")
            shared = warp.block.shared
            if in_registers:
                a = tensor_core.left_operand(warp.vector(left), kind)
            else:
                a = tensor_core.shared_operand(shared, numbers[0], rows, kind)
                a = a[16 * (warp.number % 4) :][:16]
            b = tensor_core.shared_operand(shared, numbers[1], columns, kind)
            sums = None
            if warp.read(accumulate, bool).all():
                sums = tensor_core.from_accumulator(warp.vector(targets).view(np.float32))
            registers = tensor_core.accumulator(tensor_core.multiply_add(a, b, sums))
            for name, value in zip(targets, registers, strict=True):
                warp.write(name, value, active)
                warp.under_way[name] = warp.registers[name]

        warp.start_product(product)

    return of_all(execute)


def _mma(opcode, operands, program):
    """`mma.sync`: the product of operands in registers."""
    found = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32", opcode
    )
    if not found:
        raise NotImplementedError(opcode)
    targets, left, right, sums = operands
    kind = TYPES[found[1]]

    def execute(warp, active):
        a = tensor_core.left_operand(warp.vector(left), kind)
        b = tensor_core.right_fragments(warp.vector(right), kind)
        before = tensor_core.from_accumulator(warp.vector(sums).view(np.float32))
        registers = tensor_core.accumulator(tensor_core.multiply_add(a, b.T, before))
        for name, value in zip(targets, registers, strict=True):
            warp.write(name, value, active)

    return of_all(execute)


SPECIAL = {
    "ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "movmatrix": _movmatrix, "wgmma": _wgmma,
    "mma": _mma,
}  # fmt: skip
