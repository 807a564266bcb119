"""Tables and bars as plain text."""

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def width(limit: int = 100) -> int:
    """Columns to fill: those of the terminal, at most `limit`."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, limit))


def unicode_output() -> bool:
    """Whether stdout can show block elements and box lines."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "█▏─".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_json(value: Any) -> None:
    print(to_json(value))


def to_json(value: Any) -> str:
    """One line of JSON; what is not a finite number becomes null, as JSON has no word for it."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] | None = None
) -> str:
    """Columns two blanks apart, those of `right` (all but the first) aligned to the right."""
    right = range(1, len(header)) if right is None else right
    rows = [list(map(str, row)) for row in rows]
    sizes = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        cells = [
            c.rjust(n) if i in right else c.ljust(n)
            for i, (c, n) in enumerate(zip(cells, sizes, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = ("─" if unicode_output() else "-") * len("  ".join("x" * n for n in sizes))
    return "\n".join([line(header), rule, *map(line, rows)])


def bars(entries: Sequence[tuple[str, float, str]], *, columns: int, indent: str = "  ") -> str:
    """One bar per (label, value, text), as long as its share of the largest value."""
    label = max(len(name) for name, _, _ in entries)
    text = max(len(note) for _, _, note in entries)
    room = max(8, columns - len(indent) - label - text - 4)
    finite = [value for _, value, _ in entries if math.isfinite(value)]
    top = max(finite, default=0) or 1
    lines = []
    for name, value, note in entries:
        share = value / top if math.isfinite(value) else 0
        lines.append(f"{indent}{name.ljust(label)}  {_bar(share * room)} {note}")
    return "\n".join(lines)


def _bar(length: float) -> str:
    """Something that is not nothing shows at least the thinnest bar."""
    if not unicode_output():
        return "#" * max(round(length), int(length > 0))
    eighths = max(round(8 * length), int(length > 0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def side_by_side(left: tuple[str, str], right: tuple[str, str], *, columns: int) -> str:
    """Two titled texts in two columns; one above the other where the terminal is narrow."""
    if columns < 72:
        return "\n\n".join(
            f"{title}\n" + textwrap.indent(textwrap.fill(text, columns - 2), "  ")
            for title, text in (left, right)
        )
    room = (columns - 3) // 2
    mark = " │ " if unicode_output() else " | "
    dash, cross = ("─", "─┼─") if unicode_output() else ("-", "-+-")

    def wrap(text: str) -> list[str]:
        return [
            line for part in text.splitlines() or [""] for line in textwrap.wrap(part, room) or [""]
        ]

    a, b = ([title, dash * room, *wrap(text)] for title, text in (left, right))
    height = max(len(a), len(b))
    a += [""] * (height - len(a))
    b += [""] * (height - len(b))
    lines = [
        f"{x.ljust(room)}{cross if i == 1 else mark}{y}".rstrip()
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    return "\n".join(lines)


def figure(value: float) -> str:
    """Two digits after the point; "-" for NaN, where there is nothing to measure."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def seconds(value: float) -> str:
    """0.0123 -> "12.3 ms"."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
