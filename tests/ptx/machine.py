"""Thread blocks of a grid, one after the other."""

import collections
import dataclasses
import itertools

import numpy as np

from .contract import contracted
from .instructions import compile_instruction
from .memory import SHARED_BASE, Global, Shared, TensorMap
from .program import Instruction, Program
from .warp import Warp

SHARED_END = 2**24  # generic addresses below are of shared memory
PARAMETERS, PARAMETER_BYTES = 2**60, 2**12  # addresses of parameters, which are in no memory


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What happens first, of what no instruction orders.

    Attributes:
      warps: whose turn it is first, until it waits.
      late: copies and products happen when somebody waits for them, not when they are asked for.
    """

    warps: tuple[int, ...] = (0, 1, 2, 3)
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the host asks for."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[bytes, ...]
    tensor_maps: dict[int, TensorMap]  # by their place in the last parameter


def run(program: Program, launch: Launch, memory: Global, schedule: Schedule) -> int:
    """Executes a grid.

    Returns: cycles that conflicts in shared memory take.

    Raises:
      RuntimeError: nothing goes on, or an error of the program that would be undefined behaviour.
    """
    if len(schedule.warps) != launch.threads // 32:
        raise ValueError(f"expected an order of {launch.threads // 32} warps; got {schedule}")
    code = [(i, compile_instruction(i, program)) for i in contracted(program).instructions]
    total = 0
    with np.errstate(all="ignore"):
        for index in itertools.product(*map(range, launch.grid)):
            block = Block(program, code, launch, memory, schedule, index)
            block.run()
            total += block.shared.conflicts
    return total


class Block:
    def __init__(self, program, code, launch, memory, schedule, index):
        self.program, self.code, self.launch, self.schedule = program, code, launch, schedule
        self.memory, self.index = memory, index
        self.shared = Shared(launch.shared_bytes)
        self.barriers = {}
        self.warps = [Warp(self, n) for n in range(launch.threads // 32)]
        self.meetings = collections.defaultdict(set)  # of warps that wait, by barrier
        self.met = collections.Counter()
        self.copies = collections.deque()  # that are under way
        self.symbols = dict.fromkeys(("__dynamic_shmem__0", "global_smem"), SHARED_BASE)
        for n, name in enumerate(program.parameters):
            self.symbols[name] = PARAMETERS + n * PARAMETER_BYTES

    def run(self) -> None:
        while not all(warp.done for warp in self.warps):
            went = [self.warps[n].run() for n in self.schedule.warps if not self.warps[n].done]
            if not any(went):
                if not self.copies:
                    raise RuntimeError(f"nothing goes on in block {self.index}")
                self.copies.popleft()()
        while self.copies:
            self.copies.popleft()()
        if any(barrier.bytes for barrier in self.barriers.values()):
            raise RuntimeError("a barrier still expects bytes at the end")

    def target(self, instruction: Instruction) -> int:
        return self.program.labels[instruction.operands[0]]

    def special(self, name: str) -> int:
        axis = "xyz".index(name[-1])
        values = {"%ctaid": self.index[axis], "%nctaid": self.launch.grid[axis]}
        values |= {"%tid": 0, "%ntid": self.launch.threads if axis == 0 else 1}
        return values[name[:-2]]

    def parameter(self, name: str, offset: int, size: int) -> np.ndarray:
        data = self.launch.parameters[list(self.program.parameters).index(name)]
        return np.frombuffer(data[offset : offset + size], np.uint8)

    def memory_of(self, addresses: np.ndarray):
        return self.shared if addresses.max() < SHARED_END else self.memory

    def store(self, addresses: np.ndarray, data: np.ndarray, warp: int) -> None:
        if self.memory_of(addresses) is self.shared:
            self.shared.store(addresses, data, warp)
        else:
            self.memory.store(addresses, data)

    def meet(self, warp: Warp, number: int, threads: int | None) -> None:
        """`bar.sync`"""
        waiting, generation = self.meetings[number], self.met[number]
        waiting.add(warp.number)
        if 32 * len(waiting) == (threads or self.launch.threads):
            if len(waiting) == len(self.warps):
                self.shared.meet()
            waiting.clear()
            self.met[number] += 1
        else:
            warp.blocked = lambda: self.met[number] == generation

    def copy(self, tensor: int, coordinates: list[int], to: int, barrier: int) -> None:
        tensor_map = self.launch.tensor_maps[(tensor - PARAMETERS) % PARAMETER_BYTES]

        def copy():
            data = tensor_map.load(self.memory, coordinates)
            tensor_map.leave(self.shared, to, data)
            self.barriers[barrier].complete(data.size)

        if self.schedule.late:
            # Until then, whoever reads what is to come gets NaN.
            garbage = np.full(tensor_map.bytes, 0xFF, np.uint8)
            tensor_map.leave(self.shared, to, garbage)
            self.copies.append(copy)
        else:
            copy()
