"""Queries and keys for quantizers that rank channels, and what such a quantizer makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import nqkv_jax as nq

HEADS, DIM = 2, 32


def draw(group: int, *, seed: int = 0, chunks: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Queries f32[tokens, HEADS, G, DIM] and keys f32[chunks, group, HEADS, DIM]."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(HEADS, DIM)))
    k = rng.normal(size=(chunks, group, HEADS, DIM)) * spread + 5 * rng.normal(size=(HEADS, DIM))
    q = rng.normal(size=(8, HEADS, 3, DIM)) * np.exp(rng.normal(size=(HEADS, 1, DIM)))
    return q.astype(np.float32), k.astype(np.float32)


def context(state, chunk, group: int, rotary=None) -> nq.Context:
    """Of the tokens of a chunk, i32[] or int, after four sinks."""
    positions = 4 + chunk * group + jnp.arange(group)
    return nq.Context(state=state, rotary=rotary, positions=positions)


@functools.partial(jax.jit, static_argnums=0)
def encode(quantizer, queries, chunks, rotary=None):
    """The state after all queries and every chunk, and the payloads of the chunks."""
    state = quantizer.init_state(*chunks.shape[2:])
    for q in queries:
        state = quantizer.observe_query(q, nq.Context(state=state))
    payloads = []
    for n, chunk in enumerate(chunks):
        state = quantizer.observe(chunk, context(state, n, len(chunk), rotary))
        payloads.append(quantizer.quantize(chunk, context(state, n, len(chunk), rotary)))
    return state, jax.tree.map(lambda *a: jnp.stack(a), *payloads)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode(quantizer, state, payloads, folded=False, rotary=None):
    """[chunks, group, HEADS, DIM]; of folded tokens all channels."""

    def one(payload, n):
        about = context(state, n, quantizer.group, rotary)
        if not folded:
            return quantizer.dequantize(payload, about)
        x = quantizer.dequantize_folded(payload, about)
        waves = quantizer.waves(about)
        if waves is None:
            return x
        return jnp.concatenate([x, jnp.stack([waves] * HEADS, axis=1)], axis=-1)

    return jax.vmap(one)(payloads, jnp.arange(len(jax.tree.leaves(payloads)[0])))
