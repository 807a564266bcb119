"""What the GPU's compiler leaves on its way, in files. Import before anything compiles a kernel."""

import atexit
import os
import pathlib
import re
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
    LLVM_DISABLE_SYMBOLIZATION="1",  # of where files are written from: it takes most of the time
    XLA_FLAGS=(
        f"--xla_dump_to={FOLDER} --xla_dump_hlo_module_re=jit_dumped --xla_dump_hlo_as_text "
        "--xla_gpu_dump_llvmir=true --xla_dump_emitter_re=.*"
    ),
)

import jax
from ptx.program import Program, parse
from targets import compile_for


def compile_kernel(target: str, jitted, *args) -> None:
    """Leaves the files of this one in `FOLDER`."""
    for file in FOLDER.iterdir():
        file.unlink()
    compile_for(target, jitted, *args)


def text(ending: str, kernel: str = "") -> str:
    """Of the one file that is named so, and begins with the name of the kernel."""
    (file,) = FOLDER.glob(f"{kernel}*{ending}")
    return file.read_text()


def triton_kernel(
    target: str, name: str, run, *args, donated: tuple[int, ...] = ()
) -> tuple[Program, dict]:
    """The one kernel by Triton of a function, and the options of its launch."""

    def dumped(*args):
        return run(*args)

    compile_kernel(target, jax.jit(dumped, donate_argnums=donated), *args)
    (code,) = (
        t for t in map(pathlib.Path.read_text, FOLDER.glob("*.ptx")) if f".entry {name}" in t
    )
    launches = text("thunk_sequence.txt").splitlines()
    (launch,) = (line for line in launches if f" {name} grid" in line)
    numbers = r"grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+)"
    *grid, threads, shared = map(int, re.search(numbers, launch).groups())
    return parse(code), dict(grid=tuple(grid), threads=threads, shared_bytes=shared)
