"""What attention through a cache gives, in float64: lists of tokens, decoded one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from cases import ROTARY

import nqkv_jax as nq


def rotate(x, positions):
    """RoPE in float64, rotate-half on the first channels; x [tokens, heads, D]."""
    frequencies = np.asarray(ROTARY.inverse_frequencies, np.float64)
    half = len(frequencies)
    angle = np.asarray(positions)[:, None, None] * frequencies
    out = np.array(x, np.float64)
    first, second = out[..., :half].copy(), out[..., half : 2 * half].copy()
    out[..., :half] = first * np.cos(angle) - second * np.sin(angle)
    out[..., half : 2 * half] = second * np.cos(angle) + first * np.sin(angle)
    return out


@jax.jit
def round_trip(quantizer, x, context):
    return quantizer.dequantize(quantizer.quantize(x, context), context)


observe = jax.jit(lambda quantizer, x, context: quantizer.observe(x, context))
observe_query = jax.jit(lambda quantizer, q, context: quantizer.observe_query(q, context))
rotate_like_the_model = jax.jit(lambda x: ROTARY(x, jnp.arange(x.shape[0])))


class SideOracle:
    """One side of one sequence as a list of tokens, which are replaced as they are encoded."""

    def __init__(self, quantizer, window, sinks, stored, ready, keys, queries, rotary):
        self.quantizer, self.window, self.sinks, self.ready = quantizer, window, sinks, ready
        self.stored = stored  # f32 [tokens, heads, D], as the scheme stores it
        # What a quantizer may ask for: f32 [tokens, heads, D] and [tokens, heads, G, D].
        self.keys, self.queries, self.seen = keys, queries, 0
        self.state, self.rotary = quantizer.init_state(*stored.shape[1:]), rotary
        self.waiting, self.tokens = [], []

    def append(self, position):
        self.tokens.append(self.ready(self.stored[position : position + 1], [position])[0])
        if position >= self.sinks:
            self.waiting.append(position)
        if self.window == nq.Window():  # no residual: a token is encoded before it is attended to
            self.flush()

    def flush(self):
        while len(self.waiting) >= self.window.keep + self.window.chunk:
            chunk, self.waiting = (
                self.waiting[: self.window.chunk],
                self.waiting[self.window.chunk :],
            )
            if self.quantizer.wants_queries:
                for position in range(self.seen, len(self.tokens)):
                    context = nq.Context(state=self.state)
                    self.state = observe_query(self.quantizer, self.queries[position], context)
                self.seen = len(self.tokens)
            chunk = np.array(chunk, np.int32)
            seen = nq.Context(rotary=self.rotary, state=self.state)
            context = dataclasses.replace(seen, positions=chunk, keys=self.keys[chunk])
            self.state = observe(self.quantizer, self.stored[chunk], context)
            for group in chunk.reshape(-1, self.quantizer.group):
                context = dataclasses.replace(seen, positions=group, state=self.state)
                decoded = round_trip(self.quantizer, self.stored[group], context)
                for position, row in zip(group, np.asarray(decoded, np.float64), strict=True):
                    self.tokens[position] = row


def oracle_outputs(spec, q, k, v, window=None, prompt=0, rotary=ROTARY, soft_cap=None):
    """f64[T, Hq, D] of decoding a sequence token by token; the first `prompt` see raw tokens."""
    heads = dict(num_kv_heads=k.shape[1], head_dim=k.shape[2])
    layer = nq.schemes.get(spec).layer(nq.schemes.LayerShape(**heads))
    everywhere = np.arange(len(k))
    keep = lambda x, at: np.asarray(x, np.float64)
    before = rotary is not None and layer.rotated  # before they are stored
    stored, queries = (np.asarray(rotate_like_the_model(x)) if before else x for x in (k, q))
    beside = dict(
        keys=stored, queries=queries.reshape(len(q), k.shape[1], -1, k.shape[2]), rotary=rotary
    )
    turn = keep if rotary is None else rotate
    ready = keep if before else turn
    key = SideOracle(layer.key, layer.key_window, layer.sinks, stored, ready, **beside)
    value = SideOracle(layer.value, layer.value_window, layer.sinks, v, keep, **beside)
    q, raw = turn(q, everywhere), turn(k, everywhere)
    outputs = []
    for t in everywhere:
        key.append(t), value.append(t)
        keys = raw[: t + 1] if t < prompt else np.stack(key.tokens)
        values = v[: t + 1].astype(np.float64) if t < prompt else np.stack(value.tokens)
        first = 0 if window is None else max(0, t + 1 - window)
        group = q.shape[1] // k.shape[1]
        scores = np.einsum("hd,thd->ht", q[t], np.repeat(keys[first:], group, 1)) / np.sqrt(
            q.shape[2]
        )
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        outputs.append(np.einsum("ht,thd->hd", weights, np.repeat(values[first:], group, 1)))
        key.flush(), value.flush()
    return np.stack(outputs)
