"""What is asked of arguments in many places."""

import numbers
from collections.abc import Collection
from typing import Any


def whole_numbers(what: str, **values: Any) -> None:
    """Raises ValueError, for `what`, unless all of the values are whole numbers; None may stand."""
    for name, value in values.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole and value is not None:
            raise ValueError(f"{what}: {name} must be a whole number; got {value!r}")


def one_of(what: str, value: Any, choices: Collection) -> None:
    """Raises ValueError, for `what`, unless the value is among the choices."""
    if value not in choices:
        raise ValueError(f"{what}: expected one of {', '.join(map(str, choices))}; got {value!r}")
