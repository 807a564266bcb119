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

from nqkv_jax.quantizers.squat import QueryAware
from nqkv_jax.schemes import kivi
from nqkv_jax.schemes.base import Keys
from nqkv_jax.schemes.registry import register


@register("squat")
def squat(
    *,
    bits: kivi.Bits = 2,
    group_size: int = 32,
    residual: int = 32,
    strength: float = 1.0,
    block: int | None = None,
    subspace: int | None = None,
    normalize: bool = True,
    keys: Keys = "rotated",
):
    """KIVI whose key errors avoid the directions of the queries; groups and residual of 32."""
    plain, value = kivi.sides("squat", bits, group_size, residual)

    def layer(shape):
        key = QueryAware(
            inner=plain,
            block=min(64, shape.head_dim // 2) if block is None else block,
            strength=strength,
            subspace=subspace,
            normalize=normalize,
        )
        return kivi.layer_scheme("squat", shape, key, value, residual=residual, keys=keys)

    return layer
