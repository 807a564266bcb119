"""pytorch_model.bin, read without torch: layouts, and files that want to run code."""

import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import assert_same, folder_with, save_bin, tensors

from nqkv_jax.models.checkpoint import (
    CheckpointFileError,
    open_checkpoint,
)


def test_bin_views_and_layouts(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .bin files needs torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    parameter = torch.nn.Parameter(torch.randn(3, 2).to(torch.float16))
    state = {
        "plain": base,
        "tied": base,
        "transposed": base.T,
        "sliced": base[2:5, 1::3],
        "expanded": base[0, :1].expand(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": parameter,
        "bfloat16": torch.randn(5).to(torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),  # stored untyped, with its dtype
        "conv": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    folder_with(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = dict(open_checkpoint(tmp_path).tensors())
    assert list(found) == list(state)
    for name, tensor in state.items():
        expected = tensor.detach()
        if name == "bfloat16":
            assert found[name].dtype == ml_dtypes.bfloat16
            expected, found[name] = expected.float(), found[name].astype(np.float32)
        assert found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], expected.numpy(), err_msg=name)
        assert found[name].shape == tuple(tensor.shape)


def test_bin_of_a_module_and_of_a_training_state(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .bin files needs torch")
    module = torch.nn.Linear(3, 2)
    folder_with(tmp_path)
    for content in (module.state_dict(), {"state_dict": module.state_dict(), "epoch": 3}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        expected = {k: v.numpy() for k, v in module.state_dict().items()}
        assert_same(open_checkpoint(tmp_path), expected)


def test_compressed_bin(tmp_path):
    folder_with(tmp_path)
    save_bin(tensors(), tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert_same(open_checkpoint(tmp_path), tensors())


def write_bin(path: pathlib.Path, program: bytes, **storages: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"\.system"), (eval, r"\.eval"), (getattr, r"\.getattr")],
    ids=["system", "eval", "getattr"],
)
def test_bin_that_wants_to_run_code(tmp_path, function, name, protocol):
    proof = tmp_path / "it_ran"
    argument = {
        os.system: (f"touch {proof}",),
        eval: (f"open({str(proof)!r}, 'w')",),
        getattr: (proof, "touch"),
    }[function]
    program = pickle.dumps({"weight": Malicious(function, *argument)}, protocol=protocol)
    folder_with(tmp_path)
    write_bin(tmp_path / "pytorch_model.bin", program)
    with pytest.raises(CheckpointFileError, match=rf"{name}.*refused, nothing was run"):
        open_checkpoint(tmp_path)
    assert not proof.exists()
    # The program is harmful: without the restricted unpickler it does run.
    if function is os.system:
        pickle.loads(program)
        assert proof.exists()


def torch_program(storage=b"FloatStorage", offset=b"K\0", shape=b"K\2\x85", strides=b"K\1\x85"):
    """The pickle of {"w": tensor}, as torch writes it, over the storage "0" of four elements."""
    return (
        b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n"
        + storage + b"\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ" + offset + shape + strides
        + b"\x89NtRs."
    )  # fmt: skip


def test_handmade_bin(tmp_path):
    folder_with(tmp_path)
    path, content = tmp_path / "pytorch_model.bin", np.arange(4, dtype=np.float32).tobytes()
    write_bin(path, torch_program(offset=b"K\1"), **{"0": content})
    assert_same(open_checkpoint(path), {"w": np.array([1, 2], np.float32)})
    # Members of a zip archive are not aligned in general; nor must the reader depend on it.
    for damaged in (
        torch_program(offset=b"K\3"),  # the second element lies beyond the storage
        torch_program(strides=b"K\xff\x85"),
        torch_program(offset=b"J\xff\xff\xff\xff"),  # -1
        torch_program(strides=b"J\xff\xff\xff\xff\x85"),
        torch_program(shape=b"K\2K\2\x86"),  # more axes than strides
        torch_program()[:-20],
        b"",
    ):
        write_bin(path, damaged, **{"0": content})
        with pytest.raises(CheckpointFileError, match=r"pytorch_model\.bin.*corrupt"):
            open_checkpoint(path)
    write_bin(path, torch_program(storage=b"QInt8Storage"), **{"0": content})
    with pytest.raises(CheckpointFileError, match=r"torch\.QInt8Storage"):
        open_checkpoint(path)
    write_bin(path, pickle.dumps({"epoch": 3, "lr": 0.1}))
    with pytest.raises(CheckpointFileError, match=r"tensors only.*'epoch', 'lr'"):
        open_checkpoint(path)
    write_bin(path, pickle.dumps([1]))
    with pytest.raises(CheckpointFileError, match=r"must hold a state dict.*got a list"):
        open_checkpoint(path)


def test_bin_of_other_formats(tmp_path):
    folder_with(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(CheckpointFileError, match=r"torch before 1\.6.*torch\.save\(torch\.load"):
        open_checkpoint(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointFileError, match="Git LFS"):
        open_checkpoint(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointFileError, match=r"must hold a data\.pkl"):
        open_checkpoint(tmp_path)
    path.write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(CheckpointFileError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)
