"""A measurement that is killed again and again ends as if nothing had happened."""

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny_language_model import TinyLM

from nqkv_jax.evaluation import (
    divergence,
    drift,
    last_word,
    multiple_choice,
    perplexity,
    record,
    retrieval,
)  # fmt: skip


class LongLM(TinyLM):
    config = types.SimpleNamespace(**(vars(TinyLM.config) | dict(max_positions=2048)))


LM = LongLM.random()
TOKENS = np.random.default_rng(1).integers(0, 256, 160)
WORDS = [dict(context="once upon a", continuation=f"time {i}") for i in range(70)]
CHOICES = [dict(query=f"{i} and", choices=["one", "two", "more"], gold=i % 3) for i in range(25)]


def generate(lm, prompts, *, scheme, **options):
    """Depends on the prompt, and on whether there is a scheme."""
    add = int(str(scheme) != "none")
    return types.SimpleNamespace(tokens=[[p[-1], sum(p) % (50 + add)] for p in prompts])


MEASURES = {
    "kl": lambda **o: divergence(LM, TOKENS, scheme="int4", window=32, **o),
    "ppl": lambda **o: perplexity(LM, TOKENS, scheme="int4", window=32, **o),
    "drift": lambda **o: drift(
        LM, TOKENS, generate=generate, scheme="int4", prompts=4, prompt=30, length=2, buckets=2, **o
    ),
    "passkey": lambda **o: retrieval(
        LM, generate=generate, scheme="int4", lengths=[700], samples=9, depths=2, **o
    ),
    "choice": lambda **o: multiple_choice(LM, CHOICES, scheme="int4", **o),
    "lambada": lambda **o: last_word(LM, WORDS, scheme="int4", **o),
}


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """What is compiled for a measurement is kept for the next; here it is always the same."""
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("perplexity", "_parallel"), ("divergence", "comparer"),
                               ("drift", "comparer"), ("likelihood", "Scorer")):  # fmt: skip
            module = importlib.import_module(f"nqkv_jax.evaluation.{name}")
            make = getattr(module, function)

            def once(*args, make=make, function=function):
                if function not in known:
                    known[function] = make(*args)
                return known[function]

            patch.setattr(module, function, once)
        yield


def figures(result):
    return {k: v for k, v in dataclasses.asdict(result).items() if k != "seconds"}


class Killed(BaseException):
    """Nothing that could be caught by mistake."""


@pytest.mark.parametrize("name", MEASURES)
def test_killed_at_random(name, tmp_path, monkeypatch):
    measure, path = MEASURES[name], tmp_path / "run.jsonl"
    expected = figures(measure())
    rng = np.random.default_rng(len(name))
    # Each at least once, then chance decides.
    fates = rng.permutation(["before", "torn", "after"]).tolist()
    add, kills, steps = record.Record.add, [], []

    def fragile(self, **entry):
        """Dies before, in the middle of, or after writing a line; or not at all."""
        fate = fates.pop() if fates else rng.choice(["before", "torn", "after", "none"])
        if fate == "before":
            kills.append(fate)
            raise Killed
        whole = path.read_bytes()
        add(self, **entry)
        steps.append(len(self.entries))
        if fate == "torn":
            line = path.read_bytes()[len(whole) :]
            path.write_bytes(whole + line[: rng.integers(len(line))])
            steps.pop()
        if fate != "none":
            kills.append(fate)
            raise Killed

    monkeypatch.setattr(record.Record, "add", fragile)
    for _ in range(200):
        try:
            found = figures(measure(resume=path))
            break
        except Killed:
            continue
    assert len(kills) >= 3 and found == expected
    # No step was lost, and none was done twice.
    count = len(path.read_text().splitlines()) - 1
    assert steps == list(range(1, count + 1)) and count > 2
    monkeypatch.setattr(record.Record, "add", lambda *args, **entry: pytest.fail("nothing is left"))
    assert figures(measure(resume=path)) == expected


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_resume
from nqkv_jax.evaluation import record

add = record.Record.add

def last_words(self, **entry):
    add(self, **entry)
    if len(self.entries) == 3:
        with open({path!r}, "ab") as file:
            file.write(b'{{"window": 3, "kl": [0.1')
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

record.Record.add = last_words
test_resume.MEASURES["kl"](resume={path!r})
"""


@pytest.mark.optimized
def test_process_killed(tmp_path):
    path = tmp_path / "run.jsonl"
    script = SCRIPT.format(tests=os.path.dirname(__file__), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    content = path.read_text()
    assert content.count("\n") == 4 and not content.endswith("\n")
    found = figures(MEASURES["kl"](resume=path))
    assert found == figures(MEASURES["kl"]())
    assert path.read_text().startswith(content[: content.rindex("\n") + 1])


def test_record_says_what_was_measured(tmp_path):
    MEASURES["passkey"](resume=tmp_path / "run.jsonl")
    first, *batches = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert first.pop("weights") == record.fingerprint(LM.params)
    assert set(first.pop("versions")) == {"nqkv-jax", "jax"}
    assert first == dict(
        record="nqkv passkey 2", model="tiny", dtype="float32", scheme="int4", files={},
        cache_dtype="float32", lengths=[700], depths=2, samples=9, seed=0, prefill_chunk=128,
        max_new_tokens=12,
    )  # fmt: skip
    assert [len(batch["texts"]) for batch in batches] == [5, 5, 5, 3]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    kind = lambda **setting: record.Record(
        path, kind="test", unit="step", count=2, setting=lambda: setting
    )
    kind(a=(1, 2), b={1: "x"}).add(value=math.nan)
    again = kind(a=(1, 2), b={1: "x"})
    assert list(again) == [1] and math.isnan(again.entries[0]["value"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"differ: a: \[1, 2\] there, \[1\] now; c: None there"):
        kind(a=(1,), b={1: "x"}, c=3)
    with pytest.raises(ValueError, match="record of the kind 'nqkv other 2'; it is something else"):
        record.Record(path, kind="other", unit="step", count=2, setting=lambda: dict(a=[1, 2]))
    with pytest.raises(ValueError, match="at most 0 steps; it holds 1"):
        record.Record(
            path, kind="test", unit="step", count=0, setting=lambda: dict(a=[1, 2], b={1: "x"})
        )
    assert path.read_bytes() == before


@pytest.mark.parametrize("folder", ["~", ""])
def test_other_weights_and_files_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path, calibration = tmp_path / "run.jsonl", tmp_path / "some.json"
    named = f"{folder or tmp_path}/some.json"
    measure = lambda lm: perplexity(lm, TOKENS, scheme="int4", window=32, resume=path)
    measure(LM)
    other = LM.params | dict(head=LM.params["head"] + 1)
    with pytest.raises(ValueError, match="differ: weights: "):
        measure(LongLM(other))
    scheme = types.SimpleNamespace(options=(("calibration", named), ("bits", 3)))
    calibration.write_text("{}")
    first = record.describe(LM, scheme, "bfloat16")["files"]
    calibration.write_text("[]")
    second = record.describe(LM, scheme, "bfloat16")["files"]
    assert list(first) == list(second) == [named] and first != second


def test_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        MEASURES["ppl"](resume=tmp_path / "nowhere" / "run.jsonl")
