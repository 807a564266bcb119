"""Caches as files: all arrays come back, and decoding goes on; other files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import ROTARY, SCHEMES, make_cache, make_qkv

import nqkv_jax as nq

attend = jax.jit(lambda q, k, v, cache: nq.attend(q, k, v, cache, rotary=ROTARY))


@pytest.mark.parametrize("spec", SCHEMES)
def test_every_array_comes_back(spec, tmp_path):
    rng = np.random.default_rng(0)
    fill = lambda a: jnp.asarray(rng.integers(0, 2 if a.dtype == bool else 100, a.shape), a.dtype)
    cache = jax.tree.map(fill, make_cache(spec, max_len=52, num_layers=2))
    nq.save_cache(cache, tmp_path / "cache")
    loaded = nq.load_cache(tmp_path / "cache")
    chex.assert_trees_all_equal(loaded, cache)
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)


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


def test_where_and_what_cannot_be_written(tmp_path):
    cache = make_cache("nqkv", max_len=16)
    with pytest.raises(OSError, match=r"expected a file, not a folder; got "):
        nq.save_cache(cache, tmp_path)
    with pytest.raises(OSError, match=r"expected a file in a folder that exists; got .*no/cache"):
        nq.save_cache(cache, tmp_path / "no" / "cache")
    with pytest.raises(ValueError, match="expected a KVCache with arrays; got None"):
        nq.save_cache(None, tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a KVCache with arrays; got KVCache"):
        nq.save_cache(jax.eval_shape(lambda: cache), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ValueError, match=r"expected version 5 .* has 1\. Read the prompt again"):
        nq.load_cache(tmp_path / "cache")
