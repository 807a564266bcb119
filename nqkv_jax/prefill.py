"""Attention among the tokens of a prompt, in full precision, by the platform's flash attention.

On TPU that is splash attention, on GPU cuDNN's; elsewhere, and where these cannot serve the case,
`attend_new` walks the prompt in plain XLA. All give a `Partial`, as cached tokens come beside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from nqkv_jax.partial import Partial, attend_new

SPLASH_BLOCK = 128  # tokens: lengths must be a multiple
CUDNN_HEAD_DIM = 128  # the largest on every GPU that it supports


def attend_prompt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    valid: jax.Array,
    window: int | None,
    soft_cap: float | None,
    implementation: str,
) -> Partial:
    """Causal attention of q [B, Hkv, G, S, D], scaled, to k, v [B, S, Hkv, D] where valid [B, S].

    Valid tokens come before all others. `implementation` is "auto" or "xla"; only the latter can be
    differentiated, and keeps NaN from queries that do not see it.
    """
    walk = functools.partial(attend_new, window=window, soft_cap=soft_cap)
    arguments = (q, k, v, query_positions, valid)
    size, head_dim = q.shape[3:]
    branches = {}
    if size % SPLASH_BLOCK == 0 and head_dim % 64 == 0:
        branches["tpu"] = functools.partial(_splash, window=window, soft_cap=soft_cap)
    cudnn = head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM and soft_cap is None
    if cudnn and q.dtype in (jnp.bfloat16, jnp.float16):
        branches["cuda"] = functools.partial(_cudnn, window=window)
    if implementation == "xla" or not branches:
        return walk(*arguments)
    return jax.lax.platform_dependent(*arguments, **branches, default=walk)


def _partial(out: jax.Array, log_sum: jax.Array) -> Partial:
    """From normalised outputs [B, Hkv, G, S, D]."""
    return Partial(
        numerator=out.astype(jnp.float32), denominator=jnp.ones_like(log_sum), maximum=log_sum
    )


def _without_pads(k, v, valid):
    # A weight of 0 times NaN is NaN.
    return [jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in (k, v)]


def _splash(q, k, v, query_positions, valid, *, window, soft_cap, interpret=False) -> Partial:
    size = q.shape[3]
    if window is None:
        mask = splash_attention_mask.CausalMask((size, size))
    else:
        mask = splash_attention_mask.LocalMask((size, size), (window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[2]),
        save_residuals=True,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    k, v = (jnp.swapaxes(x, 1, 2) for x in _without_pads(k, v, valid))
    out, (log_sum,) = jax.vmap(jax.vmap(kernel))(q, k, v)
    return _partial(out, log_sum)


def _cudnn(q, k, v, query_positions, valid, *, window) -> Partial:
    batch, heads, group, size, head_dim = q.shape
    clean_k, clean_v = _without_pads(k, v, valid)
    try:
        out, log_sum = jax.nn.dot_product_attention(
            q.reshape(batch, heads * group, size, head_dim).swapaxes(1, 2),
            clean_k,
            clean_v,
            scale=1.0,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
            return_residual=True,
        )
    except RuntimeError:  # cuDNN is looked for while tracing, on whatever machine that happens
        return attend_new(q, k, v, query_positions, valid, window)
    out = out.swapaxes(1, 2).reshape(q.shape)
    log_sum = log_sum.swapaxes(1, 2).reshape(q.shape[:-1])
    return _partial(out, log_sum.astype(jnp.float32))
