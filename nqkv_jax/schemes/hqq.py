"""HQQ: the other backend of transformers' quantized cache, with an optimised zero point.

Groups, residual and bits are those of `quanto`. The zero point of a group is not its minimum but
what 20 iterations of a half-quadratic solver make of it, which lowers the squared error on normal
data by a tenth (`nqkv_jax.quantizers.hqq`).

Source: Badri and Shaji (2023), Half-Quadratic Quantization; hqq 0.2.8. Its axis 1 is our "hidden".
Its axis 0 takes a group from all over the tensor, strided, and is not offered: "tokens" is one
channel over consecutive tokens of a head. Three bits take 3.0 here, and 3.5 in the containers
there.
"""

from typing import Literal

from nqkv_jax.quantizers.hqq import HQQQuantizer
from nqkv_jax.schemes.base import DTYPES, ScaleDtype
from nqkv_jax.schemes.quanto import Axis, residual_window, same_for_both_sides
from nqkv_jax.schemes.registry import register


@register("hqq")
def hqq(
    *,
    bits: Literal[2, 3, 4, 8] = 4,
    group_size: int = 64,
    residual: int = 128,
    axis: Axis = "hidden",
    iterations: int = 20,
    sinks: int = 0,
    scale_dtype: ScaleDtype = "float16",
):
    """Half-quadratic zero points (HQQ): groups of 64, residual of 128."""
    window = residual_window("hqq", axis, group_size, residual)
    quantizer = HQQQuantizer(
        bits=bits,
        block_size=group_size,
        axis=axis,
        iterations=iterations,
        scale_dtype=DTYPES[scale_dtype],
    )
    return lambda shape: same_for_both_sides("hqq", quantizer, shape, window, sinks)
