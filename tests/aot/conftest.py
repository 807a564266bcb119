"""Compilation for accelerators that are not there (`make test-aot`)."""

import pytest
import targets  # noqa: F401  (sets up the environment; before anything imports jax)


@pytest.fixture(autouse=True)
def optimizations():
    """All: what is compiled here is what runs."""
