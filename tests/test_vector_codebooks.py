"""The codebooks of vectors: nearest entries, the command that makes them, the file that ships."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax import vector_codebooks
from nqkv_jax.calibration import artifact, codebook
from nqkv_jax.cli import main


@pytest.mark.parametrize("bits", vector_codebooks.BITS)
def test_nearest_is_the_nearest_in_any_order_of_summation(bits):
    rng = np.random.default_rng(7)
    words = vector_codebooks.normal(bits)
    assert words.shape == (256, 8) and words.dtype == np.float32
    np.testing.assert_array_equal(words * 32, np.round(words * 32))
    np.testing.assert_array_equal(words, np.asarray(words, jnp.bfloat16))
    assert len(np.unique(words, axis=0)) == 256
    x = rng.standard_normal((500, 8))
    x = np.float32(np.abs(x) if bits == 2 else x)
    norm = float(np.linalg.norm(x, axis=1).max())
    code = np.asarray(vector_codebooks.nearest(jnp.asarray(x), words, norm=norm))
    distance = np.sum((np.float64(x)[:, None] - words) ** 2, axis=-1)
    best = distance.min(axis=1)
    np.testing.assert_allclose(distance[np.arange(500), code], best, atol=1e-3)
    assert np.mean(code == distance.argmin(axis=1)) > 0.99
    # Channels the other way round are added in the other order.
    turned = vector_codebooks.nearest(jnp.asarray(x[:, ::-1]), words[:, ::-1], norm=norm)
    np.testing.assert_array_equal(turned, code)
    np.testing.assert_array_equal(
        vector_codebooks.nearest(jnp.asarray(words), words, norm=8.0), np.arange(256)
    )


def test_codebook_of_other_widths_is_refused():
    with pytest.raises(ValueError, match="bits must be 1 or 2; got 3"):
        vector_codebooks.normal(3)


def test_the_command_is_deterministic(tmp_path, capsys):
    small = codebook.Settings(seed=3, samples=2048, iterations=4, steps=6, batch=8)
    options = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(small).items()]
    path = tmp_path / "codebook.safetensors"
    assert main(["codebook", "--out", str(path), *options, "--json", "--no-progress"]) == 0
    made = json.loads(capsys.readouterr().out)
    arrays, recipe = artifact.load(path, codebook.KIND)
    assert recipe["settings"] == made["settings"] == dataclasses.asdict(small)
    assert {n: (a.shape, a.dtype.name) for n, a in arrays.items()} == dict(
        words1=((256, 8), "int8"), words2=((256, 8), "int8")
    )
    for bits in vector_codebooks.BITS:
        again = codebook.train(bits, small, progress=False)
        np.testing.assert_array_equal(arrays[f"words{bits}"] / np.float32(32), again)
    assert np.any(again != codebook.train(2, dataclasses.replace(small, seed=4), progress=False))
    # So few samples make a worse codebook, and no bad one.
    assert 0.75 < recipe["cosine"]["1"] < 0.82 and 0.93 < recipe["cosine"]["2"] < 0.951


@pytest.mark.parametrize(
    "options, message",
    [
        (("--samples", "100"), "samples must be at least 256"),
        (("--samples", "20000"), "a multiple of 16384"),
        (("--iterations", "0"), "iterations >= 1"),
        (("--learning-rate", "nan"), "learning_rate must be positive; got nan"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, options, message):
    out = tmp_path / "x.safetensors"
    assert main(["codebook", "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def shipped():
    path = pathlib.Path(vector_codebooks.__file__).with_name(vector_codebooks.FILE)
    return artifact.load(path, codebook.KIND)


def test_the_file_of_the_package_says_how_it_was_made():
    """By the command with its defaults, and with the quality that it records."""
    arrays, recipe = shipped()
    assert recipe["settings"] == dataclasses.asdict(codebook.Settings())
    assert set(recipe["versions"]) == {"jax", "optax"}
    for bits in vector_codebooks.BITS:
        words = arrays[f"words{bits}"].astype(np.float32) * recipe["step"]
        np.testing.assert_array_equal(words, vector_codebooks.normal(bits))
        found = codebook.cosine(words, bits, seed=recipe["settings"]["seed"] + 1)
        assert found == pytest.approx(recipe["cosine"][str(bits)], abs=2e-5)


@pytest.mark.slow
def test_the_file_of_the_package_comes_from_the_command():
    """Bit for bit with the recorded versions on one machine; of one quality anywhere."""
    arrays, recipe = shipped()
    for bits in vector_codebooks.BITS:
        words = codebook.train(bits, progress=False)
        found = codebook.cosine(words, bits, seed=recipe["settings"]["seed"] + 1)
        assert found == pytest.approx(recipe["cosine"][str(bits)], abs=3e-4)
        np.testing.assert_allclose(words.mean(), arrays[f"words{bits}"].mean() / 32, atol=2e-3)
