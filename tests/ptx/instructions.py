"""What each instruction makes of the registers of a warp."""

import numpy as np

from . import arithmetic, copies, matrices
from .arithmetic import TYPES
from .program import Instruction, Program
from .warp import LANE, of_all

# Two numbers of a register, by the ending of the opcode.
PAIRS = {"f16x2": np.dtype(np.float16), "f32x2": np.dtype(np.float32)}


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
    elif dtype in PAIRS:
        kinds = [PAIRS[dtype]] * len(sources)
    else:
        kinds = [TYPES[dtype]] * len(sources)
        if name in ("shl", "shr", "bfe"):
            kinds[1:] = [TYPES["u32"]] * (len(sources) - 1)

    def execute(warp, active):
        values = [warp.read(s, kind) for s, kind in zip(sources, kinds, strict=True)]
        warp.write(target, _stored(run(*values), kinds[0], name, modifiers), active)

    return execute


def _stored(value, kind, name, modifiers):
    if value.size == 64:
        return np.ascontiguousarray(value.astype(kind)).view(f"u{2 * kind.itemsize}")
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
        if to in ("f16x2", "bf16x2"):
            if modifiers != ["rn"]:
                raise NotImplementedError(opcode)
            half = TYPES[to.removesuffix("x2")]
            pair = np.stack([v.astype(half) for v in reversed(values)], axis=1)
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
    _, _, name, *modifiers, kind = opcode.split(".")
    # Without NaN in its name, of what is a number (of floats, which Blackwell has).
    reductions = {("min",): np.fmin, ("max",): np.fmax, ("max", "NaN"): np.maximum}
    if (name, *modifiers) not in reductions:
        raise NotImplementedError(opcode)
    target, source, _ = operands
    reduction, dtype = reductions[name, *modifiers].reduce, TYPES[kind]

    def execute(warp, active):
        value = reduction(warp.read(source, dtype))
        warp.write(target, np.full(32, value, dtype), active)

    return of_all(execute)


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
            loaded = np.ascontiguousarray(column).view(dtype)[:, 0]
            if targets[n].startswith("%rd"):  # extended, to a register's width
                loaded = loaded.astype(f"{dtype.kind}8")
            warp.write(targets[n], loaded, active)

    return execute


def _st(opcode, operands, program):
    address, source = operands
    dtype = TYPES[opcode.split(".")[-1]]
    sources = source if isinstance(source, tuple) else (source,)

    def execute(warp, active):
        where = warp.addresses(address)[active]
        # Of a register that is wider, what is lowest.
        lowest = [warp.read(s, dtype).reshape(32, -1)[:, 0] for s in sources]
        values = np.stack(lowest, axis=1)[active]
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(where), -1)
        warp.block.store(where, data, warp.number)

    return execute


def _bar(opcode, operands, program):
    if opcode != "bar.sync":
        raise NotImplementedError(opcode)

    def execute(warp, active):
        number = int(warp.read(operands[0], np.uint32)[0])
        threads = int(warp.read(operands[1], np.uint32)[0]) if len(operands) > 1 else None
        warp.block.meet(warp, number, threads)

    return of_all(execute)


def _nothing(opcode, operands, program):
    """Of the caches, or of the kernels before."""
    return lambda warp, active: None


# What is not a function of the registers of each thread.
SPECIAL = (
    {
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
        "bar": _bar,
        "prefetch": _nothing,
        "griddepcontrol": _nothing,
        "redux": _redux,
    }
    | matrices.SPECIAL
    | copies.SPECIAL
)
