"""Strict settings for the whole suite, and where the real weights and texts are."""

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of evaluation texts, where there is one beside the repository."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation texts at {folder}")
    return folder
