"""QuaRot's cache: a Hadamard transform of every head, then asymmetric integers per token and head.

The transform spreads the outliers of single channels over the head. On keys it acts after RoPE and
is folded into the queries; on values it is undone on the output. One scale and one zero per token
and head: bits + 32 / head_dim (bits + 16 / head_dim with `symmetric`).

With `heads_per_group` > 1 the keys follow RotateKV instead: they are taken before RoPE, and so many
heads are transformed together. Such keys must be decoded before they meet a query, so nothing is
folded. RotateKV's reordering of channels, which is calibrated, is not here.

Source: Ashkboos et al. (2024), QuaRot, arXiv 2404.00456; Su et al. (2025), RotateKV, arXiv
2501.16383. QuaRot clips at 0.95 of the range; there is no clipping here.
"""

from typing import Literal

from nqkv_jax import codebooks, hadamard
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.transforms import Hadamard, Transformed
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import LayerScheme, block_window
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import any_rotation, check_hadamard


@register("quarot")
def quarot(
    *,
    bits: Literal[2, 3, 4, 8] = 4,
    symmetric: bool = False,
    heads_per_group: int = 1,
    sinks: int = 0,
    residual: int = 0,
):
    """Hadamard transform per head, then asymmetric integers with one scale per token and head."""
    if heads_per_group < 1:
        raise ValueError(
            f"quarot: expected heads_per_group >= 1; got {heads_per_group}. Take heads_per_group=1"
        )
    window, together = block_window("quarot", residual), heads_per_group > 1
    codebook, scale = (
        (codebooks.integer(bits), "absmax") if symmetric else (codebooks.uniform(bits), "minmax")
    )

    def layer(shape):
        check_hadamard("quarot", shape.head_dim, "int8" if bits == 8 else any_rotation(bits))
        if heads_per_group not in (fitting := _groups(shape)):
            raise ValueError(
                "quarot: expected heads_per_group heads that have a Hadamard transform together, "
                f"one of {', '.join(map(str, fitting))} for {shape.num_kv_heads} heads of "
                f"{shape.head_dim}; got {heads_per_group}. Take heads_per_group="
                f"{max(n for n in fitting if n <= heads_per_group)}"
            )
        plain = BlockQuantizer(codebook, block_size=shape.head_dim, scale=scale)
        key = Transformed(plain, (Hadamard(size=heads_per_group * shape.head_dim),))
        return LayerScheme(
            key=Unrotated(key) if together else key,
            value=Transformed(plain, (Hadamard(),)),
            sinks=sinks,
            key_window=window,
            value_window=window,
        )

    return layer


def _groups(shape) -> list[int]:
    """How many heads may be transformed together."""
    divides = (n for n in range(1, shape.num_kv_heads + 1) if shape.num_kv_heads % n == 0)
    return [n for n in divides if hadamard.core_size(n * shape.head_dim)]
