"""Compilation for accelerators that are not there (`make test-aot`)."""

import gc

import pytest
import targets  # noqa: F401  (sets up the environment; before anything imports jax)


@pytest.fixture(autouse=True)
def optimizations():
    """All: what is compiled here is what runs."""


@pytest.fixture(autouse=True)
def memory():
    """What a test compiled is gone after it: all together would be tens of gigabytes."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()
