"""Instructions that each thread executes by itself: functions of registers of 32 threads."""

import functools
import operator
import re
import struct

import ml_dtypes
import numpy as np

TYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in (("s", "i"), ("u", "u"), ("b", "u"), ("f", "f"))
    for bits in (16, 32, 64)
}
TYPES["bf16"] = np.dtype(ml_dtypes.bfloat16)


def storage(dtype) -> np.dtype:
    """Of a register that holds the type."""
    return np.dtype(bool) if dtype is bool else np.dtype(f"u{np.dtype(dtype).itemsize}")


def immediate(text: str, dtype) -> np.ndarray:
    """A constant, in the registers of all threads."""
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return np.full(32, struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32)
    if re.fullmatch(r"0d[0-9A-Fa-f]{16}", text):
        return np.full(32, struct.unpack(">d", bytes.fromhex(text[2:]))[0], np.float64)
    number = int(text.rstrip("U"), 0)
    if dtype is bool:
        return np.full(32, number != 0)
    bits = np.dtype(dtype).itemsize * 8
    return np.full(32, number % 2**bits, storage(dtype)).view(dtype)


def _fused(a, b, c):
    """In double precision, and rounded: exact but for cases between two numbers."""
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(a.dtype)


def _fused_down(a, b, c):
    """`fma.rm`, rounded towards minus infinity."""
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    value = wide.astype(a.dtype)
    return np.where(value > wide, np.nextafter(value, a.dtype.type(-np.inf)), value)


def _wide(a, b):
    return a.astype(np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")) * b


def _high(a, b):
    return (_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _shift(by):
    """Of numbers, where shifts of their bits or more are not undefined."""

    def run(a, b):
        bits = 8 * a.dtype.itemsize
        amount = b.astype(np.int64)
        if by is operator.rshift and a.dtype.kind == "i":
            return by(a, np.minimum(amount, bits - 1).astype(a.dtype))
        moved = by(a, np.where(amount < bits, amount, 0).astype(a.dtype))
        return np.where(amount < bits, moved, 0).astype(a.dtype)

    return run


def _funnel(low, high, right):
    """Of numbers of 64 bits, by up to 31 to the right."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both >> (right & 31).astype(np.uint64)).astype(np.uint32)


def _funnel_left(low, high, amount):
    return np.where(amount & 31, _funnel(low, high, 32 - (amount & 31)), high)


def _field(a, first, count):
    """`bfe`, of bits that are there; of numbers with a sign its highest bit is one."""
    if np.any(first + count > 8 * a.dtype.itemsize):
        raise NotImplementedError("bfe of more bits than there are")
    mask = (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
    unsigned = a.view(f"u{a.dtype.itemsize}").astype(np.uint64)
    found = unsigned >> first.astype(np.uint64) & mask
    if a.dtype.kind == "i":
        sign = mask ^ mask >> np.uint64(1)
        found = (found ^ sign) - sign
    return found.astype(a.dtype)


def _permuted(low, high, which):
    """`prmt`: of the eight bytes of two numbers, those that four nibbles say."""
    chosen = which[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    if np.any(chosen > 7):
        raise NotImplementedError("prmt of signs")
    both = np.stack([low, high], axis=1).view(np.uint8)
    return np.take_along_axis(both, chosen.astype(np.int64), axis=1).view(np.uint32)[:, 0]


def _of_all(run):
    """Of two numbers, or three."""
    return lambda *numbers: functools.reduce(run, numbers)


# By the name before the first period; types are those at the end of the opcode.
FUNCTIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fused,
    # Of the machine, which negates operands: see `contract`.
    "fms": lambda a, b, c: _fused(a, b, -c),
    "fnma": lambda a, b, c: _fused(-a, b, c),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": np.invert,
    "neg": operator.neg,
    "min": _of_all(np.fmin),
    "max": _of_all(np.fmax),
    "shl": _shift(operator.lshift),
    "shr": _shift(operator.rshift),
    "shf": _funnel,
    "bfe": _field,
    "prmt": _permuted,
    "ex2": np.exp2,
    "div": operator.truediv,
    "abs": np.abs,
}
_no_number = lambda a, b: np.isnan(a) | np.isnan(b)
COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge,
    # True if one is NaN.
    "neu": operator.ne, "leu": lambda a, b: ~(a > b),
    "nan": _no_number, "num": lambda a, b: ~_no_number(a, b),
}  # fmt: skip
KNOWN = {
    "add": {"ftz", "rn"}, "sub": {"ftz", "rn"}, "fma": {"ftz", "rn", "rm"}, "neg": {"ftz"},
    "fms": {"rn"}, "fnma": {"rn"},
    "mul": {"ftz", "rn", "lo", "wide", "hi"}, "mad": {"lo"}, "min": {"ftz", "NaN"},
    "max": {"ftz", "NaN"}, "shf": {"l", "r", "wrap"}, "ex2": {"approx", "ftz"},
    "div": {"full", "ftz", "rn"}, "abs": {"ftz"},
}  # fmt: skip


def function(name: str, modifiers: list[str]):
    """Of arrays of the operands' type, or None if the name is none of these.

    Raises:
      NotImplementedError: a modifier.
    """
    if name not in FUNCTIONS:
        return None
    if unknown := set(modifiers) - KNOWN.get(name, set()):
        raise NotImplementedError(f"{name} with {sorted(unknown)}")
    if "wide" in modifiers:
        return _wide
    if "hi" in modifiers:
        return _high
    if "rm" in modifiers:
        return _fused_down
    if name == "shf" and "wrap" in modifiers and "l" in modifiers:
        return _funnel_left
    if "NaN" in modifiers:
        return _of_all({"min": np.minimum, "max": np.maximum}[name])
    return FUNCTIONS[name]


def convert(source: np.ndarray, dtype: np.dtype, modifiers: list[str]) -> np.ndarray:
    """`cvt`, of numbers.

    Raises:
      NotImplementedError: a rounding other than to the nearest float, or to an integer.
    """
    modifiers = [m for m in modifiers if m != "ftz"]
    if source.dtype.kind == "f" and dtype.kind in "iu":
        rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        if len(modifiers) == 1 and modifiers[0] in rounded:
            limits = np.iinfo(dtype)
            value = np.nan_to_num(rounded[modifiers[0]](source.astype(np.float64)))
            return np.clip(value, limits.min, limits.max).astype(dtype)
    elif set(modifiers) <= {"rn"}:
        return source.astype(dtype)
    elif modifiers == ["sat"] and source.dtype.kind == dtype.kind == "f":
        return np.clip(np.where(np.isnan(source), 0, source), 0, 1).astype(dtype)
    raise NotImplementedError(f"cvt with {modifiers} from {source.dtype} to {dtype}")
