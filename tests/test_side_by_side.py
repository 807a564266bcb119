"""Several processes on one model: what they do, and what becomes of errors and of dead ones."""

import functools
import os
import pathlib
import signal

import numpy as np
import pytest
from tiny_language_model import TinyLM

from nqkv_jax.evaluation import side_by_side


def load(seed):
    return TinyLM.random(seed)


def note(lm, path):
    """The sum of the weights, and who has made it."""
    total = float(np.sum(np.asarray(lm.params["head"], np.float64)))
    pathlib.Path(path).write_text(f"{total} {os.getpid()}")


def fail(lm, message):
    raise ValueError(message)


def die(lm):
    os.kill(os.getpid(), signal.SIGKILL)


def run(tasks, workers=1):
    side_by_side.run(functools.partial(load, 3), tasks, workers=workers, progress=False)


def test_every_task_meets_the_model(tmp_path):
    names = ("a", "b", "c", "d")
    run({name: functools.partial(note, path=tmp_path / name) for name in names}, workers=2)
    found = [(tmp_path / name).read_text().split() for name in names]
    note(load(3), tmp_path / "here")
    expected, own = (tmp_path / "here").read_text().split()
    assert {total for total, _ in found} == {expected}
    assert own not in {process for _, process in found}


def test_first_error_ends_it(tmp_path):
    later = {name: functools.partial(note, path=tmp_path / name) for name in "abcdef"}
    with pytest.raises(ValueError, match="what was wrong"):
        run(dict(wrong=functools.partial(fail, message="what was wrong")) | later)
    # One that a process had taken already may still be done.
    assert len(list(tmp_path.iterdir())) < len(later)


def test_dead_process_is_reported(tmp_path):
    with pytest.raises(ChildProcessError, match=r"one of 1 worker processes has died.*fewer"):
        run(dict(first=functools.partial(note, path=tmp_path / "kept"), second=die))
    assert (tmp_path / "kept").exists()
