"""KIVI: asymmetric integers, keys per channel over groups of tokens, values per token.

Keys wait in full precision until there are R of them; then all R are encoded, each channel of each
group of G tokens with its own scale and zero. Values keep exactly their last R tokens in full
precision, and are encoded one token at a time, in groups of G channels. The current token is always
seen in full precision. Both sides cost bits + 32 / G.

Source: Liu et al. (2024), arXiv 2402.02750; G = 32 and R = 128 are the paper's, keys after RoPE.
"""

from typing import Literal

from nqkv_jax import codebooks
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import DTYPES, Keys, LayerScheme, LayerShape, ScaleDtype
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import check_groups_in_head, next_multiple
from nqkv_jax.side import Window

Bits = Literal[1, 2, 3, 4, 8]


def sides(
    name: str, bits: int, group_size: int, residual: int, scale_dtype="float16"
) -> tuple[BlockQuantizer, BlockQuantizer]:
    """Quantizers of keys and of values; ValueError, for the scheme `name`, for wrong options."""
    # A group of one token has range 0: its keys would be exact, and cost more than full precision.
    if group_size < 2 or residual < group_size or residual % group_size:
        size = group_size if group_size >= 2 else 32
        instead = f"residual={next_multiple(residual, size)}"
        if size != group_size:
            instead = f"group_size={size},{instead}"
        raise ValueError(
            f"{name}: expected group_size >= 2 and residual to be a positive multiple of it; got "
            f"residual={residual}, group_size={group_size}. Take {instead}"
        )
    block = dict(
        block_size=group_size,
        scale="minmax",
        scale_dtype=DTYPES[scale_dtype],
    )
    codebook = codebooks.uniform(bits)
    return tuple(BlockQuantizer(codebook, axis=axis, **block) for axis in ("tokens", "hidden"))


def layer_scheme(
    name: str, shape: LayerShape, key, value: BlockQuantizer, *, residual: int, keys: str, sinks=0
) -> LayerScheme:
    """KIVI's windows around `key` and `value`; ValueError if groups of values do not fit."""
    check_groups_in_head(name, shape.head_dim, value.block_size, residual)
    return LayerScheme(
        key=key if keys == "rotated" else Unrotated(key),
        value=value,
        sinks=sinks,
        key_window=Window(chunk=residual),
        value_window=Window(keep=residual),
    )


@register("kivi")
def kivi(
    *,
    bits: Bits = 2,
    group_size: int = 32,
    residual: int = 128,
    sinks: int = 0,
    scale_dtype: ScaleDtype = "float16",
    keys: Keys = "rotated",
):
    """Asymmetric integers: keys per channel over 32 tokens, values per token; residual of 128."""
    key, value = sides("kivi", bits, group_size, residual, scale_dtype)
    windows = dict(residual=residual, keys=keys, sinks=sinks)
    return lambda shape: layer_scheme("kivi", shape, key, value, **windows)
