"""Runs notebooks from top to bottom, and saves them with their outputs.

    python notebooks/execute.py [01_quickstart.ipynb ...]      # default: all

What differs from run to run and says nothing (times of execution, progress bars) is not kept. A
notebook whose outputs name a folder of this machine, or that is too large to be read online, is
refused.
"""

import base64
import io
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
MAX_BYTES = 300_000


def local_paths() -> list[str]:
    """Folders that must not be named in outputs."""
    return [str(FOLDER.resolve().parent), sys.prefix, sys.base_prefix, str(pathlib.Path.home())]


def smaller(png: str) -> str:
    """The same picture in 256 colours, which figures can do with: a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=0)
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources=dict(metadata=dict(path=FOLDER))).execute()
    notebook.metadata = dict(
        kernelspec=dict(name="python3", display_name="Python 3", language="python"),
        language_info=dict(name="python"),
        accelerator="GPU",  # what Colab starts, if it may
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for data in (o["data"] for o in cell.outputs if "image/png" in o.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    text = nbformat.writes(notebook)
    named = [folder for folder in local_paths() if folder in text and folder not in ("/", "/root")]
    if named:
        raise ValueError(f"{path.name}: outputs must not name folders of this machine; got {named}")
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(
            f"{path.name}: must be smaller than {MAX_BYTES:,} bytes; got {len(text.encode()):,}"
        )
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(p.name for p in FOLDER.glob("*.ipynb"))
    for name in names:
        print(name, flush=True)
        execute(FOLDER / pathlib.Path(name).name)
