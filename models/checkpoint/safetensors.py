"""Reads .safetensors files: a JSON header and raw tensors."""

import math
import pathlib
from collections.abc import Iterator

# Importing it teaches numpy the name "bfloat16", by which `safetensors` asks for the dtype.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from nqkv_jax.models.checkpoint.base import CheckpointFileError, numpy_dtype

# Names of https://github.com/huggingface/safetensors#format; float8 and below come with scales that
# only the quantization library which wrote them can apply.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class SafetensorsShard:
    """One .safetensors file.

    Raises: CheckpointFileError if the file is truncated, corrupt, or has tensors of other dtypes.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.sizes: dict[str, int] = {}
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    dtype = tensor.get_dtype()
                    if dtype not in _DTYPES:
                        raise CheckpointFileError(
                            f"{path}: tensor {name!r} must be one of {sorted(_DTYPES)}; "
                            f"got {dtype}. Use a checkpoint whose weights are not quantized"
                        )
                    size = numpy_dtype(_DTYPES[dtype]).itemsize
                    self.sizes[name] = size * math.prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            for name in self.sizes:
                # Mapped anew for every tensor: what was read of a mapping stays in memory until it
                # is closed, and would add up to the whole shard. Opening costs one small header.
                with safe_open(self.path, framework="np") as file:
                    array = file.get_tensor(name)
                yield name, array
                del array  # before the next one is read
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


def _unreadable(path: pathlib.Path, error: Exception) -> CheckpointFileError:
    return CheckpointFileError(
        f"{path} must be a whole safetensors file; it is truncated or corrupt ({error}). "
        "Download it again"
    )
