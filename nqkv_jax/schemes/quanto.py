"""Quanto: the quantized cache of Hugging Face transformers, with its default backend.

Asymmetric integers by min–max: a group of g = 64 elements stores s = (max - min) / (2^b - 1) and
min, x ≈ q s + min, in b + 32 / g bits. Groups lie inside one token and head (axis 0 of Quanto; the
default, for keys after RoPE and values alike), or in one channel over 64 tokens of a head (axis
-1).

A residual of R = 128 tokens waits in full precision and is encoded as a whole. Two things differ
from transformers' cache. It decodes and encodes its *whole* content again at every flush, which
changes nothing as long as groups keep their members and adds error at every flush where they do
not; here only the residual is encoded, once. And it encodes a whole prompt at once; here blocks are
counted from the start of each sequence, so that a prompt and the same tokens one by one leave the
same cache.

Source: optimum-quanto 0.2.7 (MaxOptimizer) and QuantizedCache of transformers 5. They allow 2 and 4
bits, and keep scales in the dtype of the model.
"""

from typing import Literal

from nqkv_jax import codebooks
from nqkv_jax.quantizers.base import Quantizer
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.schemes.base import DTYPES, LayerScheme, ScaleDtype, block_window
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import check_groups_in_head, next_multiple
from nqkv_jax.side import Window

Axis = Literal["hidden", "tokens"]


@register("quanto")
def quanto(
    *,
    bits: Literal[2, 3, 4, 8] = 4,
    group_size: int = 64,
    residual: int = 128,
    axis: Axis = "hidden",
    sinks: int = 0,
    scale_dtype: ScaleDtype = "float16",
):
    """Min–max integers as in transformers' quantized cache: groups of 64, residual of 128."""
    window = residual_window("quanto", axis, group_size, residual)
    quantizer = BlockQuantizer(
        codebooks.uniform(bits),
        block_size=group_size,
        axis=axis,
        scale="minmax",
        scale_dtype=DTYPES[scale_dtype],
    )
    return lambda shape: same_for_both_sides("quanto", quantizer, shape, window, sinks)


# What the schemes with Quanto's groups and residual share ---------------------------------------


def residual_window(name: str, axis: str, group_size: int, residual: int) -> Window:
    """The window of such a cache; ValueError for an axis and sizes that do not go together."""
    # A group of one element has range 0: it would be exact, and cost more than full precision.
    if group_size < 2:
        raise ValueError(f"{name}: expected group_size >= 2; got {group_size}. Take group_size=64")
    if axis == "tokens" and (residual < group_size or residual % group_size):
        raise ValueError(
            f"{name}: with axis=tokens residual must be a positive multiple of group_size; got "
            f"residual={residual}, group_size={group_size}. Take "
            f"residual={next_multiple(residual, group_size)}"
        )
    return block_window(name, residual)


def same_for_both_sides(
    name: str, quantizer: Quantizer, shape, window: Window, sinks: int
) -> LayerScheme:
    """Keys and values alike; ValueError if groups inside a token would leave their head."""
    if quantizer.axis == "hidden":
        check_groups_in_head(name, shape.head_dim, quantizer.block_size)
    return LayerScheme(
        key=quantizer, value=quantizer, sinks=sinks, key_window=window, value_window=window
    )
