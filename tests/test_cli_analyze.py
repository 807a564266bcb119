"""`nqkv analyze`: figures and the command line, on a small model without RoPE."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_language_model import ByteTokenizer

from nqkv_jax.analysis import plots, report
from nqkv_jax.analysis.errors import LayerError, SchemeErrors
from nqkv_jax.cli import main
from nqkv_jax.models import LanguageModel, families
from nqkv_jax.models.opt import Opt


@functools.cache
def without_rope():
    config = dataclasses.replace(
        families.presets["opt-125m"], num_layers=2, hidden_size=64, num_heads=2, head_dim=32,
        ffn_size=64, vocab_size=256, max_positions=64, num_kv_heads=2, embed_size=64,
    )  # fmt: skip
    return LanguageModel(
        model=Opt(config, rngs=nnx.Rngs(0)), config=config, tokenizer=ByteTokenizer(),
        name="byte", dtype=jnp.float32,
    )  # fmt: skip


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `nqkv analyze` on a model without RoPE; returns (exit status, the text's path)."""
    monkeypatch.setattr(
        "nqkv_jax.cli.options.load", lambda args, check: (check(without_rope()), without_rope())[1]
    )
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely, I went.")

    def run(name, *options):
        argv = ["analyze", name, "--model", "byte", "--text", text, "--max-tokens", "64"]
        return main([str(a) for a in [*argv, *options]])

    return run


COMMANDS = [
    ("normality", ("--stretch", "30"), ("% of blocks that pass", "30 tokens of a channel"),
     "keys.channels.passing"),
    ("heatmap", ("--layers", "1"), ("first token over", "64 channels"), "values.1.absolute"),
    ("error", ("--scheme", "nqkv"), ("relative squared errors", "4.25"), "output.nqkv"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, words, array", COMMANDS)
def test_commands(command, capsys, tmp_path, name, options, words, array):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"{name}.png"
    assert command(name, *options, "--plot", picture) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    drawn = np.load(picture.with_suffix(".npz"))[array]
    assert np.all(np.isfinite(drawn)) and drawn.size
    assert command(name, *options, "--json") == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["model"] == "byte"
    if name == "normality":
        assert [layer["keys"]["channels"]["passing"] for layer in entry["layers"]] == list(drawn)
    elif name == "heatmap":
        energy = np.sqrt(np.mean(np.square(drawn, dtype=np.float64), axis=0))
        np.testing.assert_allclose(entry["layers"][1]["values"]["channel_rms"], energy)
    else:
        assert [layer["output"] for layer in entry["schemes"][0]["layers"]] == list(drawn)


def test_command_reports(command, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def measured(lm, tokens, names, progress):  # as test_commands has done it already
        layers = (LayerError(keys=0.1, values=0.1, output=0.1),) * 2
        return [SchemeErrors(scheme=name, stored_bits=4.0, layers=layers) for name in names]

    monkeypatch.setattr(report, "scheme_errors", measured)
    folder = tmp_path / "new" / "report"
    assert command("report", "--out", folder, "--scheme", "nqkv", "int8", "--json") == 0
    entry = json.loads(capsys.readouterr().out)
    text = pathlib.Path(entry["report"]).read_text(encoding="utf-8")
    for name in ("normality", "heatmap", "spectra", "error"):
        assert f"({name}.png)" in text
        assert (folder / f"{name}.png").stat().st_size > 10_000 and f"{name}.npz" in entry["files"]
    assert "2 layers with 2 KV heads of 32 channels, on 64 tokens" in text
    assert "`nqkv` (4.00 stored bits)" in text and "`int8` (4.00 stored bits)" in text
    assert "after RoPE" not in text  # as there is none


@pytest.mark.parametrize("name, options, message", [
    ("normality", ("--plot", "x.bmp"), "must be a file .png or .pdf or .svg"),
    ("normality", ("--plot", "./nowhere/x.png"), "there is no nowhere"),
    ("normality", ("--block-size", "63"), "must divide the 64 channels"),
    ("normality", ("--stretch", "65"), "at most the number of tokens, 64"),
    ("normality", ("--max-tokens", "1"), "at least 2; got 1"),
    ("heatmap", ("--layers", "2"), "0..1; got [2]"),
    ("error", ("--scheme", "nqvk"), "unknown scheme"),
    ("error", ("--scheme", "kivi"), "Give a longer text"),
    ("report", ("--out", __file__), "must be a folder"),
])  # fmt: skip
def test_commands_refuse(command, capsys, name, options, message):
    pytest.importorskip("matplotlib")
    assert command(name, *options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_figures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install -e "\.\[plots\]" in a'):
        plots.check_path("x.png")
