"""Compilation for accelerators that are not there (`make test-aot`)."""

import targets  # noqa: F401  (sets up the environment; before anything imports jax)
