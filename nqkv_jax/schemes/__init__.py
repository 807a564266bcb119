"""One file per published scheme, and the registry that names them."""

from nqkv_jax.schemes.base import (
    LayerScheme,
    LayerShape,
    Scheme,
    check_text,
    choices,
    defaults,
    get,
    names,
    register,
)

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
