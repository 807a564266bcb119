"""Caches as files: a long prompt that was read once can be gone on from later.

One safetensors file holds every array of a cache under its path in the tree, and in its metadata
the scheme and the sizes, from which the tree is built again. A calibrated scheme needs its
calibration where it was.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache
from nqkv_jax.calibration import artifact
from nqkv_jax.checks import file_path

_KEY = "nqkv_cache"  # of the metadata
_VERSION = 6  # of the names and shapes of arrays, and of what is in them
_SIZES = ("num_layers", "batch", "max_len", "num_kv_heads", "head_dim")


def save_cache(cache: KVCache, path: str | os.PathLike) -> None:
    """Writes `cache`, as it is, to one safetensors file; an existing one is replaced in one step.

    Until it is written, the host holds all its bytes.

    Raises:
      ValueError: a flush was put off (`KVCache.defer_flush`), and has not come since; it is no
        cache with arrays, or one that is traced; `path` is no path.
      OSError: it cannot be written to `path`, or what is there is no regular file.
    """
    if not isinstance(cache, KVCache) or not all(
        isinstance(a, jax.Array | np.ndarray) for a in jax.tree.leaves(cache)
    ):
        raise ValueError(f"save_cache: expected a KVCache with arrays; got {cache!r:.200}")
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(cache)):
        raise ValueError(
            "save_cache: expected a cache whose numbers are known; got one that jax.jit or another "
            "transformation traces. Return it from the function, and save what comes back"
        )
    path = file_path("save_cache", path)
    for layer in cache.layers:
        layer.check_flushed()
    layer = cache.layers[0]
    about = dict(
        version=_VERSION,
        scheme=cache.scheme,
        num_layers=len(cache.layers),
        batch=cache.batch,
        max_len=cache.max_len,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        windows=[layer.window for layer in cache.layers],
        dtype=layer.dtype.name,
    )
    if path.is_dir() or not path.parent.is_dir():
        what = "a file, not a folder" if path.is_dir() else "a file in a folder that exists"
        raise OSError(f"save_cache: expected {what}; got {path}")
    # safetensors writes the memory of an array, whatever its strides say.
    arrays = {name: np.asarray(a, order="C") for name, a in _arrays(cache).items()}
    artifact.write(path, safetensors.numpy.save(arrays, {_KEY: json.dumps(about)}))


def load_cache(path: str | os.PathLike) -> KVCache:
    """The cache that `save_cache` wrote, with what a new one has of `with_implementation` and
    `defer_flush`.

    Raises: ValueError: `path` is no path, there is no such file, it holds something else, its
      scheme cannot be had (for want of the calibration, say), or now stores other arrays (the
      message names the first).
    """
    path = file_path("load_cache", path)
    if path.is_dir():
        raise ValueError(f"load_cache: expected a file of save_cache; got a folder, {path}")
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            about = (file.metadata() or {}).get(_KEY)
            # Another file may hold much, or what NumPy has no dtype for.
            arrays = {} if about is None else {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"load_cache: {path} cannot be read as safetensors: {error}") from error
    scheme, like = _described(about, path)
    expected = _arrays(like)
    for name in sorted(expected.keys() | arrays.keys()):
        stored, wanted = arrays.get(name), expected.get(name)
        shape = lambda a: "nothing" if a is None else f"{a.dtype.name}{list(a.shape)}"
        if shape(stored) != shape(wanted):
            raise ValueError(
                f"load_cache: {scheme} stores {name} as {shape(wanted)}; {path} holds "
                f"{shape(stored)}. It was written with another version, or calibration"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _described(about: str | None, path: pathlib.Path) -> tuple[schemes.Scheme, KVCache]:
    """The scheme, and the cache as shapes, that the metadata of a file tell of."""
    try:
        about = json.loads(about or "null")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"load_cache: {path} is damaged: its metadata are no JSON: {error}"
        ) from error
    if not isinstance(about, dict) or "version" not in about:
        raise ValueError(f"load_cache: {path} must be a file of save_cache; it is another")
    if about["version"] != _VERSION:
        raise ValueError(
            f"load_cache: expected version {_VERSION} of the format; {path} has "
            f"{about['version']}. Read the prompt again, and save it anew"
        )
    if missing := [name for name in ("scheme", "dtype", *_SIZES) if name not in about]:
        raise ValueError(f"load_cache: {path} is damaged: its metadata lack {', '.join(missing)}")
    try:
        scheme = schemes.get(about["scheme"])
        sizes = {name: about[name] for name in _SIZES}
        sizes["windows"] = about.get("windows")
        return scheme, scheme.abstract(**sizes, dtype=jnp.dtype(about["dtype"]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"load_cache: {path} must tell of a cache that can be made here; {error}"
        ) from error


def _arrays(cache: KVCache) -> dict[str, jax.Array]:
    """By path, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path).lstrip("."): a for path, a in leaves}
