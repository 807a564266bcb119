"""What is asked of arguments in many places."""

import numbers
import os
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's; an array or a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def concrete(a: Any) -> np.ndarray | None:
    """The numbers of an array; None if it is traced, or other processes have some of them."""
    if isinstance(a, jax.core.Tracer) or not getattr(a, "is_fully_addressable", True):
        return None
    return np.asarray(a)


def whole_numbers(what: str, **values: Any) -> None:
    """Raises ValueError, for `what`, unless all of the values are whole numbers; None may stand."""
    for name, value in values.items():
        if not is_whole(value) and value is not None:
            raise ValueError(f"{what}: {name} must be a whole number; got {value!r}")


def one_of(what: str, value: Any, choices: Collection) -> None:
    """Raises ValueError, for `what`, unless the value is among the choices."""
    if value not in choices:
        raise ValueError(f"{what}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def file_path(what: str, path: Any) -> pathlib.Path:
    """`path` as a `Path`, "~" being the home folder; ValueError, for `what`, if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{what}: expected the path of a file, a str or a Path; got {path!r:.200}")
    return pathlib.Path(path).expanduser()
