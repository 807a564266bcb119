"""A warp: the registers of 32 threads, and where they are."""

import re

import numpy as np

from . import arithmetic
from .program import Address

ALL = np.ones(32, bool)
LANE = np.arange(32)


def of_all(execute):
    """An instruction that all threads of a warp take part in."""

    def checked(warp, active):
        if not active.all():
            raise RuntimeError("threads of a warp are missing")
        execute(warp, active)

    return checked


class Warp:
    """Registers and places of 32 threads. Those behind wait for no one: the ones whose next
    instruction is the earliest go first, so that branches meet again."""

    def __init__(self, block, number: int):
        self.block, self.number = block, number
        self.registers: dict[str, np.ndarray] = {}
        self.places = np.zeros(32, np.int64)
        self.alive = ALL.copy()
        self.blocked = None  # a function that says whether it still is
        self.products = []  # of the tensor core that are put off
        self.copies = [[]]  # groups of them that nobody has waited for; the last is open
        self.under_way: dict[str, np.ndarray] = {}  # registers that products use

    @property
    def done(self) -> bool:
        return not self.alive.any()

    def run(self) -> bool:
        """Until it ends or waits; False if it got nowhere."""
        if self.blocked is not None:
            if self.blocked():
                return False
            self.blocked = None
        while not self.done and self.blocked is None:
            place = self.places[self.alive].min()
            active = self.alive & (self.places == place)
            self.places[active] = place + 1
            instruction, execute = self.block.code[place]
            if instruction.guard:
                holds = self.registers[instruction.guard] ^ instruction.negated
                if instruction.opcode.startswith("bra"):
                    self.places[active & holds] = self.block.target(instruction)
                    continue
                active = active & holds
                if not active.any():
                    continue
            try:
                execute(self, active)
            except Exception as error:
                error.add_note(f"in warp {self.number} of block {self.block.index}: {instruction}")
                raise
        return True

    def commit_copies(self) -> None:
        self.copies.append([])

    def finish_copies(self, but: int) -> None:
        """All groups but the last few that were committed."""
        while len(self.copies) > but + 1:
            for copy in self.copies.pop(0):
                copy()

    def start_product(self, product) -> None:
        if self.block.schedule.late:
            self.products.append(product)
        else:
            product()

    def finish_products(self) -> None:
        for product in self.products:
            product()
        self.products.clear(), self.under_way.clear()

    def read(self, operand: str, dtype) -> np.ndarray:
        if operand in self.registers:
            register = self.registers[operand]
            return register if register.dtype == dtype else register.view(dtype)
        if operand.startswith("%") and "." in operand:
            number = self.block.special(operand)
            if operand == "%tid.x":
                number = 32 * self.number + LANE
            return np.full(32, number, np.uint32)
        if re.match(r"-?\d", operand):
            return arithmetic.immediate(operand, dtype)
        if operand in self.block.symbols:
            return np.full(32, self.block.symbols[operand], np.uint64).view(dtype)
        raise KeyError(f"{operand} is read before anything wrote it")

    def write(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        value = value if value.dtype == bool else value.view(arithmetic.storage(value.dtype))
        if not active.all():
            value = np.where(active, value, self.registers.get(name, np.zeros_like(value)))
        if name != "_":
            self.registers[name] = value

    def addresses(self, operand: Address) -> np.ndarray:
        """int64[32]"""
        if operand.base in self.registers:
            base = self.registers[operand.base].astype(np.int64)
        else:
            base = np.full(32, self.block.symbols[operand.base], np.int64)
        return base + operand.offset

    def vector(self, operands) -> np.ndarray:
        """uint32[n, 32]"""
        return np.stack([self.read(name, np.uint32) for name in operands])
