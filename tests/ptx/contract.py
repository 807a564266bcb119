"""What the assembler may do to float32: a product and the sum that takes it become one instruction.

Its result is rounded once. Where the sum is of large numbers that should cancel, that is another
result: a * b - a * b becomes the error of rounding one of them.
"""

import collections
import dataclasses

from .program import Address, Instruction, Program

KINDS = "f32", "f32x2"  # a number, or two in a register
# Those that say how to round (`.rn`) stay as they are.
SUMS = {f"{name}.{kind}" for name in ("add", "sub") for kind in KINDS}
PRODUCTS = {f"mul.{kind}" for kind in KINDS}


def contracted(program: Program) -> Program:
    """A program with products in sums of the same block, where nothing else takes them."""
    uses = collections.Counter(name for i in program.instructions for name in _read(i))
    starts = set(program.labels.values())
    instructions, products = list(program.instructions), {}
    for n, i in enumerate(program.instructions):
        if n in starts:
            products = {}
        if i.opcode in SUMS and i.guard is None:
            of_kind = lambda product, kind=i.opcode[4:]: product and product.opcode[4:] == kind
            found = [place for place in (1, 2) if of_kind(products.get(i.operands[place]))]
            if found:
                instructions[n] = _fused(products[i.operands[found[0]]], i, found[0])
        written = set(map(str, _names(i.operands[:1])))
        products = {k: v for k, v in products.items() if not written & {k, *v.operands}}
        if i.opcode in PRODUCTS and i.guard is None and uses[i.operands[0]] == 1:
            products[i.operands[0]] = i
    return dataclasses.replace(program, instructions=instructions)


def _read(i: Instruction) -> list[str]:
    """Of the first operand, too, where that is more than a register."""
    first = () if i.operands and isinstance(i.operands[0], str) else i.operands[:1]
    return [*_names((*first, *i.operands[1:])), *([i.guard] if i.guard else [])]


def _names(operands: tuple) -> list[str]:
    found = []
    for operand in operands:
        if isinstance(operand, Address):
            found += [operand.base, *operand.coordinates]
        else:
            found += _names(operand) if isinstance(operand, tuple) else [operand]
    return found


def _fused(product: Instruction, total: Instruction, place: int) -> Instruction:
    opcode = "fma"
    if total.opcode.startswith("sub"):  # a * b - c, or c - a * b; PTX would negate an operand
        opcode = "fms" if place == 1 else "fnma"
    operands = total.operands[0], *product.operands[1:], total.operands[3 - place]
    return Instruction(f"{opcode}.rn.{product.opcode[4:]}", operands, None, False)
