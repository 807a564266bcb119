"""Options of schemes: what their annotations allow, and what a string form can hold."""

import ast
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal


def options_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The options of a registered function, with annotations that were texts evaluated."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # of what is only imported for type checkers
        signature = inspect.signature(function)
    return dict(signature.parameters)


def literals(function: Callable) -> dict[str, tuple]:
    """The values of those that are annotated with a `Literal`, or with one or None."""
    found = {}
    for name, option in options_of(function).items():
        values = []
        for member in _members(option.annotation):
            if member is type(None):
                values.append(None)
            elif typing.get_origin(member) is Literal:
                values.extend(typing.get_args(member))
            else:
                break
        else:
            found[name] = tuple(values)
    return found


def parse(text: str) -> Any:
    """A value from its text: Python's, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_option(scheme: str, option: inspect.Parameter, value: Any) -> None:
    """Raises ValueError unless the option takes values of this type, and they can be written."""
    kinds, key, default = _kinds(option), option.name, option.default
    if kinds is not None and not any(_is(value, kind) for kind in kinds):
        expected = f"a value like {default!r}"
        if default is None:
            names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
            named = [names.get(kind, kind.__name__) for kind in kinds if kind is not type(None)]
            expected = " or ".join(named)
        raise ValueError(f"scheme {scheme!r}: option {key} takes {expected}; got {value!r}")
    number = isinstance(value, int | float)
    if number and value < 0 and not (isinstance(default, int | float) and default < 0):
        raise ValueError(f"scheme {scheme!r}: option {key} must not be negative; got {value!r}")
    check_text(scheme, key, value)


def _kinds(option: inspect.Parameter) -> tuple[type, ...] | None:
    """The types that its annotation allows, or that of its default; None if any may do."""
    annotation, default = option.annotation, option.default
    if annotation is option.empty or isinstance(annotation, str):
        return (int, type(None)) if default is None else (type(default),)
    found = []
    for member in _members(annotation):
        if typing.get_origin(member) is Literal:
            found.extend(map(type, typing.get_args(member)))
            continue
        kind = typing.get_origin(member) or member
        if kind is Any or not isinstance(kind, type):
            return None
        found.append(kind)
    return tuple(found)


def _members(annotation: Any) -> list:
    """The types and Literals that a union is of, or the annotation itself."""
    if annotation is None:
        return [type(None)]
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [member for one in typing.get_args(annotation) for member in _members(one)]
    return [annotation]


def _is(value: Any, kind: type) -> bool:
    """Whether it is one: a whole number is a float, too, but no truth value is a number."""
    if isinstance(value, bool):
        return kind in (bool, object)
    if issubclass(kind, os.PathLike):
        kind = str  # which a path has become
    wider = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    return isinstance(value, wider)


def check_text(scheme: str, key: str, value: Any) -> None:
    """Raises ValueError unless the string form of a scheme can hold a value, such as a path.

    A cache that is saved names its scheme by that.
    """
    text = str(value)
    if "," in text or parse(text.strip()) != value:
        advice = ""
        if isinstance(value, str):
            advice = ". Take a path with a letter in front, and without commas"
        raise ValueError(
            f"scheme {scheme!r}: option {key}={value!r} cannot be written in a scheme's name and "
            f"read again, as in '{scheme}:{key}=...,other=...'{advice}"
        )
