"""What all checkpoint formats have in common: shards of named tensors, and the model's config."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from nqkv_jax.words import counted


class CheckpointFileError(ValueError):
    """A checkpoint's file is there, but cannot be read or is not what it should be."""


class CheckpointNotFoundError(FileNotFoundError):
    """There is no such checkpoint, or it cannot be had from here."""


class Shard(Protocol):
    """One file of tensors. Opening it reads the header only.

    Attributes:
      path: of the file.
      sizes: name -> bytes of the array that `tensors` gives for it.
    """

    path: pathlib.Path
    sizes: Mapping[str, int]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) for every tensor, each read when it is asked for."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk.

    Attributes:
      config: content of the Hugging Face `config.json`, or the same built from GGUF metadata.
      shards: the files, in the order they are read.
      folder: where `config.json` and the tokenizer's files lie.
      metadata: of a GGUF file, which carries its tokenizer; empty for other formats.
    """

    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    folder: pathlib.Path
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        homes: dict[str, pathlib.Path] = {}
        for shard in self.shards:
            for name in shard.sizes:
                if name in homes:
                    raise CheckpointFileError(
                        f"tensor {name!r} must be in one shard; it is in {homes[name].name} and in "
                        f"{shard.path.name} of {self.folder}. Shards of two checkpoints were "
                        "mixed: download the checkpoint again into an empty folder"
                    )
                homes[name] = shard.path

    def names(self) -> list[str]:
        """Names of all tensors, in the order of `tensors`."""
        return [name for shard in self.shards for name in shard.sizes]

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays that `tensors` gives."""
        return sum(sum(shard.sizes.values()) for shard in self.shards)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) for every tensor, shard by shard; nothing is kept once it was given.

        Raises: CheckpointFileError if a file cannot be read.
        """
        for shard in self.shards:
            yield from shard.tensors()


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of a name such as "float16"; knows bfloat16, which numpy alone does not."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: CheckpointFileError, naming the file, if it holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointFileError(
            f"{path} must be a JSON file; it cannot be read: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointFileError(
            f"{path} must hold a JSON object; it holds a {type(content).__name__}"
        )
    return content


def read_config(folder: pathlib.Path, weights: pathlib.Path) -> dict[str, Any]:
    """The `config.json` in `folder`, which `weights` cannot do without."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{weights} needs the model's config.json beside it; {folder} has none. "
            "Copy it there from where the weights came from"
        )
    return read_json(path)


def shard_paths(index_path: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The shards that an index file names, and its map from tensor to shard.

    Raises:
      CheckpointFileError: if it is no index, or names a file outside its folder.
      CheckpointNotFoundError: if shards are missing; lists all of them.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointFileError(f"{index_path} must hold a 'weight_map' from tensor to file name")
    folder, names = index_path.parent, sorted(set(weight_map.values()))
    # An index comes from whoever published the checkpoint: it must not point anywhere else.
    outside = [name for name in names if pathlib.PurePath(name).name != name]
    if outside:
        raise CheckpointFileError(f"{index_path} must name files of its own folder; got {outside}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointNotFoundError(
            f"{index_path} names {counted(len(names), 'shard')}; not in {folder}: "
            f"{', '.join(missing)}. Download them too"
        )
    return [folder / name for name in names], weight_map


def check_index(
    index_path: pathlib.Path, weight_map: Mapping[str, str], shards: list[Shard]
) -> None:
    """Raises CheckpointFileError unless every tensor lies in the shard that the index says."""
    contents = {shard.path.name: shard.sizes for shard in shards}
    lost = [name for name, file in weight_map.items() if name not in contents[file]]
    if lost:
        listed = "\n".join(f"  {name} ({weight_map[name]})" for name in lost[:12])
        more = f"\n  ... and {len(lost) - 12} more" if len(lost) > 12 else ""
        raise CheckpointFileError(
            f"{index_path} lists {counted(len(lost), 'tensor')} that its shards do not hold. "
            f"Download the checkpoint again:\n{listed}{more}"
        )


def refuse_lone_shard(path: pathlib.Path) -> None:
    """Raises CheckpointFileError if `path` is one of several shards: the rest would be missing."""
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", path.name) and "-00001-of-00001" not in path.name:
        raise CheckpointFileError(
            f"{path} is one shard of several; pass the folder {path.parent} or its index file"
        )
