"""The documentation: pages made from the code, and a tutorial that does what it says."""

import functools
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import cases
import jax
import numpy as np
import pytest
import tiny_checkpoint

import nqkv_jax as nq
import nqkv_jax.quantizers
import nqkv_jax.schemes
from nqkv_jax.cli import main
from nqkv_jax.schemes import registry
from nqkv_jax.schemes.nqkv import CODEBOOKS

ROOT = pathlib.Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "add-a-scheme.md").read_text(encoding="utf-8")


def load(name, folder=ROOT / "docs"):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Pages -------------------------------------------------------------------------------------------


def test_every_scheme_has_a_page_with_its_options():
    pages = load("hooks").scheme_pages()
    index = pages.pop("index")
    for name in nq.schemes.names():
        (page,) = (p for p in pages.values() if f"\n## `{name}`\n" in p)
        section = page.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        assert f"| [`{name}`]({registry._REGISTRY[name].__module__.split('.')[-1]}.md) |" in index
        for option, default in nq.schemes.defaults(name).items():
            valid = nq.schemes.choices(name).get(option, ())
            shown = ", ".join(f"`{value!r}`" for value in valid)
            assert f"| `{option}` | `{default!r}` | {shown} |" in section
    assert "Stored bits: 4.0625." in pages["nqkv"] and "arXiv 2505.16210" in pages["nqkv"]
    assert "depends on its calibration" in pages["kvquant"]


def test_docstrings_become_markdown():
    markdown = load("docstrings").to_markdown(
        "What it does with <q, k> and `<q, k>`.\n"
        "\n"
        "Args:    x, y: f32[*shape], or\n"
        "           *anything* else.\n"
        "         bits: 2 * 2.\n"
        "Returns: as many,\n"
        "of one kind.\n"
        "Raises:\n"
        "  ValueError: if not.\n"
        "\n"
        "    code = a * b\n"
        "\n"
        "Source: nobody.\n"
    )
    assert markdown == (
        "What it does with &lt;q, k> and `<q, k>`.\n\n\n"
        "**Args**\n\n"
        "- `x`, `y`: f32[\\*shape], or\n"
        "    *anything* else.\n"
        "- `bits`: 2 \\* 2.\n\n\n"
        "**Returns**\n\n"
        "as many,\nof one kind.\n\n\n"
        "**Raises**\n\n"
        "- `ValueError`: if not.\n"
        "    code = a \\* b\n\n\n"
        "**Source**\n\n"
        "nobody.\n"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "models" / "index.html").read_text(encoding="utf-8")
    assert "from_pretrained" in page


def test_the_picture_shows_the_table_of_results():
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    figure = load("readme_figure", ROOT / "benchmarks")
    found = figure.rows((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    assert len(found) > 30 and ("nqkv", 4.08, 34.26) in found
    picture = ROOT / "docs" / "quality.png"
    # If this fails: python benchmarks/readme_figure.py
    assert json.loads(Image.open(picture).text["Description"]) == [list(row) for row in found]
    assert picture.stat().st_size < 100_000
    (axes,) = figure.draw(found).axes
    dots = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() in "s^o"
    }
    assert {(b, p) for n, b, p in found if n in ("none", "nqkv", "kivi")} <= dots


def test_errors_of_codebooks_are_what_the_table_says():
    errors = load("codebook_errors", ROOT / "benchmarks")
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([234]) \| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
    assert {name for _, name, _ in rows} == set(CODEBOOKS)
    for bits, name, cells in rows:
        found = 100 * errors.nmse(name, int(bits), 256, samples=2**19)
        assert found == pytest.approx(float(cells.split(" | ")[-1]), rel=1e-2)


# How to add a scheme -----------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch, own_registry):
    """Where new files of the package may be put, so that they are found as if they were there."""
    for package in (nqkv_jax.schemes, nqkv_jax.quantizers):
        folder = tmp_path / package.__name__.replace(".", "/")
        folder.mkdir(parents=True)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_add_a_scheme_step_by_step(folders, monkeypatch, tmp_path_factory, capsys):
    model = tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))
    schemes = list(cases.SCHEMES)
    names = dict(SCHEMES=schemes)
    monkeypatch.chdir(ROOT)  # where README.md is
    blocks = re.findall(
        r"```(python|console)(?: title=\"([^\"]*)\")?\n(.*?)```", TUTORIAL, re.DOTALL
    )
    assert [bool(title) for _, title, _ in blocks].count(True) == 3 and len(blocks) == 7
    for language, title, code in blocks:
        if title:
            (folders / title).write_text(code, encoding="utf-8")
            importlib.invalidate_caches()
            quantizer = importlib.import_module(title.removesuffix(".py").replace("/", "."))
            names |= {n: v for n, v in vars(quantizer).items() if n == "SignQuantizer"}
        elif language == "python":
            exec(code, names)
            says = [line.partition("  # ")[2].split(":  ")[0] for line in code.splitlines()
                    if line.startswith("print(") and "  # " in line]  # fmt: skip
            for said, printed in zip(says, capsys.readouterr().out.splitlines(), strict=True):
                assert said.startswith(printed)
        else:
            for line in code.splitlines():
                argv = shlex.split(line.removeprefix("$ nqkv "))
                assert line.startswith("$ nqkv ") and main(short(argv, model)) == 0
                shown = capsys.readouterr()
                assert "keys-only:bits=3" in shown.out + shown.err
    # What the page promises of both.
    assert len(schemes) == len(cases.SCHEMES) + 2
    for name in schemes[-2:]:
        at_once, one_by_one = (filled(name, sizes) for sizes in ((20,), (1,) * 20))
        np.testing.assert_array_equal(at_once.lengths, 20)
        for a, b in zip(leaves(at_once), leaves(one_by_one), strict=True):
            np.testing.assert_array_equal(a, b)


def short(argv, model):
    """The same command for a tiny model and few tokens."""
    argv = [model if a == "smollm2-135m" else a for a in argv]
    if argv[0] == "generate":
        argv += ["--model", model, "--max-new-tokens", "2"]
    return [*argv, "--max-tokens", "64", "--window", "64"] if argv[0] == "eval" else argv


def filled(name, sizes):
    """A cache of 20 tokens, appended `sizes` at a time."""
    cache = cases.make_cache(name, max_len=24)
    q, k, v = cases.make_qkv(20)
    attend = jax.jit(functools.partial(nq.attend, rotary=cases.ROTARY))
    start = 0
    for size in sizes:
        cut = lambda x, start=start, size=size: x[:, start : start + size]
        _, cache = attend(cut(q), cut(k), cut(v), cache)
        start += size
    return cache


def leaves(cache):
    """What is encoded; what comes after it is not defined."""
    sides = (cache.layers[0].key, cache.layers[0].value)
    return [
        np.asarray(a)[:, : int(side.encoded(20))]
        for side in sides
        for a in jax.tree.leaves(side.body)
    ]
