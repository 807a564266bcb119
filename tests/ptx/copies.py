"""Copies into shared memory, and what waits for them."""

import re

import numpy as np

from .memory import Barrier
from .warp import ALL, of_all


def _fence(opcode, operands, program):
    if opcode.startswith("fence.proxy.async"):
        return lambda warp, active: warp.block.shared.fence(warp.number)
    if opcode.startswith("fence.mbarrier_init"):
        return lambda warp, active: None
    raise NotImplementedError(opcode)


def _mbarrier(opcode, operands, program):
    if ".try_wait.parity." in opcode:
        target, address, parity, *_ = operands

        def execute(warp, active):
            barrier = warp.block.barriers[int(warp.addresses(address)[0])]
            number = int(warp.read(parity, np.uint32)[0])
            waits = lambda: not barrier.passed(number)
            warp.blocked = waits if waits() else None
            warp.write(target, ALL, active)

        return of_all(execute)
    if ".init." in opcode:
        address, count = operands

        def execute(warp, active):
            for lane in np.flatnonzero(active):
                arrivals = int(warp.read(count, np.uint32)[lane])
                warp.block.barriers[int(warp.addresses(address)[lane])] = Barrier(arrivals)

        return execute
    if ".arrive.expect_tx." in opcode:
        _, address, size = operands

        def execute(warp, active):
            for lane in np.flatnonzero(active):
                barrier = warp.block.barriers[int(warp.addresses(address)[lane])]
                barrier.arrive(1, int(warp.read(size, np.uint32)[lane]))

        return execute
    raise NotImplementedError(opcode)


def _cp(opcode, operands, program):
    if opcode.startswith("cp.async.bulk.prefetch."):
        return _prefetch(opcode, operands, program)
    if opcode.startswith("cp.async.bulk."):
        return _copy_of_tensor(opcode, operands)
    if opcode == "cp.async.commit_group":
        return lambda warp, active: warp.commit_copies()
    if opcode == "cp.async.wait_group":
        return of_all(lambda warp, active: warp.finish_copies(int(operands[0])))
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", opcode) or len(operands) not in (3, 4):
        raise NotImplementedError(opcode)
    target, source, whole, *condition = operands
    whole, condition = int(whole, 0), condition[0] if condition else None

    def execute(warp, active):
        # A predicate under which the source is ignored, or the bytes that are taken from it. Else
        # there are zeros.
        if condition is None:
            ignored = np.zeros(32, bool)
        elif condition.startswith("%p"):
            ignored = warp.read(condition, bool)
        else:
            count = warp.read(condition, np.uint32)
            if not np.isin(count[active], [0, whole]).all():
                raise NotImplementedError(f"{opcode} of some of the bytes")
            ignored = count == 0
        taken = active & ~ignored
        to, origin = warp.addresses(target), warp.addresses(source)
        data = np.zeros((32, whole), np.uint8)
        if taken.any():
            data[taken] = warp.block.memory_of(origin[taken]).load(origin[taken], whole)
        store = lambda data: warp.block.store(to[active], data[active], warp.number)
        if warp.block.schedule.late:
            store(np.full_like(data, 0xFF))  # until somebody waits
            warp.copies[-1].append(lambda: store(data))
        else:
            store(data)

    return execute


def _copy_of_tensor(opcode, operands):
    if not re.fullmatch(
        r"cp\.async\.bulk\.tensor\.\dd\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes",
        opcode,
    ):
        raise NotImplementedError(opcode)
    target, source, barrier = operands

    def execute(warp, active):
        for lane in np.flatnonzero(active):
            tensor = int(warp.read(source.base, np.uint64)[lane]) + source.offset
            coordinates = [int(warp.read(c, np.int32)[lane]) for c in source.coordinates]
            to = int(warp.addresses(target)[lane])
            warp.block.copy(tensor, coordinates, to, int(warp.addresses(barrier)[lane]))

    return execute


def _prefetch(opcode, operands, program):
    """On which nothing but time depends; but only of what is there."""
    if opcode != "prefetch.global.L2":  # of boxes, and of what describes them
        return lambda warp, active: None

    def execute(warp, active):
        for address in map(int, warp.addresses(operands[0])[active]):
            warp.block.memory.find(address, address + 1)

    return execute


SPECIAL = {"prefetch": _prefetch, "fence": _fence, "mbarrier": _mbarrier, "cp": _cp}
