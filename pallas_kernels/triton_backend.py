"""Pallas's Triton backend, which jax has deprecated: where it is gone, XLA does what it would."""

import jax
import jax.numpy as jnp

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:
    pltriton = None

# What asks for these kernels: those of attention that GPUs have. None is automatic as long as none
# has been timed.
ASKING = ("mosaic_gpu", "triton")


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap), by exponentials; None for no cap."""
    if soft_cap is None:
        return scores
    x = scores * jnp.float32(1 / soft_cap)
    return jnp.float32(soft_cap) * (2 / (1 + jnp.exp(-2 * x)) - 1)


def missing() -> str | None:
    """What kernels by Triton would need here, or None if it is there."""
    if pltriton is None:
        return f"the Triton backend of Pallas, which jax {jax.__version__} does not have"
    return None
