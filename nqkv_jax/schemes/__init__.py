"""One file per published scheme, and the registry that names them."""

from nqkv_jax.schemes.base import LayerScheme, LayerShape, Scheme
from nqkv_jax.schemes.options import check_text
from nqkv_jax.schemes.registry import choices, defaults, get, names, register

__all__ = [
    "LayerScheme",
    "LayerShape",
    "Scheme",
    "check_text",
    "choices",
    "defaults",
    "get",
    "names",
    "register",
]
