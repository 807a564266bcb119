"""What is asked of the shape of a layer by several schemes, and which option would fit it.

Every message ends with what to take instead, options of the same scheme or another one: models have
heads of 80, 96 and 112 channels, and who reads it knows the scheme by its options alone.
"""

import math

from nqkv_jax import hadamard
from nqkv_jax.schemes.base import largest_divisor

SMALLEST = 8  # groups that are proposed: smaller ones cost more in scales than they are worth


def check_hadamard(name: str, head_dim: int, instead: str) -> None:
    """Raises ValueError, for the scheme `name`, unless there is a Hadamard transform of a head."""
    if hadamard.core_size(head_dim) is None:
        raise ValueError(
            f"{name}: expected a head_dim that has a Hadamard transform, such as powers of two and "
            f"multiples of 16; got head_dim={head_dim}. Take {instead}"
        )


def any_rotation(bits: int) -> str:
    """The scheme of `bits` that rotates heads of any size."""
    return f"turboquant:rotation=haar,bits={bits}"


def check_groups_in_head(
    name: str, head_dim: int, group_size: int, residual: int | None = None
) -> None:
    """Raises ValueError, for the scheme `name`, unless groups of channels fill a head.

    `residual` is given where it must be a multiple of them, too.
    """
    if head_dim % group_size == 0:
        return
    common = head_dim if residual is None else math.gcd(head_dim, residual)
    size = largest_divisor(common, group_size)
    instead = f"group_size={size}"
    if size < SMALLEST:
        size = largest_divisor(head_dim, group_size)
        size = size if size >= SMALLEST else head_dim
        instead = f"group_size={size}"
        if residual is not None:
            instead += f",residual={next_multiple(residual, size)}"
    raise ValueError(
        f"{name}: expected group_size to divide head_dim={head_dim}, as groups lie inside one "
        f"head; got {group_size}. Take {instead}"
    )


def next_multiple(number: int, of: int) -> int:
    """The smallest positive multiple that is at least `number`."""
    return max(-(-number // of), 1) * of
