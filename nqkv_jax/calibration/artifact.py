"""Calibrations as files: arrays, what they are, and which model they belong to.

One safetensors file holds the arrays by name and, in its metadata, one JSON object with the kind of
calibration, the version of its layout and whatever else its maker wants to know again. The bytes
depend on nothing but the contents.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from nqkv_jax.words import counted

_KEY = "nqkv_calibration"
_SAMPLE = 64  # elements of every parameter that its fingerprint looks at


def save(
    path: str | os.PathLike, kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping
) -> None:
    """Writes a calibration; an existing file is replaced in one step.

    Args:
      kind: and version of the layout, such as "kvquant 1": `load` asks for the same.
      arrays: by name.
      metadata: what JSON can hold.

    Raises: OSError: it cannot be written to `path`.
    """
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry only: safetensors writes several in any order.
    header = {_KEY: json.dumps(dict(kind=kind, **metadata), sort_keys=True)}
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    write(path, safetensors.numpy.save(arrays, header))


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, or replaces one, in one step: half of it is never there.

    Raises: OSError: it cannot be written, or what `path` names is no regular file.
    """
    # Root could put a file in the place of a device, which all other programs then miss.
    if path.exists() and not path.is_file():
        raise OSError(f"expected a regular file to replace, or none yet; got {path}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):  # it may not be there
            temporary.unlink()
        raise


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a calibration.

    The file is read once and again only if it changes; treat what comes as read-only. To look up
    what it lacks is a ValueError that names the file.

    Raises: ValueError: there is no such file, or it holds something else.
    """
    path = pathlib.Path(path).expanduser()
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(
            f"{kind.split()[0]}: the calibration {path} cannot be read: {error.strerror}"
        ) from error
    return _load(path, kind, status.st_mtime_ns, status.st_size)


def load_partial(
    partial: pathlib.Path, kind: str, setting: Mapping
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Like `load`, of what an interrupted calibration has left, with its "setting".

    Raises: ValueError: it was left by a calibration with another setting.
    """
    arrays, header = load(partial, kind)
    if header["setting"] != setting:
        differ = [
            f"{key}: {header['setting'].get(key)!r} there, {value!r} now"
            for key, value in setting.items()
            if header["setting"].get(key) != value
        ]
        raise ValueError(
            f"calibrate: {partial} was left by another call; these differ: {'; '.join(differ)}. "
            "Delete it, or write to another file"
        )
    return arrays, header


class _Contents(dict):
    """What a file holds, by name. Makers and schemes know what it must hold: they look it up."""

    def __init__(self, expected: str, contents: Mapping):
        super().__init__(contents)
        self._expected = expected

    def __missing__(self, name: str):
        raise self.wrong(f"it has no {name!r}")

    def wrong(self, problem: str) -> ValueError:
        """The error that says so."""
        return ValueError(f"{self._expected}; {problem}. Calibrate again")


@functools.lru_cache(maxsize=8)
def _load(path: pathlib.Path, kind: str, mtime: int, size: int):
    name = kind.split()[0]
    expected = f"{name}: {path} must be a calibration made by `nqkv calibrate {name}`"
    if path.is_dir():
        raise ValueError(f"{expected}; it is a folder")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if header is None:
                raise ValueError(f"{expected}; it is a safetensors file of something else")
            if not isinstance(header, dict):
                raise ValueError(f"{expected}; its header is no JSON object, but {header!r:.80}")
            header = _Contents(expected, header)
            if header["kind"] != kind:
                raise ValueError(f"{expected}, of kind {kind!r}; got {header['kind']!r}")
            return _Contents(expected, {key: file.get_tensor(key) for key in file.keys()}), header
    except safetensors.SafetensorError as error:
        raise ValueError(f"{expected}; it is no safetensors file ({error})") from error
    except AttributeError as error:  # a dtype that NumPy does not have
        raise ValueError(f"{expected}; it has arrays of another kind ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}; its header is no JSON ({error})") from error


def fingerprint(params: Any) -> str:
    """Hexadecimal digest of a model's weights: of the first elements of each, as bfloat16.

    Loading the same checkpoint as float32 or as bfloat16 makes no difference.
    """
    digest = hashlib.sha256(str([a.shape for a in jax.tree.leaves(params)]).encode())
    digest.update(np.asarray(_sample(params)).tobytes())
    return digest.hexdigest()


@jax.jit
def _sample(params: Any) -> jax.Array:
    """u16[n], the bits of the first elements along the last axis."""
    rows = [
        a[(0,) * (a.ndim - 1)][:_SAMPLE] if a.ndim else a[None] for a in jax.tree.leaves(params)
    ]
    rows = [jax.lax.bitcast_convert_type(r.astype(jnp.bfloat16), jnp.uint16) for r in rows]
    return jnp.concatenate(rows)


def check_model(name: str, metadata: Mapping, lm: Any) -> None:
    """Raises ValueError unless `lm` has the weights whose fingerprint `metadata` holds.

    Args: name: of the scheme.  metadata: with "model" and "fingerprint".
    """
    if fingerprint(lm.params) != metadata["fingerprint"]:
        raise ValueError(
            f"{name}: the calibration was made on {metadata['model']}, and must be used with the "
            f"same weights; those of {lm.name} are others. Run `nqkv calibrate {name} --model "
            f"{lm.name} ...`"
        )


def check_shape(name: str, metadata: Mapping, shape: Any) -> None:
    """Raises ValueError unless a layer's shape is that of the calibrated model.

    Args: name: of the scheme.  metadata: as `load` gives it.  shape: a `LayerShape`.
    """
    for size in ("num_kv_heads", "head_dim", "num_layers"):
        if type(metadata[size]) is not int or metadata[size] < 1:
            raise metadata.wrong(f"its {size} is no number >= 1, but {metadata[size]!r:.80}")
    heads, head_dim = metadata["num_kv_heads"], metadata["head_dim"]
    # A cache may have fewer layers than the model: `check_model` sees whether it is the same.
    if (shape.num_kv_heads, shape.head_dim) != (heads, head_dim) or (
        shape.num_layers > metadata["num_layers"]
    ):
        raise ValueError(
            f"{name}: the calibration was made on {metadata['model']} with "
            f"{counted(metadata['num_layers'], 'layer')} of {counted(heads, 'KV head')} x "
            f"{head_dim}; got {counted(shape.num_layers, 'layer')} of {shape.num_kv_heads} x "
            f"{shape.head_dim}. Calibrate the model that is used"
        )


# What the numbers of a layer may have to be.
_LAWS = {
    "finite": lambda x: True,
    "positive": lambda x: np.all(x > 0),
    "ascending": lambda x: np.all(np.diff(x) >= 0),
}


def check_arrays(
    arrays: Mapping, metadata: Mapping, layer: int, expected: Mapping[str, tuple[Any, tuple, str]]
) -> None:
    """Raises ValueError unless arrays are what is expected of them.

    Args:
      arrays, metadata: as `load` gives them, and `check_shape` has passed.
      layer: whose numbers are looked at.
      expected: by name, the dtype and the shape of a layer, and what its numbers are, in a word:
        "finite", and also "positive" or "ascending".
    """
    for name, (dtype, shape, law) in expected.items():
        array, shape = arrays[name], (metadata["num_layers"], *shape)
        if array.dtype != dtype or array.shape != shape:
            problem = f"got {array.dtype} {array.shape}"
        elif not np.all(np.isfinite(array[layer])) or not _LAWS[law](array[layer]):
            problem = f"in layer {layer} it is not"
        else:
            continue
        raise arrays.wrong(f"{name!r} must be {np.dtype(dtype)} {shape} and {law}; {problem}")
