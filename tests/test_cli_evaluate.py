"""The commands of `nqkv eval`: what they ask for, and how they show it."""

import json
import math
import types

import pytest
import tiny_checkpoint

from nqkv_jax import evaluation, models
from nqkv_jax.cli import evaluate_retrieval, main, measures, options
from nqkv_jax.words import counted

TASK = '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'
NAMES = dict(model="tiny", dtype="float32", cache_dtype="float32", seconds=1.0)
WINDOWS = NAMES | dict(tokens=90, text_tokens=93, windows=3, window=31, stride=31, stored_bits=4.25)
SHARE = dict(accuracy=0.5, accuracy_error=0.1, accuracy_interval=(0.3, 0.7))

RESULTS = {
    "divergence": lambda scheme: evaluation.DivergenceResult(
        kl=0.0123456, kl_error=0.00123, kl_median=0.01, kl_p99=0.5, top1=0.9, top1_error=0.02,
        nll=3.1, full_nll=3.0, nll_increase=0.1, nll_increase_error=0.011, perplexity=22.2,
        full_perplexity=20.1, scheme=scheme, **WINDOWS,
    ),
    "multiple_choice": lambda scheme: evaluation.ChoiceResult(
        accuracy_norm=0.6, accuracy_norm_error=0.1, accuracy_norm_interval=(0.4, 0.8), items=25,
        requests=50, scheme=scheme, **SHARE, **NAMES,
    ),
    "last_word": lambda scheme: evaluation.LastWordResult(
        perplexity=7.5, nll=2.01, nll_error=0.25, items=25, scheme=scheme, **SHARE, **NAMES
    ),
    "drift": lambda scheme: evaluation.DriftResult(
        common=12.5, common_error=math.nan, common_median=12, first_tokens=(12,), parted=1, kl=0.1,
        kl_error=math.nan, prompts=1, prompt=20, length=8, stored_bits=4.25, scheme=scheme,
        buckets=tuple(
            evaluation.DriftBucket(start=a, stop=a + 4, kl=0.1, kl_error=math.nan, tokens=4)
            for a in (0, 4)
        ),
        **NAMES,
    ),
    "retrieval": lambda scheme: evaluation.RetrievalResult(
        task="passkey", recall=0.5, samples=16, prefill_chunk=64, seed=0, scheme=scheme,
        cells=tuple(
            evaluation.RetrievalCell(length=n, depth=d, samples=4, correct=c, recall=c / 4)
            for n, d, c in ((64, 0.25, 4), (64, 0.75, 3), (96, 0.25, 1), (96, 0.75, 0))
        ),
        **SHARE, **NAMES,
    ),
}  # fmt: skip

# Command, the function behind it, arguments, what it is asked with, what is shown.
COMMANDS = [
    ("kl", "divergence", "--text {text} --window 31 --stride 9 --max-tokens 93",
     dict(text="some text", window=31, stride=9, max_tokens=93),
     ["0.0123 ± 0.0012", "90.0 ± 2.0 %", "0.100 ± 0.011", "20.100", "90 tokens of text.txt"]),
    ("choice", "multiple_choice", "--task {task} --limit 1",
     dict(items=[json.loads(TASK)]), ["50 ± 10", "30.0 to 70.0", "60 ± 10", "25 items"]),
    ("lambada", "last_word", "--task {task}",
     dict(items=[json.loads(TASK)]), ["50 ± 10", "7.50", "2.01 ± 0.25"]),
    ("drift", "drift", "--text {text} --prompts 1 --prompt 20 --length 8 --buckets 2",
     dict(text="some text", prompts=1, prompt=20, length=8, buckets=2, generate=models.generate),
     ["1 prompt of 20 tokens", "12.5", "1/1", "KL at 0..3", "KL at 4..7", "0.1000"]),
    ("needle", "retrieval", "--length 64 96 --depths 2 --samples 4 --seed 3 --prefill-chunk 64",
     dict(task="needle", lengths=[64, 96], depths=2, samples=4, seed=3, prefill_chunk=64,
          generate=models.generate),
     ["50 ± 10", "depth 25%", "3/4", "30.0 to 70.0"]),
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command with stand-ins for the model and the measure; (calls, output)."""
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "task.jsonl").write_text(TASK)
    lm = types.SimpleNamespace(name="tiny")
    monkeypatch.setattr(options, "load", lambda args, check: lm)

    def run(command, function, arguments):
        calls = []

        def stand_in(lm, **asked):
            calls.append(asked)
            return RESULTS[function](asked["scheme"])

        monkeypatch.setattr(evaluation, function, stand_in)
        paths = dict(text=tmp_path / "text.txt", task=tmp_path / "task.jsonl")
        argv = f"eval {command} --model tiny {arguments}".format(**paths).split()
        status = main(argv)
        out, err = capsys.readouterr()
        assert status == 0, err
        return calls, out

    return run


@pytest.mark.parametrize("command, function, arguments, asked, shown", COMMANDS)
def test_asks_and_shows(run, command, function, arguments, asked, shown):
    calls, out = run(command, function, arguments + " --scheme none nqkv:bits=3 --resume x.jsonl")
    assert [c.pop("scheme") for c in calls] == ["none", "nqkv:bits=3"]
    assert [str(c.pop("resume")) for c in calls] == ["x.none.jsonl", "x.nqkv_bits=3.jsonl"]
    assert calls == [asked | dict(cache_dtype=None, progress=None)] * 2
    assert [part for part in shown if part not in out] == []
    assert all(name in out for name in ("none", "nqkv:bits=3"))


@pytest.mark.parametrize("command, function, arguments, asked, shown", COMMANDS)
def test_json_is_one_line_each(run, command, function, arguments, asked, shown):
    _, out = run(command, function, arguments + " --scheme none nqkv --json")
    first, second = map(json.loads, out.splitlines())
    assert (first["scheme"], second["scheme"]) == ("none", "nqkv")
    assert first["model"] == "tiny" and first["seconds"] == 1


def test_one_is_not_many():
    result = types.SimpleNamespace(**WINDOWS | dict(tokens=1, windows=1))
    said = measures.describe_windows(result, "folder/text.txt")
    assert "1 token of text.txt scored in 1 window of 31" in said
    assert (counted(0, "item"), counted(1, "KV head")) == ("0 items", "1 KV head")
    assert counted(2048, "token") == "2,048 tokens"


def test_heat_map(run, tmp_path):
    path = tmp_path / "map.png"
    run("passkey", "retrieval", f"--plot {path} --scheme none nqkv int4 int8")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_figures_of_errors():
    assert measures.with_error(0.012345, 0.00056) == "0.01235 ± 0.00056"
    assert measures.with_error(123.4, 12.3) == "123 ± 12"
    assert measures.with_error(0.5, math.nan) == measures.with_error(0.5, 0.0) == "0.5000"
    assert measures.with_error(math.nan, 0.1) == "nan ± 0.10"
    assert measures.interval((0.123, 0.9)) == "12.3 to 90.0"


@pytest.mark.parametrize("argv, message", [
    ("kl --model tiny", "required: --text"),
    ("kl --model tiny --text ./no.txt", "no.txt cannot be read"),
    ("kl --model tiny --text {text} --scheme nqvk", "unknown scheme 'nqvk'"),
    ("choice --model tiny --task ./no.jsonl", "no.jsonl cannot be read"),
    ("choice --model tiny --task {text}", "line 1 must be a JSON object"),
    ("choice --model tiny --task {task} --limit 0", "limit must be at least 1; got 0"),
    ("passkey --model tiny --depths many", "invalid int value: 'many'"),
    ("passkey --model ./nowhere", "nowhere"),
    ("haystack --model tiny", "invalid choice: 'haystack'"),
])  # fmt: skip
def test_wrong_arguments(capsys, tmp_path, argv, message):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "task.jsonl").write_text(TASK)
    paths = dict(text=tmp_path / "text.txt", task=tmp_path / "task.jsonl")
    assert main(["eval", *argv.format(**paths).split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("measure", ["kl", "drift", "choice", "lambada", *evaluate_retrieval.TASKS])
def test_help_has_an_example(capsys, measure):
    assert main(["eval", measure, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  nqkv eval {measure} " in out and "--resume" in out
    assert main(["leaderboard", "--help"]) == 0
    assert "example:\n  nqkv leaderboard " in capsys.readouterr().out


def test_real_kl(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    model = tiny_checkpoint.write(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("What is seen is what is scored. " * 3)
    argv = ["eval", "kl", "--model", model, "--text", str(text), "--scheme", "int4", "--window",
            "30", "--json"]  # fmt: skip
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] > found["kl_error"] > 0 and found["tokens"] == 92


@pytest.mark.slow
def test_real_passkey(capsys):
    """Full precision finds every pass key in 512 tokens, as transformers does on these weights."""
    argv = "eval passkey --model smollm2-135m --scheme none --length 512 --samples 4 --json"
    assert main(argv.split()) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == 1
