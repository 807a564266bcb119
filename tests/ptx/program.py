"""PTX text to instructions."""

import dataclasses
import re

POINTER = 8  # bytes


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset], or of a tensor [base, {coordinates}]."""

    base: str
    offset: int
    coordinates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple
    guard: str | None  # predicate under which it is executed
    negated: bool

    def __str__(self):
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(map(str, self.operands))}"


@dataclasses.dataclass
class Program:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows
    parameters: dict[str, int]  # bytes of each, by name


def parse(text: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
      ValueError: there is not exactly one.
    """
    text = re.sub(r"//.*", "", text)
    kernels = re.findall(r"\.entry\s+(\w+)\((.*?)\).*?\{(.*)\}", text, flags=re.DOTALL)
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel; got {len(kernels)}")
    ((name, parameters, body),) = kernels
    parameters = re.findall(r"(\w+)(?:\[(\d+)\])?\s*(?:,|$)", parameters.strip())
    parameters = {name: int(size or POINTER) for name, size in parameters}
    program = Program(name, [], {}, parameters)
    scopes, local = [0], [{}]  # names that a block in braces declares for itself
    for statement in _statements(body):
        if statement == "{":
            scopes.append(max(scopes) + len(program.instructions) + 1)
            local.append({})
        elif statement == "}":
            scopes.pop(), local.pop()
        elif statement.endswith(":"):
            program.labels[_label(statement[:-1], scopes)] = len(program.instructions)
        elif declared := re.match(r"\.reg\s+\.\w+\s+(.*)", statement):
            if len(scopes) > 1:
                for name in declared[1].split(","):
                    local[-1][name.strip()] = f"{name.strip()}@{scopes[-1]}"
        elif not statement.startswith("."):
            program.instructions.append(_instruction(statement, scopes, local[-1]))
    return program


def _statements(body: str):
    """Instructions, declarations, labels, and braces of blocks."""
    pending, depth = "", 0
    for line in body.splitlines():
        if re.match(r"\s*\.(loc|file|section)\b", line):
            continue
        for c in line + "\n":
            if c == "{" and not pending.strip():
                yield "{"
            elif c == "}" and not depth:
                yield "}"
            elif c == ";":
                yield pending.strip()
                pending = ""
            elif c == ":" and re.fullmatch(r"\s*[$\w]+", pending):
                yield f"{pending.strip()}:"
                pending = ""
            else:
                depth += (c == "{") - (c == "}")
                pending += c


def _label(name: str, scopes: list[int]) -> str:
    return name if name.startswith("$") or len(scopes) == 1 else f"{name}@{scopes[-1]}"


def _instruction(statement: str, scopes: list[int], local: dict[str, str]) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([\w.:]+)\s*(.*)", statement, flags=re.DOTALL)
    if not found:
        raise ValueError(f"expected an instruction; got {statement!r}")
    negated, guard, opcode, rest = found.groups()
    named = lambda name: local.get(name, name)
    if opcode.startswith("bra"):
        operands = (_label(rest.strip(), scopes),)
    else:
        operands = tuple(_operand(text, named) for text in _split(rest))
    return Instruction(opcode, operands, guard and named(guard), bool(negated))


def _split(text: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, named):
    if text.startswith("{"):
        return tuple(named(name) for name in _split(text[1:-1]))
    if "|" in text:
        return tuple(named(name) for name in text.split("|"))
    if not text.startswith("["):
        return named(text)
    base, *coordinates = _split(text[1:-1])
    name, _, offset = base.partition("+")
    inner = _split(coordinates[0][1:-1]) if coordinates else ()
    return Address(name.strip(), int(offset or 0), tuple(inner))
