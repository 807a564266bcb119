"""The registry: schemes by name, and the string form of their options."""

import functools
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Callable

import numpy as np

from nqkv_jax.checks import one_of
from nqkv_jax.schemes.base import Scheme
from nqkv_jax.schemes.options import check_option, literals, options_of, parse

_REGISTRY: dict[str, Callable] = {}


def register(name: str) -> Callable[[Callable], Callable]:
    """Names a scheme: a function of keyword options that returns LayerShape -> LayerScheme.

    Every option has a default. What is annotated is checked: a `Literal[...]`, whose values
    `choices` tells, a type, or one of several (`int | None`). The same function may be registered
    again, as a cell of a notebook does that is run twice: the latest counts.

    Raises: ValueError: another function has the name, it is none that a string form could begin
      with, or an option cannot be given by name or left out.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            "schemes.register: expected a name of letters, digits, '-', '_' and '.', as in "
            f"@register('my-scheme'); got {name!r}"
        )

    def decorate(function: Callable) -> Callable:
        if name in _REGISTRY and not _same(_REGISTRY[name].__wrapped__, function):
            raise ValueError(
                f"schemes.register: there is already a scheme named {name!r}; choose another name"
            )
        for option in inspect.signature(function).parameters.values():
            by_name = option.kind in (option.KEYWORD_ONLY, option.POSITIONAL_OR_KEYWORD)
            if not by_name or option.default is option.empty:
                raise ValueError(
                    f"schemes.register: expected every option of {name!r} to have a name and a "
                    f"default, as in `bits: int = 4`; got {option}"
                )

        @functools.wraps(function)
        def checked(**options):
            for key, valid in literals(function).items():
                if key in options:
                    one_of(f"{name}: {key}", options[key], valid)
            return function(**options)

        _REGISTRY[name] = checked
        return checked

    return decorate


def _same(one: Callable, other: Callable) -> bool:
    """Whether they are one function, or its definition was run again."""
    where = lambda function: (function.__module__, function.__qualname__)
    return one is other or where(one) == where(other)


def _load_all() -> None:
    package = importlib.import_module("nqkv_jax.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"nqkv_jax.schemes.{module.name}")


def names() -> list[str]:
    """All registered schemes, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def defaults(name: str) -> dict[str, object]:
    """The options of a scheme with their defaults."""
    return {key: option.default for key, option in options_of(_registered(name)).items()}


def choices(name: str) -> dict[str, tuple]:
    """The values of those options of a scheme that take one of a few."""
    return literals(_registered(name))


def _registered(name: str) -> Callable:
    _load_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown scheme {name!r}; there are: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def get(spec: "str | Scheme", **options) -> Scheme:
    """The scheme of a string such as `"nqkv"` or `"nqkv:bits=3,block_size=64"`.

    Args:
      options: override those of the string.

    Raises:
      ValueError: no such scheme or option (the message lists what exists), or a bad value.
    """
    if isinstance(spec, Scheme):
        if options:
            raise ValueError(
                f"schemes.get: options go with a name; got the scheme {spec} and {options}"
            )
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"schemes.get: expected a name such as 'nqkv:bits=3'; got {spec!r}")
    name, _, rest = spec.partition(":")
    name = name.strip()
    known = options_of(_registered(name))
    given = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"scheme {spec!r}: expected option=value; got {item!r}. "
                f"Example: {name}:{next(iter(known), 'option')}=..."
            )
        if key.strip() in given:
            raise ValueError(f"scheme {spec!r}: option {key.strip()} is given twice")
        given[key.strip()] = parse(value.strip())
    given |= options
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"scheme {name!r} has no option {key!r}; it has: "
                f"{', '.join(f'{k}={v}' for k, v in defaults(name).items()) or 'none'}"
            )
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        given[key] = value = value.item() if isinstance(value, np.generic) else value
        check_option(name, known[key], value)
    # To Python True is 1, to an option it may not be.
    key = lambda value: (value, isinstance(value, bool))
    changed = tuple(
        (k, given[k]) for k in known if k in given and key(given[k]) != key(known[k].default)
    )
    versions = tuple((isinstance(value, bool), _version(value)) for _, value in changed)
    return _build(name, _REGISTRY[name], changed, versions)


def _version(value: object) -> tuple[int, ...] | None:
    """Of the file that an option names, if it names one: another when that was written again."""
    try:
        found = os.stat(os.path.expanduser(value)) if isinstance(value, str) else None
    except (OSError, ValueError):
        return None
    return found and (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=256)
def _build(
    name: str, function: Callable, options: tuple[tuple[str, object], ...], versions: tuple
) -> Scheme:
    summary = (inspect.getdoc(function) or "").split("\n")[0]
    layer = function(**dict(options))
    if not callable(layer):
        raise ValueError(
            f"scheme {name!r}: expected the function that was registered to return a function of a "
            f"LayerShape, which returns a LayerScheme; got {layer!r}"
        )
    return Scheme(name, options, layer, summary)
