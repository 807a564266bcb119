"""Measurements that go on where they were interrupted.

A measurement is a sequence of steps, each of which computes something that JSON can hold. A
`Record` keeps the steps that are done, in a file if it is given one: JSON lines, the first of which
says what is measured (model, weights, scheme, settings, text, versions), the others one step each,
in order. A line is on disk before the next step begins; the last one may be torn, and is dropped.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.calibration.artifact import fingerprint
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.schemes import Scheme
from nqkv_jax.words import counted


def describe(lm: LanguageModel, scheme: Scheme, cache_dtype: Any, **setting: Any) -> dict[str, Any]:
    """Everything that a measurement's figures depend on, for the first line of its record.

    Args: setting: what the kind of measurement adds: sizes, seeds, the hash of a text.
    """
    named = {v: pathlib.Path(v).expanduser() for _, v in scheme.options if isinstance(v, str)}
    return dict(
        model=lm.name, weights=fingerprint(lm.params), dtype=jnp.dtype(lm.dtype).name,
        scheme=str(scheme),
        # A calibration can be made anew under the same name.
        files={
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in named.items()
            if path.is_file()
        },
        cache_dtype=jnp.dtype(cache_dtype).name, **setting,
        versions={"nqkv-jax": importlib.metadata.version("nqkv-jax"), "jax": jax.__version__},
    )  # fmt: skip


def tokens_sha256(tokens: Any) -> str:
    """Of token ids as little-endian 32-bit integers."""
    return hashlib.sha256(np.asarray(tokens).astype("<i4").tobytes()).hexdigest()


class Record:
    """The steps that are done, and their copy on disk.

    Args:
      path: of the file; None to keep nothing.
      kind: of measurement, and of the file.
      unit: what a step is called in it.
      count: steps there are to do.
      setting: makes the first line; not called without a path, as it reads weights.

    Attributes:
      entries: of the steps that are done, in order: JSON objects.

    Raises: ValueError: the file holds another measurement, or something else; it is left alone.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        *,
        kind: str,
        unit: str,
        count: int,
        setting: Callable[[], dict[str, Any]],
    ):
        self.entries: list[dict[str, Any]] = []
        self._kind, self._unit, self._count = f"nqkv {kind} 2", unit, count
        self._path = None if path is None else pathlib.Path(path).expanduser()
        if self._path is None:
            return
        # As it will be read again: JSON knows neither tuples nor keys that are numbers.
        header = json.loads(json.dumps(dict(record=self._kind, **setting())))
        whole = self._read(header) if self._path.is_file() else b""
        if len(self.entries) > count:
            raise self._wrong(
                f"must hold at most {counted(count, unit)}; it holds {len(self.entries)}"
            )
        # Not only when something was torn: a file that cannot be written fails now, not later.
        with open(self._path, "ab") as file:
            file.truncate(len(whole))
            if not whole:
                file.write(json.dumps(header).encode() + b"\n")

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left; `add` what each has computed."""
        return iter(range(len(self.entries), self._count))

    def add(self, **entry: Any) -> None:
        """Keeps what the next step has computed."""
        entry = {self._unit: len(self.entries), **entry}
        self.entries.append(entry)
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    @property
    def seconds(self) -> float:
        """That all steps took, those of earlier runs included."""
        return sum(entry["seconds"] for entry in self.entries)

    def _wrong(self, problem: str) -> ValueError:
        return ValueError(f"resume: {self._path} {problem}. Delete it, or name another file")

    def _read(self, header: dict) -> bytes:
        """Fills `entries`; returns the lines that are whole."""
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        other = f"must be a record of the kind {self._kind!r}; it is something else"
        # A file that begins like ours but has no whole line was torn in its header.
        if not whole and not json.dumps(header).encode().startswith(content):
            raise self._wrong(other)
        for number, line in enumerate(whole.splitlines()):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise self._wrong(
                    f"must hold one JSON object per line; line {number + 1} is not: {error}"
                ) from error
            if number == 0:
                if not isinstance(entry, dict) or entry.get("record") != self._kind:
                    raise self._wrong(other)
                self._compare(entry, header)
            elif not isinstance(entry, dict) or entry.get(self._unit) != number - 1:
                raise self._wrong(
                    f"must go on with {self._unit} {number - 1} in line {number + 1}; got "
                    f"{line.decode(errors='replace')[:80]}"
                )
            else:
                self.entries.append(entry)
        return whole

    def _compare(self, entry: dict, header: dict) -> None:
        differ = [
            f"{key}: {entry.get(key)!r} there, {header.get(key)!r} now"
            for key in header | entry
            if entry.get(key) != header.get(key)
        ]
        if differ:
            raise self._wrong(f"must hold the same run; these differ: {'; '.join(differ)}")
