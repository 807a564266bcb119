"""Strict settings for the whole suite, and where the real weights and texts are."""

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # see `optimizations`

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees a module's compiled programs when it is done.

    XLA maps memory for every one of them, and a process may have 65,530 mappings (Linux'
    vm.max_map_count): beyond that the compiler dies of a segmentation fault.
    """
    # What fixtures of a module compute must not depend on the test before: see `optimizations`.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def optimizations(request):
    """Most tests do without most of LLVM's: their programs run for milliseconds, and compile for
    seconds.

    Those marked `optimized` have all, and all with the real model, which runs for longer.
    """
    whole = request.node.get_closest_marker("optimized") or "smollm2" in request.fixturenames
    if jax.config.read("jax_disable_most_optimizations") == bool(whole):
        jax.config.update("jax_disable_most_optimizations", not whole)
        jax.clear_caches()  # which does not mind with what a program was compiled


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    from nqkv_jax import schemes
    from nqkv_jax.schemes import registry

    schemes.names()  # all are there first: what is registered meanwhile would be lost
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


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
