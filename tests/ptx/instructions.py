"""What each instruction makes of the registers of a warp."""

import re

import numpy as np

from . import arithmetic, tensor_core
from .arithmetic import TYPES
from .memory import Barrier
from .program import Instruction, Program
from .warp import ALL, LANE


def compile_instruction(instruction: Instruction, program: Program):
    """The function of a warp and its active threads that executes it.

    Raises:
      NotImplementedError: an instruction, or a form of one, that is not known here.
    """
    name, *rest = instruction.opcode.split(".")
    operands = instruction.operands
    if name in SPECIAL:
        return SPECIAL[name](instruction.opcode, operands, program)
    dtype, modifiers = rest[-1], rest[:-1]
    run = arithmetic.function(name, modifiers)
    if run is None:
        raise NotImplementedError(str(instruction))
    target, *sources = operands
    if dtype == "pred":
        kinds = [bool] * len(sources)
    elif dtype == "f16x2":
        kinds = [np.dtype(np.float16)] * len(sources)
    else:
        kinds = [TYPES[dtype]] * len(sources)
        if name in ("shl", "shr", "bfe"):
            kinds[1:] = [TYPES["u32"]] * (len(sources) - 1)

    def execute(warp, active):
        values = [warp.read(s, kind) for s, kind in zip(sources, kinds, strict=True)]
        warp.write(target, _stored(run(*values), kinds[0], name, modifiers), active)

    return execute


def _stored(value, kind, name, modifiers):
    if kind == np.float16 and value.size == 64:
        return np.ascontiguousarray(value.astype(np.float16)).view(np.uint32)
    if "wide" in modifiers or value.dtype == bool:
        return value
    return value.astype(kind, copy=False)


def _mov(opcode, operands, program):
    target, source = operands
    if isinstance(source, tuple):  # two halves
        half = TYPES[f"u{int(opcode[-2:]) // 2}"]
        whole = TYPES[f"u{opcode[-2:]}"]

        def execute(warp, active):
            pair = np.stack([warp.read(s, half) for s in source], axis=1)
            warp.write(target, np.ascontiguousarray(pair).view(whole)[:, 0], active)

    elif isinstance(target, tuple):
        half, whole = TYPES[f"u{int(opcode[-2:]) // 2}"], TYPES[f"u{opcode[-2:]}"]

        def execute(warp, active):
            pair = np.ascontiguousarray(warp.read(source, whole)).view(half).reshape(32, 2)
            for n, name in enumerate(target):
                warp.write(name, np.ascontiguousarray(pair[:, n]), active)

    else:
        kind = bool if opcode == "mov.pred" else TYPES[opcode.split(".")[1]]

        def execute(warp, active):
            warp.write(target, warp.read(source, kind), active)

    return execute


def _cvta(opcode, operands, program):
    target, source = operands
    return lambda warp, active: warp.write(target, warp.read(source, np.uint64), active)


def _cvt(opcode, operands, program):
    _, *modifiers, to, source_type = opcode.split(".")
    target, *sources = operands
    kind = TYPES[source_type]

    def execute(warp, active):
        values = [warp.read(s, kind) for s in sources]
        if to == "f16x2":
            if modifiers != ["rn"]:
                raise NotImplementedError(opcode)
            pair = np.stack([v.astype(np.float16) for v in reversed(values)], axis=1)
            value = np.ascontiguousarray(pair).view(np.uint32)[:, 0]
        else:
            value = arithmetic.convert(values[0], TYPES[to], modifiers)
        warp.write(target, value, active)

    return execute


def _setp(opcode, operands, program):
    _, comparison, *combined, kind = opcode.split(".")
    combined = [m for m in combined if m != "ftz"]
    target, a, b, *others = operands
    if comparison not in arithmetic.COMPARISONS:
        raise NotImplementedError(opcode)
    run, dtype = arithmetic.COMPARISONS[comparison], TYPES[kind]
    combine = arithmetic.FUNCTIONS[combined[0]] if combined else None

    def execute(warp, active):
        value = run(warp.read(a, dtype), warp.read(b, dtype))
        if combine:
            value = combine(value, warp.read(others[0], bool))
        warp.write(target, value, active)

    return execute


def _selp(opcode, operands, program):
    target, a, b, predicate = operands
    dtype = TYPES[opcode.split(".")[1]]

    def execute(warp, active):
        choice = warp.read(predicate, bool)
        warp.write(target, np.where(choice, warp.read(a, dtype), warp.read(b, dtype)), active)

    return execute


def _bra(opcode, operands, program):
    target = program.labels[operands[0]]

    def execute(warp, active):
        warp.places[active] = target

    return execute


def _ret(opcode, operands, program):
    def execute(warp, active):
        warp.alive = warp.alive & ~active

    return execute


def _elect(opcode, operands, program):
    (lane, predicate), _ = operands

    def execute(warp, active):
        first = int(np.argmax(active))
        warp.write(lane, np.full(32, first, np.uint32), active)
        warp.write(predicate, first == LANE, active)

    return execute


def _shfl(opcode, operands, program):
    _, _, mode, _ = opcode.split(".")
    target, source, other, _, _ = operands
    if mode not in ("idx", "bfly"):
        raise NotImplementedError(opcode)

    def execute(warp, active):
        other_lane = warp.read(other, np.uint32).astype(np.int64)
        if mode == "bfly":
            other_lane = LANE ^ other_lane
        if not active[other_lane[active]].all():
            raise RuntimeError("a value of a thread that does not take part")
        warp.write(target, warp.read(source, np.uint32)[other_lane], active)

    return execute


def _redux(opcode, operands, program):
    if not opcode.startswith("redux.sync.min."):
        raise NotImplementedError(opcode)
    target, source, _ = operands
    dtype = TYPES[opcode.split(".")[-1]]

    def execute(warp, active):
        value = warp.read(source, dtype).min()
        warp.write(target, np.full(32, value, dtype), active)

    return _of_all(execute)


def _ld(opcode, operands, program):
    parts = opcode.split("::")[0].split(".")
    target, address = operands
    dtype = TYPES[opcode.split(".")[-1]]
    targets = target if isinstance(target, tuple) else (target,)

    def execute(warp, active):
        if parts[1] == "param":
            value = warp.block.parameter(address.base, address.offset, dtype.itemsize)
            warp.write(targets[0], np.full(32, value.view(dtype)[0]), active)
            return
        where = warp.addresses(address)[active]
        memory = warp.block.memory_of(where)
        data = np.zeros((32, len(targets) * dtype.itemsize), np.uint8)
        data[active] = memory.load(where, data.shape[1])
        for n, column in enumerate(np.split(data, len(targets), axis=1)):
            warp.write(targets[n], np.ascontiguousarray(column).view(dtype)[:, 0], active)

    return execute


def _st(opcode, operands, program):
    address, source = operands
    dtype = TYPES[opcode.split(".")[-1]]
    sources = source if isinstance(source, tuple) else (source,)

    def execute(warp, active):
        where = warp.addresses(address)[active]
        values = np.stack([warp.read(s, dtype) for s in sources], axis=1)[active]
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(where), -1)
        warp.block.store(where, data, warp.number)

    return execute


def _ldmatrix(opcode, operands, program):
    targets, address = operands
    targets = targets if isinstance(targets, tuple) else (targets,)

    def execute(warp, active):
        rows = warp.addresses(address)
        transposed = ".trans" in opcode
        fragments = tensor_core.load_matrices(warp.block.shared, rows, len(targets), transposed)
        for name, value in zip(targets, fragments, strict=True):
            warp.write(name, value, active)

    return _of_all(execute)


def _stmatrix(opcode, operands, program):
    address, sources = operands
    sources = sources if isinstance(sources, tuple) else (sources,)

    def execute(warp, active):
        rows, fragments = warp.addresses(address), warp.vector(sources)
        transposed = ".trans" in opcode
        tensor_core.store_matrices(warp.block.shared, rows, fragments, transposed, warp.number)

    return _of_all(execute)


def _of_all(execute):
    """An instruction that all threads of a warp take part in."""

    def checked(warp, active):
        if not active.all():
            raise RuntimeError("threads of a warp are missing")
        execute(warp, active)

    return checked


def _wgmma(opcode, operands, program):
    if ".fence." in opcode:
        return _of_all(lambda warp, active: None)
    if ".commit_group." in opcode:
        return _of_all(lambda warp, active: None)
    if ".wait_group." in opcode:
        if operands != ("0",):
            raise NotImplementedError(f"{opcode} {operands}")
        return _of_all(lambda warp, active: warp.finish_products())
    shape, *types = opcode.split(".")[4:]
    rows, columns, depth = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())
    if (rows, depth, types) != (64, 16, ["f32", "f16", "f16"]) or not isinstance(
        operands[1], tuple
    ):
        raise NotImplementedError(opcode)
    targets, left, descriptor, accumulate, *signs, transposed = operands
    if signs != ["1", "1"] or len(targets) != columns // 2:
        raise NotImplementedError(f"{opcode} with {signs}")

    def execute(warp, active):
        for name in (*targets, *left):
            warp.under_way.setdefault(name, warp.registers[name])

        def product():
            for name in (*targets, *left):
                if warp.registers[name] is not warp.under_way[name]:
                    raise RuntimeError(f"{name} was written before a product was waited for")
            a = tensor_core.left_operand(warp.vector(left)).astype(np.float64)
            number = int(warp.read(descriptor, np.uint64)[0])
            b = tensor_core.right_operand(warp.block.shared, number, columns, transposed == "1")
            result = a @ b.T.astype(np.float64)
            if warp.read(accumulate, bool).all():
                sums = warp.vector(targets).view(np.float32)
                result = result + tensor_core.from_accumulator(sums)
            registers = tensor_core.accumulator(result.astype(np.float32))
            for name, value in zip(targets, registers, strict=True):
                warp.write(name, value, active)
                warp.under_way[name] = warp.registers[name]

        warp.start_product(product)

    return _of_all(execute)


def _bar(opcode, operands, program):
    if opcode != "bar.sync":
        raise NotImplementedError(opcode)

    def execute(warp, active):
        number = int(warp.read(operands[0], np.uint32)[0])
        threads = int(warp.read(operands[1], np.uint32)[0]) if len(operands) > 1 else None
        warp.block.meet(warp, number, threads)

    return _of_all(execute)


def _fence(opcode, operands, program):
    if opcode.startswith("fence.proxy.async"):
        return lambda warp, active: warp.block.shared.fence(warp.number)
    if opcode.startswith("fence.mbarrier_init"):
        return lambda warp, active: None
    raise NotImplementedError(opcode)


def _nothing(opcode, operands, program):
    """Of the caches, or of the kernels before."""
    return lambda warp, active: None


def _mbarrier(opcode, operands, program):
    if ".try_wait.parity." in opcode:
        target, address, parity, *_ = operands

        def execute(warp, active):
            barrier = warp.block.barriers[int(warp.addresses(address)[0])]
            number = int(warp.read(parity, np.uint32)[0])
            waits = lambda: not barrier.passed(number)
            warp.blocked = waits if waits() else None
            warp.write(target, ALL, active)

        return _of_all(execute)
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


# What is not a function of the registers of each thread.
SPECIAL = {
    "mov": _mov,
    "cvta": _cvta,
    "cvt": _cvt,
    "setp": _setp,
    "selp": _selp,
    "bra": _bra,
    "ret": _ret,
    "elect": _elect,
    "shfl": _shfl,
    "ld": _ld,
    "st": _st,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "wgmma": _wgmma,
    "bar": _bar,
    "fence": _fence,
    "prefetch": _nothing,
    "griddepcontrol": _nothing,
    "redux": _redux,
    "mbarrier": _mbarrier,
    "cp": _cp,
}
