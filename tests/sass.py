"""What a multiprocessor of a GPU would take for the loop of a kernel: a model, not a measurement.

The assembler says more than instructions: for each, how many cycles its warp waits after it, and
which of six counters it waits for, where that is not known beforehand. A scheduler takes one
instruction in a cycle from the warps that may go on; pipes are taken for as long as 32 threads
need; memory delivers bytes at its bandwidth. What is not in the instructions is assumed below, and
was not measured here: throughputs as the CUDA C++ programming guide has them for the compute
capability, latencies and the rate of `mma.sync` on Hopper after microbenchmarks of others (arXiv
2402.13499).
"""

import collections
import dataclasses
import functools
import math
import re
import statistics
from typing import NamedTuple

UNITS = 12  # that a warp does
MEMORY_LATENCY = 900  # cycles, of a copy beside others
L2_LATENCY, L2_BYTES = 450, 24  # of a copy from there, and of a multiprocessor's share in a cycle
READ = 8  # cycles until an instruction has read its operands
# Cycles of a barrier for four warps that arrive together. Programs fall into step, or do not, by a
# few cycles more or less, and take up to 15 % longer in step: the median of these is taken.
MEETINGS = 15, 25, 35
TENSOR_LATENCY = 20  # cycles of `wgmma` beyond its throughput
AHEAD = {"memory": 4, "tensor": 2, "special": 2, "uniform": 1}  # instructions that pipes take early

# Pipe, cycles in it, and cycles until the result is there, where counters say so.
_ALU, _FLOAT = ("integer", 2, 5), ("float", 1, 5)
_UNIFORM, _CONTROL = ("uniform", 2, 10), ("control", 1, 5)
PIPES = {
    **dict.fromkeys(
        "CS2R ELECT F2FP FMNMX FSEL FSETP HMNMX2 I2FP IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 "
        "PRMT R2P S2R SEL SGXT SHF VIADD VIADDMNMX VIMNMX VOTE".split(),
        _ALU,
    ),
    **dict.fromkeys("FADD FFMA FMUL HADD2 HFMA2 HMUL2".split(), _FLOAT),
    "IMAD": ("float", 2, 5),
    **dict.fromkeys(
        "R2UR S2UR UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UPLOP3 UPRMT USEL USHF VOTEU".split(),
        _UNIFORM,
    ),
    **dict.fromkeys(
        "BRA BSSY BSYNC CALL DEPBAR EXIT LDGDEPBAR NANOSLEEP NOP WARPGROUP WARPSYNC".split(),
        _CONTROL,
    ),
    "MUFU": ("special", 8, 22),
    "HMMA": ("tensor", 8, 25),  # of 16 x 8 x 16: half the rate that `wgmma` has with many columns
    # 128 bytes per cycle of shared memory, for all four schedulers.
    "LDS": ("memory", 4, 28),
    "LDSM": ("memory", 4, 33),
    "STS": ("memory", 4, 20),
    "STSM": ("memory", 4, 20),
    "SHFL": ("memory", 4, 25),
    "MOVM": ("memory", 4, 25),
    "LDGSTS": ("memory", 4, 20),
    "LDC": ("memory", 4, 40),
    "LD": ("memory", 4, 60),
    "LDG": ("memory", 4, 60),  # found in the cache of the multiprocessor
    "STG": ("memory", 4, 40),
    "SYNCS": ("memory", 4, 20),
    "UTMALDG": ("memory", 4, 20),
    "UTMAPF": ("memory", 4, 20),
    "CCTL": ("memory", 4, 20),
    "BAR": ("memory", 1, 0),  # and what `MEETINGS` says
    "MEMBAR": ("memory", 1, 25),
    "FENCE": ("memory", 1, 15),
}
WIDE = {".128": 4, ".64": 2, ".4": 4, ".2": 2}  # times as much in shared memory, by the ending
NONE = 7  # no counter


class Gpu(NamedTuple):
    multiprocessors: int
    clock: float  # cycles per second
    bandwidth: float  # of its memory, bytes per second: 90 % of the data sheet's
    slower: dict[str, float]  # cycles of instructions, where they are not those of `PIPES`

    def pipe(self, instruction: "Instruction") -> tuple[str, float, float]:
        """Which, for how many cycles, and how many later the result is there."""
        name, opcode = instruction.name, instruction.opcode
        if name == "HGMMA":
            columns = int(opcode.split("x")[1])
            return "tensor", max(16, columns / 2), 0
        if name not in PIPES:
            raise NotImplementedError(f"expected an instruction of `PIPES`; got {instruction.text}")
        pipe, cycles, latency = PIPES[name]
        cycles = self.slower.get(name, cycles)
        if pipe == "memory":
            cycles *= next((n for end, n in WIDE.items() if opcode.endswith(end)), 1)
        return pipe, cycles, latency

    def memory_cycles(self, size: float) -> float:
        """Of a multiprocessor's share of the bandwidth, for so many bytes."""
        return size * self.clock * self.multiprocessors / self.bandwidth


_FLOATS, _PAIRS = ("FADD", "FFMA", "FMUL"), ("HADD2", "HFMA2", "HMUL2")
H100 = Gpu(132, 1.755e9, 3.0e12, {})
A100 = Gpu(108, 1.41e9, 1.83e12, dict.fromkeys(_FLOATS, 2))
L4 = Gpu(58, 2.04e9, 0.27e12, dict.fromkeys(_PAIRS, 2) | {"HMMA": 16})


@dataclasses.dataclass(frozen=True)
class Instruction:
    text: str
    control: int  # the upper 64 bits, with what the assembler knows about time

    @property
    def opcode(self) -> str:
        return re.sub(r"^@\S+\s+", "", self.text).split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def stall(self) -> int:
        """Cycles until the warp may go on, if nothing else keeps it."""
        return max(1, self._field(41, 4))

    @property
    def done(self) -> int:
        """The counter that counts until the result is there."""
        return self._field(46, 3)

    @property
    def read(self) -> int:
        """The counter that counts until operands are read."""
        return self._field(49, 3)

    @property
    def waits(self) -> tuple[int, ...]:
        """Counters that have to be 0 before."""
        return tuple(n for n in range(6) if self._field(52, 6) >> n & 1)

    def _field(self, first: int, bits: int) -> int:
        return self.control >> first & (2**bits - 1)


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Of `nvdisasm -c -hex`: instructions, and the places of labels."""
    texts, controls, labels = [], [], {}
    number = r"/\* 0x([0-9a-f]{16}) \*/"
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(texts)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;\s*" + number, line):
            texts.append(found[1])
        elif found := re.match(r"\s*" + number, line):
            controls.append(int(found[1], 16))
    return [Instruction(*pair) for pair in zip(texts, controls, strict=True)], labels


def unit(listing: str, parts: int) -> list[Instruction]:
    """What a warp does for a unit: the loop over units, with the one over its parts unrolled.

    Raises:
      ValueError: there is no such loop with a product in it.
    """
    instructions, labels = parse(listing)
    end = next(n for n, i in enumerate(instructions) if i.name == "EXIT")  # then what hardly runs
    products = [n for n, i in enumerate(instructions) if i.name == "HMMA"]
    loops = []
    for last, instruction in enumerate(instructions[:end]):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction.text)
        first = labels[target[1]] if target else math.inf
        if any(first <= n <= last for n in products):
            loops.append((last - first, first, last + 1))
    loops.sort()
    if len(loops) < 1 + (parts > 1):
        raise ValueError(f"expected a loop with products for {parts} parts; got {loops}")
    _, first, last = loops[0]
    if parts == 1:  # whose loop is gone
        return instructions[first:last]
    begin, after = next((b, a) for _, b, a in loops[1:] if b <= first and last <= a)
    part = instructions[first:last]
    return instructions[begin:first] + part * parts + instructions[last:after]


class _Warp:
    def __init__(self, start: float):
        self.place, self.ready, self.multiplied, self.passed = 0, start, 0.0, []
        self.counters, self.arriving, self.announced = [0.0] * 6, collections.deque(), 0.0


def cycles(
    unit: list[Instruction], programs: int, unit_bytes: float, stages: int, gpu: Gpu = H100
) -> float:
    """For each program's unit to be done: of one scheduler, with a warp of every program, whose
    other warps do the same on the others.

    Args:
      unit_bytes: that memory delivers for a unit; 0 if it need not be waited for.
      stages: units that have room.
    """
    run = functools.partial(_cycles, unit, programs, unit_bytes, stages, gpu)
    return statistics.median(map(run, MEETINGS))


def _cycles(unit, programs, unit_bytes, stages, gpu, meeting: int) -> float:
    # Of bulk copies, or of those that threads make.
    waits = [n for n, i in enumerate(unit) if re.match(r"SYNCS\.PHASECHK|DEPBAR\.LE", i.opcode)]
    copies = [n for n, i in enumerate(unit) if i.name in ("UTMALDG", "LDGSTS")]
    if not waits or not copies:
        raise ValueError("expected a loop that copies units and waits for them")
    # Where the next unit is asked for, to come into the L2 cache.
    ahead = next((n for n, i in enumerate(unit) if i.name in ("UTMAPF", "CCTL")), None)
    wait, copy, decoded = waits[-1], copies[-1], [(i, gpu.pipe(i), i.waits) for i in unit]
    pipes, delivered, moved = collections.defaultdict(float), 0.0, 0.0

    def fetch(now: float) -> float:
        nonlocal delivered
        delivered = max(now, delivered) + gpu.memory_cycles(unit_bytes)
        return delivered + MEMORY_LATENCY * (unit_bytes > 0)

    def fetch_near(now: float) -> float:
        nonlocal moved
        moved = max(now, moved) + unit_bytes / L2_BYTES
        return moved + L2_LATENCY * (unit_bytes > 0)

    warps = [_Warp(97.0 * n) for n in range(programs)]  # they would not start together
    for warp in warps:
        warp.arriving.extend(fetch(0.0) for _ in range(stages))

    def earliest(warp: _Warp) -> float:
        place = warp.place % len(unit)
        instruction, (pipe, taken, _), counters = decoded[place]
        at = max(warp.ready, pipes[pipe] - AHEAD.get(pipe, 0) * taken)
        at = max([at, *(warp.counters[n] for n in counters)])
        if instruction.opcode == "WARPGROUP.DEPBAR.LE":
            at = max(at, warp.multiplied)
        return max(at, warp.arriving[0]) if place == wait else at

    now, live = 0.0, list(warps)
    while live:
        live.sort(key=lambda warp: warp.ready)  # the one that has waited longest first
        times = [earliest(warp) for warp in live]
        chosen = next((n for n, at in enumerate(times) if at <= now), None)
        if chosen is None:
            now = min(times)
            continue
        warp = live[chosen]
        place = warp.place % len(unit)
        instruction, (pipe, taken, latency), _ = decoded[place]
        latency += meeting * (instruction.name == "BAR")
        start = max(now, pipes[pipe])
        pipes[pipe] = start + taken
        for counter, at in (
            (instruction.done, start + taken + latency),
            (instruction.read, start + taken + READ),
        ):
            if counter != NONE:
                warp.counters[counter] = max(warp.counters[counter], at)
        if instruction.name == "HGMMA":
            warp.multiplied = max(warp.multiplied, start + taken + TENSOR_LATENCY)
        warp.ready = now + max(instruction.stall, meeting * (instruction.name == "BAR"))
        if place == wait:
            warp.arriving.popleft()
        if place == ahead:
            warp.announced = fetch(now)
        if place == copy:
            near = ahead is not None
            warp.arriving.append(max(warp.announced, fetch_near(now)) if near else fetch(now))
        warp.place += 1
        if place == len(unit) - 1:
            warp.passed.append(now)
            if len(warp.passed) == UNITS:
                live.remove(warp)
        now += 1
    first, final = UNITS // 3, UNITS - UNITS // 3  # what is steady
    spans = [warp.passed[final] - warp.passed[first] for warp in warps]
    return sum(spans) / len(spans) / (final - first)
