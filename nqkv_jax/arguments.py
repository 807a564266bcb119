"""What is asked of the arguments of `attend`."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.cache import KVCache
from nqkv_jax.checks import concrete, is_whole
from nqkv_jax.pallas_kernels.decode_attention import IMPLEMENTATIONS
from nqkv_jax.rotary import Rotary


def check(
    q, k, v, cache, *, layer, rotary, num_new, window, scale, soft_cap, implementation
) -> tuple[int, int | None, float | jax.Array | None, float | None]:
    """`layer`, `window`, `scale` and `soft_cap` as `attend` goes on with them: Python's numbers, or
    an array for `scale`.

    Raises: ValueError, for `attend`, if any of them is not what its docstring says.
    """
    _check_tokens(q, k, v)
    batch, _, _, head_dim = q.shape
    if not isinstance(rotary, Rotary | None):
        raise ValueError(f"attend: expected rotary to be a Rotary or None; got {rotary!r}")
    if rotary is not None:
        rotary.check("attend: rotary", head_dim)
    if num_new is not None and (
        num_new.shape != (batch,) or not jnp.issubdtype(num_new.dtype, jnp.integer)
    ):
        raise ValueError(
            f"attend: expected num_new of shape ({batch},), one whole number per sequence; "
            f"got {num_new.dtype} of shape {num_new.shape}"
        )
    if window is not None and not (is_whole(window) and window >= 1):
        raise ValueError(
            f"attend: expected window >= 1, a whole number, or None; got {window!r}"
            + _if_traced(window)
        )
    if soft_cap is not None and not (_is_real(soft_cap) and 0 < soft_cap < math.inf):
        raise ValueError(
            f"attend: expected soft_cap > 0, a number, or None; got {soft_cap!r}"
            + _if_traced(soft_cap)
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attend: expected implementation to be one of {IMPLEMENTATIONS}, or None; got "
            f"{implementation!r}"
        )
    if not is_whole(layer):
        raise ValueError(
            "attend: expected layer to be a whole number, and no array, as layers may be cached "
            f"differently; got {layer!r} of type {type(layer).__name__}. Unroll the loop over "
            "layers"
        )
    layer, window = int(layer), None if window is None else int(window)
    if isinstance(cache, KVCache):
        _check_cache(cache, k.shape, layer, window)
    elif cache is not None and not hasattr(cache, "attend"):
        raise ValueError(
            "attend: expected cache to be a KVCache (scheme.init makes one), a DecodedView or "
            f"None; got {type(cache).__name__}"
        )
    by_name = dict(q=q, k=k, v=v, num_new=num_new, rotary=rotary)
    _check_meshes(by_name | dict(cache=cache.layers[layer] if isinstance(cache, KVCache) else None))
    return layer, window, _scale(scale), None if soft_cap is None else float(soft_cap)


def _check_tokens(q, k, v) -> None:
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in (q, k, v)):
        names = ", ".join(type(a).__name__ for a in (q, k, v))
        raise ValueError(f"attend: expected q, k, v to be arrays; got {names}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attend: expected q [batch, tokens, num_heads, head_dim] and k, v [batch, tokens, "
            f"num_kv_heads, head_dim]; got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if not q.size or not k.size:
        raise ValueError(f"attend: expected at least one token; got q {q.shape}, k {k.shape}")
    batch, size, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, size) or k.shape[3] != head_dim or num_heads % k.shape[2]:
        raise ValueError(
            "attend: q and k must agree in batch, tokens and head_dim, and num_heads must be a "
            f"multiple of num_kv_heads; got q {q.shape}, k {k.shape}"
        )
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (q, k, v)):
        raise ValueError(
            f"attend: expected floating-point q, k, v; got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _check_cache(cache: KVCache, shape: tuple[int, ...], layer: int, window: int | None) -> None:
    """Of keys of `shape` [B, S, Hkv, D]."""
    if not 0 <= layer < len(cache.layers):
        raise ValueError(
            f"attend: the cache has layers 0..{len(cache.layers) - 1}; got layer={layer}"
        )
    this = cache.layers[layer]
    expected = (cache.batch, this.num_kv_heads, this.head_dim)
    if (shape[0], *shape[2:]) != expected:
        raise ValueError(
            "attend: the cache was made for (batch, num_kv_heads, head_dim) = "
            f"{expected}; got k {shape}"
        )
    if this.window is not None and (window is None or window > this.window):
        raise ValueError(
            f"attend: layer {layer} of the cache keeps the latest {this.window} tokens, as its "
            f"windows say; got window={window}. Make it with windows=None to keep all"
        )


def _check_meshes(arguments: dict[str, Any]) -> None:
    explicit = jax.sharding.AxisType.Explicit
    for name, argument in arguments.items():
        for a in jax.tree.leaves(argument):
            if explicit in jax.typeof(a).sharding.mesh.axis_types:
                raise ValueError(
                    "attend: expected arrays on a mesh with axes of type Auto, which the compiler "
                    f"partitions; got Explicit ones, of {name}. Make it with jax.make_mesh(shape, "
                    "names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
                )


def _scale(scale: Any) -> float | jax.Array | None:
    if scale is None:
        return None
    number = scale
    if isinstance(scale, jax.Array | np.ndarray) and scale.shape == ():
        kinds = jnp.floating, jnp.integer
        if any(jnp.issubdtype(scale.dtype, kind) for kind in kinds):
            known = concrete(scale)
            if known is None:
                return scale
            number = float(known)
    if not (_is_real(number) and 0 < number < math.inf):
        raise ValueError(
            "attend: expected scale > 0, a finite number or an array of shape (), or None for "
            f"head_dim ** -0.5; got {scale!r:.200}"
        )
    return float(number)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _if_traced(value: Any) -> str:
    """More for a message about `value`."""
    traced = isinstance(value, jax.core.Tracer)
    return ". Name it in static_argnames of jax.jit" if traced else ""
