"""Provisional: attention without a cache, so that the models can be written against the signature."""

import jax
import jax.numpy as jnp


def attend(q, k, v, cache=None, *, layer=0, rotary=None, num_new=None, window=None, scale=None):
    assert cache is None
    B, S, Hq, D = q.shape
    pos = jnp.arange(S)
    if rotary is not None:
        at = jnp.broadcast_to(pos, (B, S))
        q, k = rotary(q, at), rotary(k, at)
    Hkv = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    q = q.reshape(B, S, Hkv, Hq // Hkv, D)
    s = jnp.einsum("bshgd,bthd->bhgst", q * jnp.asarray(scale, q.dtype), k,
                   preferred_element_type=jnp.float32)
    mask = pos[None, :] <= pos[:, None]
    if window is not None:
        mask = mask & (pos[None, :] > pos[:, None] - window)
    s = jnp.where(mask[None, None, None], s, jnp.float32(-1e30))
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    o = jnp.einsum("bhgst,bthd->bshgd", p, v)
    return o.reshape(B, S, Hq, D), None
