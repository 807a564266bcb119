"""SQuat: KIVI, with errors of the keys steered away from the directions of the queries.

Keys are encoded as KIVI's, per channel over groups of G = 32 tokens, but their channels in blocks:
after a block, the channels not yet encoded move to make up for its errors where queries would see
them (`QueryAware` has the update). The decoder, the bits (bits + 32 / G) and the values are KIVI's,
with a residual of R = 32.

What counts as a query direction is the sum of q q^T over all queries so far of the heads that share
the keys: a float32 matrix [head_dim, head_dim] per KV head. The paper takes the leading directions
of the prompt instead, once. With the sum, appending a token at a time or all at once is the same.

The paper weighs squared singular values, which grow with the prompt, by strength = 0.001; here they
are divided by their mean, so that one strength fits any length and any model, and all directions
count, which needs no eigenvectors. The paper's choices are normalize=False, strength=0.001 and
subspace=5, 20 or 60. Keys are encoded before RoPE, and weighed by queries before RoPE, with
keys=unrotated. `block` is the paper's 64, but at most half of head_dim: the last block corrects
nothing.

Source: Wang et al. (2025), arXiv 2503.24358.
"""

from nqkv_jax import codebooks
from nqkv_jax.cache import Window
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.squat import QueryAware
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import LayerScheme, one_of, register


@register("squat")
def squat(
    *,
    bits: int = 2,
    group_size: int = 32,
    residual: int = 32,
    strength: float = 1.0,
    block: int | None = None,
    subspace: int | None = None,
    normalize: bool = True,
    keys: str = "rotated",
):
    """KIVI whose key errors avoid the directions of the queries; groups and residual of 32."""
    one_of("squat: bits", bits, (1, 2, 3, 4, 8))
    one_of("squat: keys", keys, ("rotated", "unrotated"))
    if group_size < 2 or residual < group_size or residual % group_size:
        raise ValueError(
            "squat: expected group_size >= 2 and residual to be a positive multiple of it; got "
            f"residual={residual}, group_size={group_size}"
        )
    codebook, sizes = codebooks.uniform(bits), dict(block_size=group_size, scale="minmax")
    plain = BlockQuantizer(codebook, axis="tokens", **sizes)
    value = BlockQuantizer(codebook, axis="hidden", **sizes)

    def layer(shape):
        if shape.head_dim % group_size:
            raise ValueError(
                f"squat: expected group_size to divide head_dim={shape.head_dim}; got {group_size}"
            )
        key = QueryAware(
            inner=plain,
            block=min(64, shape.head_dim // 2) if block is None else block,
            strength=strength,
            subspace=subspace,
            normalize=normalize,
        )
        return LayerScheme(
            key=key if keys == "rotated" else Unrotated(key),
            value=value,
            key_window=Window(chunk=residual),
            value_window=Window(keep=residual),
            rotated=keys == "rotated",
        )

    return layer
