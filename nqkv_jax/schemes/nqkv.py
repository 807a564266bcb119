"""NQKV: blocks of one token's hidden vector, across heads, in 4-bit normal-quantile codes.

Per token and side, x [hidden] is cut into blocks of n = 256. A block stores its absolute maximum s
as float16 and, for each element, the nearest of the 16 NF4 levels to x / s: 4 + 16 / 256 = 4.0625
bits. No residual, no sinks, no calibration; a token is encoded as it arrives.

Source: Cai et al. (2025), arXiv 2505.16210; NF4 from Dettmers et al. (2023), arXiv 2305.14314. The
paper does not say how scales are stored or keys placed relative to RoPE (OPT has none): float16,
after RoPE.

Beyond the paper, each off by default and each exact where it touches attention: other codebooks,
sinks, a residual that is encoded block by block, keys before RoPE, and (with a residual, whose
first block they are estimated from) channel means removed and a Hadamard rotation.
"""

from typing import Literal

from nqkv_jax import codebooks
from nqkv_jax.quantizers.block import BlockQuantizer, check_hidden_blocks
from nqkv_jax.quantizers.transforms import Centre, Hadamard, Transformed
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import (
    DTYPES,
    Keys,
    LayerScheme,
    ScaleDtype,
    block_window,
    largest_divisor,
)
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import any_rotation, check_hadamard

# name -> (codebook of bits and block size, how blocks are scaled)
CODEBOOKS = {
    "normal_float": (lambda bits, n: codebooks.normal_float(bits), "absmax"),
    "lloyd_max": (lambda bits, n: codebooks.lloyd_max_normal(bits), "rms"),
    "block_normal": (lambda bits, n: codebooks.block_normal(bits, n), "absmax"),
    "signed_block_normal": (
        lambda bits, n: codebooks.block_normal(bits, n, signed=True),
        "signed_absmax",
    ),
    "cubic": (lambda bits, n: codebooks.cubic_normal(bits, n), "absmax"),
    "stepped": (lambda bits, n: codebooks.stepped_normal(bits, n), "absmax"),
    "signed_cubic": (lambda bits, n: codebooks.cubic_normal(bits, n, signed=True), "signed_absmax"),
}


@register("nqkv")
def nqkv(
    *,
    bits: Literal[2, 3, 4] = 4,
    block_size: int | None = None,
    codebook: Literal[*CODEBOOKS] = "normal_float",
    scale_dtype: ScaleDtype = "float16",
    sinks: int = 0,
    residual: int = 0,
    centre: bool = False,
    hadamard: bool = False,
    keys: Keys = "rotated",
):
    """Normal-quantile codes (NF4), one absmax scale per block of 256 of a token's hidden vector."""
    make, scale = CODEBOOKS[codebook]
    window = block_window("nqkv", residual)
    if centre and residual < 16:
        raise ValueError(
            "nqkv: centre=True estimates the channel means from the first residual block, so it "
            f"needs residual >= 16 tokens, for example residual=64; got residual={residual}"
        )

    def layer(shape):
        size = largest_divisor(shape.hidden, 256) if block_size is None else block_size
        check_hidden_blocks("nqkv", shape.num_kv_heads, shape.head_dim, size)
        if hadamard:
            instead = f"hadamard=False or {any_rotation(bits)}"
            check_hadamard("nqkv", shape.head_dim, instead)
        quantizer = BlockQuantizer(
            make(bits, size), block_size=size, scale=scale, scale_dtype=DTYPES[scale_dtype]
        )
        transforms = (Centre(),) * centre + (Hadamard(),) * hadamard
        if transforms:
            quantizer = Transformed(quantizer, transforms)
        return LayerScheme(
            key=quantizer if keys == "rotated" else Unrotated(quantizer),
            value=quantizer,
            sinks=sinks,
            key_window=window,
            value_window=window,
        )

    return layer
