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
import safetensors.flax

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache

_KEY = "nqkv_cache"  # of the metadata
_VERSION = 5  # of the names and shapes of arrays, and of what is in them


def save_cache(cache: KVCache, path: str | os.PathLike) -> None:
    """Writes `cache`, as it is, to one safetensors file; an existing one is replaced.

    Raises:
      ValueError: a flush was put off (`KVCache.defer_flush`), and has not come since; or it is no
        cache with arrays.
      OSError: it cannot be written to `path`.
    """
    if not isinstance(cache, KVCache) or not all(
        isinstance(a, jax.Array | np.ndarray) for a in jax.tree.leaves(cache)
    ):
        raise ValueError(f"save_cache: expected a KVCache with arrays; got {cache!r:.200}")
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
        dtype=layer.dtype.name,
    )
    path = pathlib.Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "a file, not a folder" if path.is_dir() else "a file in a folder that exists"
        raise OSError(f"save_cache: expected {what}; got {path}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    safetensors.flax.save_file(_arrays(cache), temporary, {_KEY: json.dumps(about)})
    os.replace(temporary, path)


def load_cache(path: str | os.PathLike) -> KVCache:
    """The cache that `save_cache` wrote, with what a new one has of `with_implementation` and
    `defer_flush`.

    Raises: ValueError: there is no such file, it holds something else, or the scheme now stores
      other arrays (the message names the first).
    """
    path = pathlib.Path(path).expanduser()
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"load_cache: {path} cannot be read as safetensors: {error}") from error
    if not isinstance(about, dict) or "version" not in about:
        raise ValueError(f"load_cache: {path} must be a file of save_cache; it is another")
    if (version := about.pop("version")) != _VERSION:
        raise ValueError(
            f"load_cache: expected version {_VERSION} of the format; {path} has {version}. Read "
            "the prompt again, and save it anew"
        )
    scheme = schemes.get(about.pop("scheme"))
    like = scheme.abstract(**about | dict(dtype=jnp.dtype(about["dtype"])))
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


def _arrays(cache: KVCache) -> dict[str, jax.Array]:
    """By path, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path).lstrip("."): a for path, a in leaves}
