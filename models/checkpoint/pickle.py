"""Reads pytorch_model.bin files without torch, and without running what is in them.

Such a file is a zip archive: `<name>/data.pkl`, a pickle that describes the tensors, and
`<name>/data/<key>`, one raw little-endian storage per key, stored uncompressed. A pickle is a
program; here it runs on an unpickler that knows a handful of functions by name and refuses all
others.
"""

import dataclasses
import math
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nqkv_jax.models.checkpoint.base import CheckpointFileError, numpy_dtype

# Names that torch gives to storage classes, and since 2.x to dtypes beside untyped storages.
_NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip
_TYPES = {name: name for name in _NAMES} | {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Type:
    """Stands for a storage class or a dtype of torch, by the name of its numpy dtype.

    The pickle gets this instead of a `np.dtype`, whose state it could try to set.
    """

    name: str | None  # None for untyped storages, whose tensors name their dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str  # name of the member below data/
    type: _Type


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Element [i, j] is element offset + i * strides[0] + j * strides[1] of a storage."""

    key: str  # of the storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last that the tensor uses."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


class PickleShard:
    """One zip-format .bin file.

    Raises:
      CheckpointFileError: if the file is truncated or corrupt, in the format of torch before 1.6,
        wants any other function than those that build tensors, or holds anything but tensors.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        _check_magic(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                program = next((n for n in self._members if n.endswith("/data.pkl")), None)
                if program is None:
                    raise CheckpointFileError(
                        f"{path} must hold a data.pkl, as torch.save writes it"
                    )
                self._root = program.removesuffix("data.pkl")
                order = self._members.get(self._root + "byteorder")
                if order is not None and archive.read(order) != b"little":
                    raise CheckpointFileError(
                        f"{path} must be little-endian; save it again on x86 or Arm"
                    )
                with archive.open(program) as file:
                    content = _Unpickler(file, path).load()
            self._tensors = self._state_dict(content)
        except CheckpointFileError:
            raise
        # A damaged pickle can fail in whatever its next instruction happens to be.
        except Exception as error:
            raise _unreadable(path, error) from error
        self.sizes = {n: math.prod(t.shape) * t.dtype.itemsize for n, t in self._tensors.items()}

    def _state_dict(self, content: Any) -> dict[str, _Tensor]:
        # Some training scripts wrap what they save.
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        if not isinstance(content, Mapping):
            raise CheckpointFileError(
                f"{self.path} must hold a state dict, name -> tensor; "
                f"got a {type(content).__name__}"
            )
        others = [repr(k) for k, v in content.items() if not isinstance(v, _Rebuilt)]
        if others:
            raise CheckpointFileError(
                f"{self.path} must hold tensors only; these entries are none: "
                f"{', '.join(others[:12])}. Save model.state_dict() alone"
            )
        return {str(name): self._checked(str(name), rebuilt) for name, rebuilt in content.items()}

    def _checked(self, name: str, rebuilt: "_Rebuilt") -> _Tensor:
        # Only now, with the pickle's program over, are its values final.
        storage, dtype_name = rebuilt.storage, rebuilt.type.name
        if dtype_name not in _NAMES:
            raise CheckpointFileError(f"{self.path}: tensor {name!r} has no known dtype")
        tensor = _Tensor(
            key=str(storage.key),
            dtype=numpy_dtype(dtype_name),
            offset=_sizes([rebuilt.offset])[0],
            shape=_sizes(rebuilt.shape),
            strides=_sizes(rebuilt.strides),
        )
        member = self._members.get(f"{self._root}data/{tensor.key}")
        end = (tensor.offset + tensor.extent) * tensor.dtype.itemsize
        if member is None or end > member.file_size:
            raise CheckpointFileError(
                f"{self.path} is corrupt: tensor {name!r} reaches beyond its storage. "
                "Download it again"
            )
        return tensor

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            with open(self.path, "rb") as file, zipfile.ZipFile(file) as archive:
                for name, tensor in self._tensors.items():
                    yield name, self._read(file, archive, tensor)
        except (OSError, zipfile.BadZipFile, struct.error, ValueError) as error:
            raise _unreadable(self.path, error) from error

    def _read(self, file, archive: zipfile.ZipFile, tensor: _Tensor) -> np.ndarray:
        member = self._members[f"{self._root}data/{tensor.key}"]
        dtype, count = tensor.dtype, tensor.extent
        if member.compress_type == zipfile.ZIP_STORED:
            # Only the part in use is read: a storage may be shared by many views.
            file.seek(_data_start(file, member) + tensor.offset * dtype.itemsize)
            raw = np.empty(count, dtype)
            if file.readinto(raw.view(np.uint8)) != raw.nbytes:
                raise ValueError("the file ends within a tensor")
        else:
            raw = np.frombuffer(archive.read(member), dtype, count, tensor.offset * dtype.itemsize)
        strides = [s * dtype.itemsize for s in tensor.strides]
        # Inside `raw` by construction: the storage's bounds were checked when the file was opened.
        view = np.lib.stride_tricks.as_strided(raw, tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(tensor.shape)


class _Unpickler(pickle.Unpickler):
    """Builds `_Rebuilt`s. `find_class` knows every global a pickle may name; none has effects."""

    def __init__(self, file, path: pathlib.Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _UNTYPED:
            return _Type(None)
        if module == "torch" and name in _TYPES:
            return _Type(_TYPES[name])
        if (module, name) not in _FUNCTIONS:
            raise CheckpointFileError(
                f"{self._path} wants to load the Python object {module}.{name}. A checkpoint of "
                "plain tensors has no need of it, and it could run any code: refused, nothing was "
                "run. Use a safetensors file, or save model.state_dict() again in an environment "
                "that you trust"
            )
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _device, _count = pid
        if kind != "storage" or not isinstance(storage_type, _Type):
            raise CheckpointFileError(f"{self._path} must refer to storages only; got {kind!r}")
        return _Storage(str(key), storage_type)


@dataclasses.dataclass(frozen=True)
class _Rebuilt:
    """A tensor as the pickle describes it; nothing in it is checked."""

    storage: _Storage
    type: _Type
    offset: int
    shape: Any
    strides: Any


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return _Rebuilt(storage, storage.type, offset, shape, strides)


def _rebuild_tensor_with_dtype(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
    return _Rebuilt(storage, dtype, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks):
    return tensor


_UNTYPED = {("torch", "UntypedStorage"), ("torch.storage", "UntypedStorage")}
_FUNCTIONS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _sizes(values: Any) -> tuple[int, ...]:
    values = tuple(int(v) for v in values)
    if any(v < 0 for v in values):
        raise ValueError(f"offsets, sizes and strides must not be negative; got {values}")
    return values


def _data_start(file, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose own lengths may differ from the
    directory's (torch pads it, so that storages are aligned)."""
    file.seek(member.header_offset)
    header = file.read(30)  # PKWARE APPNOTE 4.3.7; lengths of name and extra field at 26 and 28
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name_length + extra_length


def _check_magic(path: pathlib.Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if magic[:2] == b"PK":
        return
    convert = (
        "Convert it where torch is installed: torch.save(torch.load('pytorch_model.bin', "
        "weights_only=True), 'converted.bin')"
    )
    # Protocol 2: how torch < 1.6 begins, with a pickled magic number.
    if magic[:2] == b"\x80\x02":
        raise CheckpointFileError(
            f"{path} must be a zip archive; it has the format of torch before 1.6. {convert}"
        )
    raise CheckpointFileError(
        f"{path} must be a zip archive, as torch.save writes it; it begins with {magic!r}. "
        "Download it again (a file of a few hundred bytes is often a Git LFS pointer)"
    )


def _unreadable(path: pathlib.Path, error: Exception) -> CheckpointFileError:
    return CheckpointFileError(
        f"{path} must be a whole torch checkpoint; it is truncated or corrupt ({error!r}). "
        "Download it again"
    )
