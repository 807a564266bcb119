"""Figures in words."""


def counted(number: int, one: str) -> str:
    """1, "window" -> "1 window"; 2048, "window" -> "2,048 windows"."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"
