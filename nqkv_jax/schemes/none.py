"""The full-precision cache: the reference for quality, bytes and speed."""

from nqkv_jax.quantizers.full_precision import FullPrecision
from nqkv_jax.schemes.base import LayerScheme
from nqkv_jax.schemes.registry import register


@register("none")
def none():
    """Full precision, in the dtype of the cache."""
    return lambda shape: LayerScheme(key=FullPrecision(), value=FullPrecision())
