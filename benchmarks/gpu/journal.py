"""What a run has found, one JSON line per step, so that nothing is lost when it ends early.

A part of the benchmark is a list of *units*: a case that is checked, a shape that is timed. A unit
is started, and done with its records. A process that dies or hangs in between is replaced by
another, which leaves out what killed the first.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LOST = 75  # exit status: temporary failure, as in sysexits.h


class Journal:
    """A file of lines {"event", "unit", ...}; a last line that was cut off does not count.

    Args: path: continued if it is there.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self._lines = [json.loads(line) for line in whole.splitlines()]

    def _write(self, **line: Any) -> None:
        self._lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measured_on(self, **machine: Any) -> None:
        """Raises SystemExit if the file was begun on another machine."""
        if not self.machine:
            return self._write(event="machine", machine=machine)
        for name, before in self.machine.items():
            if name != "date" and machine[name] != before:
                raise SystemExit(
                    f"{self.path} was begun with {name} {before!r}, and this is {machine[name]!r}: "
                    "give another folder with --out, or --fresh to begin again"
                )

    @property
    def machine(self) -> dict:
        """What all records were measured on; empty before anything was."""
        return next((line["machine"] for line in self._lines if line["event"] == "machine"), {})

    def reached(self, part: str, left: int) -> None:
        """The end of a part, or of its time: units that are left."""
        self._write(event="reached", part=part, left=left)

    @property
    def left(self) -> dict[str, int]:
        return {line["part"]: line["left"] for line in self._lines if line["event"] == "reached"}

    def started(self, unit: str, step: str | None = None) -> None:
        self._write(event="started", unit=unit, step=step)

    def done(self, unit: str, records: list[dict]) -> None:
        self._write(event="done", unit=unit, records=records)

    def ended(self, reason: str) -> None:
        """What was started last has killed the process."""
        last = self._lines[-1] if self._lines else {}
        if last.get("event") == "started":
            self._write(event="ended", unit=last["unit"], step=last["step"], reason=reason)

    def is_done(self, unit: str) -> bool:
        return any(line["event"] == "done" and line["unit"] == unit for line in self._lines)

    def fatal(self, unit: str) -> dict[str | None, str]:
        """The steps of a unit that ended a process, and why; None: one that cannot be left out."""
        lines = (line for line in self._lines if line["event"] == "ended")
        return {line["step"]: line["reason"] for line in lines if line["unit"] == unit}

    @property
    def records(self) -> list[dict]:
        done = (line for line in self._lines if line["event"] == "done")
        return [record for line in done for record in line["records"]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: `run(note, fatal)` returns records.

    `note(step)` is called before a step that could end the process, and steps in `fatal` are to be
    left out, for the reasons given. `failed(reason)` are the records if it cannot be run at all.
    """

    name: str
    run: Callable[[Callable[[str], None], dict[str | None, str]], list[dict]]
    failed: Callable[[str], list[dict]]


class DeviceLost(Exception):
    """After an error on the device nothing runs on it any more, in this process."""


def work(
    journal: Journal, units: Sequence[Unit], deadline: float, examine: Callable[[Exception], None]
) -> int:
    """Runs the units that are not done; how many are left at the deadline (of `time.time`).

    `examine(error)` raises DeviceLost if that is what the error means.
    """
    for i, unit in enumerate(units):
        if journal.is_done(unit.name):
            continue
        if time.time() > deadline:
            return sum(not journal.is_done(u.name) for u in units[i:])
        began = time.perf_counter()
        fatal = journal.fatal(unit.name)
        if None in fatal:
            journal.done(unit.name, unit.failed(fatal[None]))
            continue
        journal.started(unit.name)
        try:
            records = unit.run(functools.partial(journal.started, unit.name), fatal)
        except DeviceLost:
            raise
        except Exception as error:  # a unit that fails does not stop the rest
            examine(error)
            records = unit.failed(reason_of(error))
        journal.done(unit.name, records)
        print(f"{unit.name}: {time.perf_counter() - began:.1f} s", flush=True)
    return 0


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def supervise(
    command: Sequence[str],
    path: pathlib.Path,
    *,
    patience: float,
    tries: int,
    until: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs a command that writes a journal; again if it dies, or writes nothing for too long.

    A command that has lost its device says so by the status `LOST`. At the time `until` (of
    `time.time`) it is ended, and what it was doing stays undone.

    Returns: the exit status of the last one; below 0 if it died, 0 if its time was up.
    """
    status = 1
    for _ in range(tries):
        process = subprocess.Popen(command, env=environment)
        reason, seen, since = None, None, time.monotonic()
        while process.poll() is None:
            size = path.stat().st_size if path.exists() else 0
            if size != seen:
                seen, since = size, time.monotonic()
            late = time.time() > until
            if late or time.monotonic() - since > patience:
                reason = f"nothing happened for {patience:.0f} s, and the process was ended"
                process.kill()
                process.wait()
                if late:
                    return 0
                break
            time.sleep(0.2)
        status = process.returncode
        if status >= 0 and status != LOST:
            return status
        reason = reason or f"the process died of signal {-status}"
        if status != LOST:  # a loss is in the journal already
            Journal(path).ended(reason)
    return status
