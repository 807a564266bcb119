"""Strict settings for the whole suite, and where the real weights and texts are."""

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees a module's compiled programs when it is done.

    XLA maps memory for every one of them, and a process may have 65,530 mappings (Linux'
    vm.max_map_count): beyond that the compiler dies of a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    from nqkv_jax import schemes
    from nqkv_jax.schemes import base

    schemes.names()  # all are there first: what is registered meanwhile would be lost
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of evaluation texts, where there is one beside the repository."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation texts at {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real model, float32; loaded once per process."""
    from nqkv_jax.models import from_pretrained
    from nqkv_jax.models.checkpoint import CheckpointNotFoundError

    try:
        return from_pretrained("smollm2-135m", dtype="float32", progress=False)
    except (CheckpointNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.fixture
def compile_quickly():
    """For tests whose time would go into optimizing programs that run for milliseconds.

    Not for tests that two programs store the same bits: those must hold with all optimizations.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
