"""Docstrings of this project as Markdown, for the API reference.

Sections begin with a word and a colon, and their text may begin on the same line:

    Args:    x: f32[...].                  Args:
    Returns: as many.              or        x: f32[...], which may go on
    Raises:  ValueError if ...                 on a further line.

The standard parsers know the second form only, and drop the first.
"""

import re

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source", "References")
_HEAD = re.compile(rf"({'|'.join(SECTIONS)}):(\s*)(.*)")
# `name: `, `a, b: ` or `ValueError: ` at the beginning of an item.
_ITEM = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): +(.*)")


def to_markdown(docstring: str) -> str:
    """The same text, sections as lists; what looks like a tag is escaped."""
    out: list[str] = []
    lines = docstring.expandtabs().splitlines()
    while lines:
        line = lines.pop(0)
        head = _HEAD.fullmatch(line)
        if head is None:
            out.append(_escape(line))
            continue
        body = [" " * head.start(3) + head[3]] if head[3] else []
        # Running text that begins on the line of its word goes on without being indented.
        while body and lines and lines[0].strip() and not _HEAD.fullmatch(lines[0]):
            body.append(lines.pop(0))
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        out += ["", f"**{head[1]}**", "", *_items(body), ""]
    return "\n".join(out).strip() + "\n"


def _items(body: list[str]) -> list[str]:
    body = [line for line in body if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in body) if body else 0
    items: list[str] = []
    for line in body:
        text, indented = line.strip(), len(line) - len(line.lstrip()) > margin
        item = _ITEM.fullmatch(text)
        if item and not indented:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            items.append(f"- {names}: {_escape(item[2])}")
        elif items:
            items.append(f"    {_escape(text)}" if items[0].startswith("- ") else _escape(text))
        else:
            items.append(_escape(text))
    return items


def _escape(line: str) -> str:
    """`<q, k>` in running text is no tag; code, in backticks or indented, is left alone."""
    if line.startswith("    "):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else _escape_text(part) for part in parts)


def _escape_text(text: str) -> str:
    # *emphasis* is meant as such; a single asterisk is a product or an unpacked tuple.
    text = re.sub(r"(?<![\w*])\*(\w[^*]*\w)\*(?![\w*])", "\0\\1\0", text.replace("<", "&lt;"))
    return text.replace("*", r"\*").replace("\0", "*")
