"""Checkpoints of a few numbers, as the tests of readers write and compare them."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "opt"}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(4, 6)).astype(np.float32),
        "a.bias": rng.normal(size=4).astype(np.float16),
        "b.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b.scalar": np.array(3, np.int64),
    }


def folder_with(path: pathlib.Path, **files) -> pathlib.Path:
    """A folder with a config and the given files: name -> state dict (saved as safetensors)."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, state in files.items():
        save_file(state, path / f"{name}.safetensors")
    return path


def sharded(path: pathlib.Path, suffix: str, save) -> pathlib.Path:
    """Two shards and their index."""
    folder_with(path)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    state, index = tensors(), {}
    for i, names in enumerate((["a.weight", "b.scalar"], ["a.bias", "b.weight"]), start=1):
        file = f"{stem}-{i:05d}-of-00002.{suffix}"
        save({name: state[name] for name in names}, path / file)
        index |= dict.fromkeys(names, file)
    index_name = f"{stem}.{suffix}.index.json"
    (path / index_name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def save_bin(state, path):
    """torch.save of numpy arrays."""
    torch = pytest.importorskip("torch", reason="writing .bin files needs torch")

    def tensor(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
        return torch.tensor(array)

    torch.save({name: tensor(array) for name, array in state.items()}, path)


def assert_same(checkpoint, expected):
    found = dict(checkpoint.tensors())
    assert sorted(found) == sorted(expected) == sorted(checkpoint.names())
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert checkpoint.nbytes == sum(array.nbytes for array in expected.values())
