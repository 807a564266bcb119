"""TurboQuant: a random rotation makes coordinates normal, and one Lloyd-Max table fits them all.

Per token and head, x [D] is rotated, y = R x, and stored as its norm n and, per coordinate, the
level of the Lloyd-Max quantizer of N(0, 1) nearest to sqrt(D) y_j / n: b + 16 / D bits. Stored is
rms = n / sqrt(D), in float16, which is the same number and saturates later. Scores are products of
rotated queries with the levels, and the output is rotated back once: no token ever is.

`variant=prod` spends one of the b bits on the signs of a Gaussian sketch of the residual, which
makes <q, x~> unbiased (that of `mse` is low by the distortion: 11.6 % at 2 bits, 0.9 % at 4) for a
larger variance: b + 32 / D bits. After the softmax that is the worse of the two.

Source: Zandieh et al. (2025), arXiv 2504.19874, algorithms 1 and 2. The paper's rotation is uniform
("haar"), for which D may be anything; the default is a Hadamard transform after random signs, which
costs D log D and serves powers of two and multiples of 16. Neither window nor sinks are the
paper's; 0 by default.
"""

from typing import Literal

from nqkv_jax import codebooks
from nqkv_jax.checks import one_of
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.transforms import Hadamard, Rotation, Transformed
from nqkv_jax.quantizers.turboquant import ResidualSketch
from nqkv_jax.schemes.base import LayerScheme, block_window
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import check_hadamard

ROTATIONS = {"hadamard": Hadamard(seed=0), "haar": Rotation(seed=0)}


@register("turboquant")
def turboquant(
    *,
    bits: Literal[1, 2, 3, 4] = 4,
    variant: Literal["mse", "prod"] = "mse",
    rotation: Literal[*ROTATIONS] = "hadamard",
    sinks: int = 0,
    residual: int = 0,
):
    """Random rotation, then Lloyd-Max codes of the normal distribution, one norm per token-head."""
    sketched = variant == "prod"
    if sketched:
        one_of("turboquant: bits of variant=prod", bits, (2, 3, 4))
    window = block_window("turboquant", residual)

    def layer(shape):
        if rotation == "hadamard":
            check_hadamard("turboquant", shape.head_dim, "rotation=haar")
        codebook = codebooks.lloyd_max_normal(bits - sketched)
        quantizer = BlockQuantizer(codebook, block_size=shape.head_dim, scale="rms")
        if sketched:
            quantizer = ResidualSketch(quantizer)
        quantizer = Transformed(quantizer, (ROTATIONS[rotation],))
        return LayerScheme(
            key=quantizer, value=quantizer, sinks=sinks, key_window=window, value_window=window
        )

    return layer
