"""Caches as files: all arrays come back, and decoding goes on; other files."""

import json
import os
import stat

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import EACH_SCHEME, ROTARY, make_cache, make_qkv

import nqkv_jax as nq

attend = jax.jit(lambda q, k, v, cache: nq.attend(q, k, v, cache, rotary=ROTARY))


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_every_array_comes_back(spec, tmp_path):
    rng = np.random.default_rng(0)
    fill = lambda a: jnp.asarray(rng.integers(0, 2 if a.dtype == bool else 100, a.shape), a.dtype)
    cache = jax.tree.map(fill, make_cache(spec, max_len=52, num_layers=2))
    nq.save_cache(cache, tmp_path / "cache")
    loaded = nq.load_cache(tmp_path / "cache")
    chex.assert_trees_all_equal(loaded, cache)
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)


def test_arrays_of_any_strides_come_back(tmp_path):
    fill = lambda a: np.arange(a.size).reshape(a.shape[::-1]).astype(a.dtype).T
    cache = jax.tree.map(fill, make_cache("nqkv", max_len=16))
    nq.save_cache(cache, tmp_path / "cache")
    chex.assert_trees_all_equal(nq.load_cache(tmp_path / "cache"), cache)


def test_sizes_may_be_numbers_of_numpy(tmp_path):
    sizes = dict(num_layers=2, batch=1, max_len=600, num_kv_heads=2, head_dim=32)
    init = nq.schemes.get("nqkv:block_size=32").init
    cache = init(**sizes, windows=[300, None])
    same = init(**{n: np.int64(a) for n, a in sizes.items()}, windows=[np.int64(300), None])
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    nq.save_cache(same, tmp_path / "cache")
    chex.assert_trees_all_equal(nq.load_cache(tmp_path / "cache"), cache)


@pytest.mark.parametrize("spec", ["nqkv-plus:fused=False,group_size=16,recent=8"])
def test_goes_on_from_a_file(spec, tmp_path):
    q, k, v = make_qkv(49)
    _, cache = attend(q[:, :48], k[:, :48], v[:, :48], make_cache(spec, max_len=52))
    nq.save_cache(cache, tmp_path / "cache")
    loaded = nq.load_cache(tmp_path / "cache")
    now = [a[:, 48:] for a in (q, k, v)]
    np.testing.assert_array_equal(attend(*now, loaded)[0], attend(*now, cache)[0])


def test_keeps_bfloat16_and_counts_of_a_ragged_batch(tmp_path):
    cache = make_cache("nqkv:sinks=2,residual=8", max_len=16, num_layers=2, dtype=jnp.bfloat16)
    q, k, v = make_qkv(12)
    for layer in (0, 1):
        num_new = jnp.asarray([12, 5])
        _, cache = jax.jit(nq.attend, static_argnames="layer")(
            q, k, v, cache, layer=layer, num_new=num_new
        )
    nq.save_cache(cache, tmp_path / "cache")
    loaded = nq.load_cache(tmp_path / "cache")
    chex.assert_trees_all_equal_dtypes(loaded, cache)
    assert loaded.lengths.tolist() == [12, 5] and loaded.nbytes == cache.nbytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as safetensors: .*No such file"),
        (b"no tensors", "cannot be read as safetensors"),
        (safetensors.numpy.save({"a": np.zeros(3)}), "must be a file of save_cache"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "cache"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        nq.load_cache(path)


ABOUT = dict(
    version=6, scheme="nqkv", num_layers=1, batch=2, max_len=16, num_kv_heads=2, head_dim=32,
    dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "is damaged: its metadata are no JSON: Expecting property name"),
        ("[5]", "must be a file of save_cache; it is another"),
        ({"version": 6}, "metadata lack scheme, dtype, num_layers, batch, max_len, num_kv_heads"),
        (ABOUT | {"scheme": None}, r"can be made here; .* expected a name .*; got None"),
        (ABOUT | {"scheme": "gone"}, "can be made here; unknown scheme 'gone'"),
        (ABOUT | {"scheme": "kvquant:calibration=gone"}, "the calibration gone cannot be read"),
        (ABOUT | {"dtype": "float"}, "expected dtype to be one of float16,"),
        (ABOUT | {"dtype": "f99"}, "can be made here; data type 'f99' not understood"),
        (ABOUT | {"max_len": "16"}, "expected max_len >= 1, a whole number; got '16'"),
        (ABOUT | {"max_len": 2**70}, "can be made here; "),
        (ABOUT, "nqkv stores a as nothing"),  # the rest is as it should be
    ],
)
def test_damaged_metadata_are_refused(about, message, tmp_path):
    about = about if isinstance(about, str) else json.dumps(about)
    path = tmp_path / "cache"
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, {"nqkv_cache": about}))
    with pytest.raises(ValueError, match=f"^load_cache: .*{message}") as caught:
        nq.load_cache(path)
    assert str(path) in str(caught.value)


def test_files_of_dtypes_that_numpy_lacks_are_refused(tmp_path):
    header = json.dumps({"a": dict(dtype="F8_E8M0", shape=[8], data_offsets=[0, 8])}).encode()
    path = tmp_path / "scales"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="scales must be a file of save_cache; it is another"):
        nq.load_cache(path)


def test_files_are_replaced_as_any_program_writes_them(tmp_path, monkeypatch):
    path, before = tmp_path / "cache", os.umask(0o027)
    try:
        nq.save_cache(make_cache("nqkv", max_len=16), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    content = path.read_bytes()

    def replace(source, target):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        nq.save_cache(make_cache("int4", max_len=16), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content


def test_what_is_no_file_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"expected a regular file to replace, .*; got .*pipe"):
        nq.save_cache(make_cache("nqkv", max_len=16), path)
    assert list(tmp_path.iterdir()) == [path] and path.is_fifo()


def test_where_and_what_cannot_be_written(tmp_path):
    cache = make_cache("nqkv", max_len=16)
    with pytest.raises(OSError, match=r"expected a file, not a folder; got "):
        nq.save_cache(cache, tmp_path)
    with pytest.raises(OSError, match=r"expected a file in a folder that exists; got .*no/cache"):
        nq.save_cache(cache, tmp_path / "no" / "cache")
    with pytest.raises(OSError, match="name too long"):  # that of the temporary file
        nq.save_cache(cache, tmp_path / ("c" * 255))
    with pytest.raises(ValueError, match="expected a KVCache with arrays; got None"):
        nq.save_cache(None, tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a KVCache with arrays; got KVCache"):
        nq.save_cache(jax.eval_shape(lambda: cache), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"got one that jax\.jit .* traces\. Return it from"):
        jax.jit(lambda cache: nq.save_cache(cache, tmp_path / "cache"))(cache)
    for path in (None, 3, b"cache"):
        with pytest.raises(ValueError, match=r"^save_cache: expected the path of a file, .*; got "):
            nq.save_cache(cache, path)
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_is_a_file(tmp_path):
    with pytest.raises(ValueError, match="expected a file of save_cache; got a folder, "):
        nq.load_cache(tmp_path)
    for path in (None, 3, b"cache", make_cache("nqkv", max_len=16)):
        with pytest.raises(ValueError, match=r"^load_cache: expected the path of a file, .*; got "):
            nq.load_cache(path)


def test_another_layout_is_refused(tmp_path, monkeypatch):
    nq.save_cache(make_cache("nqkv", max_len=16), tmp_path / "cache")
    other = nq.schemes.get("nqkv:bits=3")
    monkeypatch.setattr("nqkv_jax.saving.schemes.get", lambda spec: other)
    with pytest.raises(ValueError, match=r"codes as uint8\[2, 16, 1, 2, 12\]; .* holds uint8\[2, "):
        nq.load_cache(tmp_path / "cache")


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nqkv_jax.saving._VERSION", 1)
    nq.save_cache(make_cache("nqkv", max_len=16), tmp_path / "cache")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"expected version 6 .* has 1\. Read the prompt again"):
        nq.load_cache(tmp_path / "cache")
