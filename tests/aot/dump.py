"""What the GPU's compiler leaves on its way, in files. Import before anything compiles a kernel."""

import atexit
import os
import pathlib
import shutil
import tempfile

FOLDER = pathlib.Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
# Read when a process compiles its first kernel.
os.environ.update(
    MOSAIC_GPU_DUMP_TO=str(FOLDER),
    MOSAIC_GPU_DUMP_PTX="1",
    MOSAIC_GPU_DUMP_PTXAS="1",
    MOSAIC_GPU_DUMP_HOST_LLVM="1",
)

from targets import compile_for


def compile_for_h100(jitted, *args) -> None:
    """Leaves the files of this one in `FOLDER`."""
    for file in FOLDER.iterdir():
        file.unlink()
    compile_for("h100", jitted, *args)


def text(ending: str) -> str:
    """Of the one file that is named so."""
    (file,) = FOLDER.glob(f"*{ending}")
    return file.read_text()
