"""Checkpoints: safetensors, pytorch_model.bin (without torch) and GGUF, from disk or from the hub.

    checkpoint = open_checkpoint("facebook/opt-125m")          # or a folder, a file, "smollm2-135m"
    checkpoint.config["model_type"]
    for name, array in checkpoint.tensors():                   # read lazily, shard by shard
        ...

One reader per format; each opens files by their headers, and knows nothing of models.
"""

import os
import pathlib
import re

from nqkv_jax.models.checkpoint import embedded, hub
from nqkv_jax.models.checkpoint.base import (
    Checkpoint,
    CheckpointFileError,
    CheckpointNotFoundError,
    Shard,
    check_index,
    read_config,
    refuse_lone_shard,
    shard_paths,
)
from nqkv_jax.models.checkpoint.gguf import open_gguf
from nqkv_jax.models.checkpoint.pickle import PickleShard
from nqkv_jax.models.checkpoint.safetensors import SafetensorsShard

__all__ = [
    "Checkpoint",
    "CheckpointFileError",
    "CheckpointNotFoundError",
    "Shard",
    "open_checkpoint",
]

_FORMATS = {".safetensors": SafetensorsShard, ".bin": PickleShard}
# In a folder the first of these that is there is taken. Flat files come before indices, as in
# transformers.
_IN_FOLDER = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip

_IN_REPOSITORY = re.compile(r"(\w[\w.-]*/[\w.-]+)/([\w./-]+\.gguf)")


def open_checkpoint(name_or_path: str | os.PathLike, *, download: bool = True) -> Checkpoint:
    """Finds a checkpoint and reads its headers; no tensor is read yet.

    Args:
      name_or_path: an embedded model ("smollm2-135m"); a local folder, of which safetensors are
        taken before pytorch_model.bin before .gguf; a weights file, or the index of a sharded one;
        a repository of the Hugging Face hub ("facebook/opt-125m"), or a .gguf file in one
        ("owner/name/file.gguf").
      download: False: of a hub repository only config and tokenizer are fetched, and the checkpoint
        has no shards.

    Raises:
      ValueError: if the name is empty.
      CheckpointNotFoundError: if there is none of that name, or no weights in it.
      CheckpointFileError: if one of its files is truncated, corrupt, or asks to run code.
      ImportError: if it is a .gguf file and the package `gguf` is missing.
      NotImplementedError: if it is a .gguf file of an architecture that is not supported.
    """
    name = os.fspath(name_or_path)
    # As a path it would be the working directory, which is asked for by ".".
    if not name:
        raise ValueError(
            "the model's name must be a folder, a weights file, a hub repository 'owner/name' or "
            f"an embedded model ({', '.join(embedded.NAMES)}); it is empty"
        )
    if name in embedded.NAMES:
        return open_gguf(embedded.find(name))
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _open_file(_weights_in(path))
    if path.is_file():
        return _open_file(path)
    is_path = isinstance(name_or_path, pathlib.PurePath)
    if not is_path and (match := _IN_REPOSITORY.fullmatch(name)):
        return open_gguf(hub.download_file(*match.groups()))
    if is_path or _means_a_path(name):
        raise CheckpointNotFoundError(
            f"{name!r} must be an existing folder or weights file; there is none. (A hub "
            f"repository is named 'owner/name'; embedded models: {', '.join(embedded.NAMES)})"
        )
    if not download:
        folder = hub.download_config(name)
        return Checkpoint(config=read_config(folder, folder), shards=(), folder=folder)
    return _open_file(_weights_in(hub.download(name)))


def _means_a_path(name: str) -> bool:
    """Whether a name that is not on disk can only have been meant as a path."""
    return (
        name.startswith((".", "/", "~"))
        or name.endswith(("/", ".json", ".gguf", *_FORMATS))
        or name.count("/") > 1
        or "\\" in name
    )


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
    for name in _IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise CheckpointNotFoundError(
            f"{folder} must hold one .gguf file; it holds {len(files)}: {', '.join(files)}. "
            "Pass the path of one of them"
        )
    found = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
    raise CheckpointNotFoundError(
        f"{folder} must hold weights: one of {', '.join(_IN_FOLDER)}, or a .gguf file; "
        f"it holds {listed or 'nothing'}"
    )


def _open_file(path: pathlib.Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.name.endswith(".index.json"):
        files, index = shard_paths(path)
    else:
        refuse_lone_shard(path)
        files, index = [path], {}
    unknown = [file.name for file in files if file.suffix not in _FORMATS]
    if unknown:
        raise CheckpointFileError(
            f"{path}: weights must end in .safetensors, .bin or .gguf; got {', '.join(unknown)}"
        )
    config = read_config(path.parent, path)
    shards = [_FORMATS[file.suffix](file) for file in files]
    check_index(path, index, shards)
    return Checkpoint(config=config, shards=tuple(shards), folder=path.parent)
