"""OTT: KIVI's groups, with the few tokens of unusually small keys kept out of them.

In the channels where keys are large and nearly constant, a few tokens are small; they widen the
range of a group of tokens for all others. Per KV head a pool follows the n tokens of the smallest
sum |K| so far. Every G tokens a block is encoded: tokens that enter the pool keep K and V in full
precision, and the mean of the block takes their place; tokens that leave the pool move, still in
full precision, to an overflow buffer, and when that is full, tracing stops.

Keys: per channel over G = 128 tokens; values: per token and head; both `bits` wide with a scale and
a zero, b + 32 / G and b + 32 / head_dim bits, encoded together, the latest R = 32 to 159 tokens in
full precision. Kept tokens are float32: (n + buffer) * head_dim * 4 bytes per KV head and side.

Source: Su et al. (2025), arXiv 2505.10938. Where its description leaves a choice: the pool is per
KV head, keys are taken after RoPE, the mean is that of the tokens that stay, values form one group
per token and head, the first two layers (where there are no such tokens) are not traced, and blocks
are counted from the first token of a sequence, in prompts too.
"""

from typing import Literal

from nqkv_jax import codebooks
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.outlier_tokens import OutlierTokens
from nqkv_jax.schemes.base import LayerScheme
from nqkv_jax.schemes.registry import register
from nqkv_jax.side import Window


@register("ott")
def ott(
    *,
    bits: Literal[1, 2, 3, 4, 8] = 2,
    group_size: int = 128,
    residual: int = 32,
    outliers: int = 3,
    buffer: int = 32,
    skip_layers: int = 2,
):
    """KIVI over 128 tokens, with the tokens of the smallest keys kept in full precision."""
    if group_size < 2 or residual < 0:
        raise ValueError(
            "ott: expected group_size >= 2 and residual >= 0; got "
            f"group_size={group_size}, residual={residual}"
        )
    if not 0 <= outliers < group_size or buffer < 0 or skip_layers < 0:
        raise ValueError(
            "ott: expected outliers between 0 and group_size - 1, buffer >= 0 and skip_layers >= "
            f"0; got outliers={outliers}, buffer={buffer}, skip_layers={skip_layers}"
        )
    codebook, window = codebooks.uniform(bits), Window(keep=residual, chunk=group_size)

    def layer(shape):
        key = BlockQuantizer(codebook, block_size=group_size, axis="tokens", scale="minmax")
        value = BlockQuantizer(codebook, block_size=shape.head_dim, scale="minmax")
        if outliers and shape.layer >= skip_layers:
            trace = dict(outliers=outliers, buffer=buffer)
            key = OutlierTokens(inner=key, **trace)
            value = OutlierTokens(inner=value, of_values=True, **trace)
        return LayerScheme(key=key, value=value, key_window=window, value_window=window)

    return layer
