"""Decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM2, Gemma 2 and 3), and
their weights' names.

    x = x + out(attend(rope(q), rope(k), v));   q, k, v = qkv(norm(x))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))

Gemma also normalises what is added; Gemma 2 caps scores and logits.

Touvron et al. (2023), LLaMA: Open and Efficient Foundation Language Models, section 2.2; Gemma team
(2024), Gemma 2, section 2; Gemma team (2025), Gemma 3 Technical Report, section 2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nqkv_jax.attention import attend
from nqkv_jax.models.layers import (
    ACTIVATIONS,
    Decoder,
    Embedding,
    Linear,
    RMSNorm,
    check_token_array,
)
from nqkv_jax.models.llama_config import LlamaConfig
from nqkv_jax.models.weights import Path, Weight
from nqkv_jax.partial import capped
from nqkv_jax.rotary import Rotary


class LlamaLayer(nnx.Module):
    """Attention and gated MLP, each on normalised input and added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.layer = config, layer
        hidden = config.hidden_size
        q_size, kv_size = _head_sizes(config)
        norm = functools.partial(_norm, config, dtype=dtype)
        self.attention_norm = norm(hidden)
        # Maps of the same input are one kernel: fewer, larger products (in decoding, a quarter
        # faster on two CPU cores).
        self.qkv = Linear(
            hidden, q_size + 2 * kv_size, bias=config.qkv_bias, rngs=rngs, dtype=dtype
        )
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.out = Linear(q_size, hidden, bias=config.out_bias, rngs=rngs, dtype=dtype)
        self.attention_post_norm = norm(hidden) if config.post_norms else None
        self.mlp_norm = norm(hidden)
        self.gate_up = Linear(
            hidden, 2 * config.ffn_size, bias=config.mlp_bias, rngs=rngs, dtype=dtype
        )
        self.down = Linear(config.ffn_size, hidden, bias=config.mlp_bias, rngs=rngs, dtype=dtype)
        self.mlp_post_norm = norm(hidden) if config.post_norms else None

    def __call__(
        self, x: jax.Array, cache: Any, rotary: Rotary, num_new: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """[B, S, hidden_size] and the cache -> the same, one layer later."""
        y, cache = self._attention(self.attention_norm(x), cache, rotary, num_new)
        x = x + (self.attention_post_norm(y) if self.attention_post_norm else y)
        gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        y = self.down(ACTIVATIONS[self.config.activation](gate) * up)
        return x + (self.mlp_post_norm(y) if self.mlp_post_norm else y), cache

    def _attention(self, x, cache, rotary, num_new):
        config = self.config
        q_size, kv_size = _head_sizes(config)
        q, k, v = jnp.split(self.qkv(x), [q_size, q_size + kv_size], axis=-1)
        q = q.reshape(*x.shape[:2], config.num_heads, config.head_dim)  # [B, S, Hq, D]
        k = k.reshape(*x.shape[:2], config.num_kv_heads, config.head_dim)  # [B, S, Hkv, D]
        v = v.reshape(k.shape)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(
            q, k, v, cache,
            layer=self.layer, rotary=rotary, num_new=num_new, window=config.window(self.layer),
            scale=config.score_scale, soft_cap=config.score_cap,
        )  # fmt: skip
        return self.out(out.reshape(*x.shape[:2], q_size)), cache


class Llama(Decoder):
    """A decoder of the Llama family with its head."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        rows, hidden = config.vocab_size, config.hidden_size
        self.embed = Embedding(rows, hidden, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            [LlamaLayer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        )
        self.norm = _norm(config, hidden, dtype=dtype)
        self.lm_head = (
            None if config.tie_embeddings else Embedding(rows, hidden, rngs=rngs, dtype=dtype)
        )

    def hidden(self, tokens, cache=None, *, num_new=None):
        check_token_array(tokens)
        config = self.config
        rotary = config.rope.rotary(config.head_dim)
        local = (config.local_rope or config.rope).rotary(config.head_dim)
        x = self.embed(tokens)
        if config.embed_scale is not None:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, cache, rotary if config.window(i) is None else local, num_new)
        return self.norm(x), cache

    def head(self, hidden):
        return capped((self.lm_head or self.embed).logits(hidden), self.config.logit_cap)


def _norm(config: LlamaConfig, features: int, *, dtype: Any) -> RMSNorm:
    return RMSNorm(features, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)


def _head_sizes(config: LlamaConfig) -> tuple[int, int]:
    """Channels of all query heads, and of all KV heads."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def weight_map(config: LlamaConfig) -> dict[str, Weight]:
    """Checkpoint names ("model.layers. ...") -> parameters of `Llama(config)`."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q_size, kv_size = _head_sizes(config)
    weights: dict[str, Weight] = {}

    def linear(
        name: str, path: Path, fan_in: int, fan_out: int, *, bias: bool, offset: int | None = None
    ) -> None:
        weights[f"{name}.weight"] = Weight(
            path=(*path, "kernel"), shape=(fan_out, fan_in), transpose=True, axis=1, offset=offset
        )
        if bias:
            weights[f"{name}.bias"] = Weight(path=(*path, "bias"), shape=(fan_out,), offset=offset)

    def parts(prefix: str, sizes: dict[str, int], path: Path, *, bias: bool) -> None:
        offset = 0
        for which, size in sizes.items():
            linear(f"{prefix}{which}_proj", path, hidden, size, bias=bias, offset=offset)
            offset += size

    def norm(name: str, path: Path, size: int = hidden) -> None:
        weights[f"{name}.weight"] = Weight(path=(*path, "scale"), shape=(size,))

    table = (config.vocab_size, hidden)
    weights["model.embed_tokens.weight"] = Weight(path=("embed", "table"), shape=table)
    for i in range(config.num_layers):
        path = ("layers", i)
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        norm(f"model.layers.{i}.input_layernorm", (*path, "attention_norm"))
        # Names of the tensors that our fused maps are made of, and their sizes.
        qkv, gate_up = dict(q=q_size, k=kv_size, v=kv_size), dict(gate=ffn, up=ffn)
        if config.model_type == "phi3":  # whose checkpoints have them fused, too
            qkv, gate_up = dict(qkv=q_size + 2 * kv_size), dict(gate_up=2 * ffn)
        parts(attention, qkv, (*path, "qkv"), bias=config.qkv_bias)
        if config.qk_norm:
            norm(f"{attention}q_norm", (*path, "q_norm"), config.head_dim)
            norm(f"{attention}k_norm", (*path, "k_norm"), config.head_dim)
        linear(f"{attention}o_proj", (*path, "out"), q_size, hidden, bias=config.out_bias)
        before_mlp = "post_attention_layernorm"
        if config.post_norms:
            norm(f"model.layers.{i}.post_attention_layernorm", (*path, "attention_post_norm"))
            norm(f"model.layers.{i}.post_feedforward_layernorm", (*path, "mlp_post_norm"))
            before_mlp = "pre_feedforward_layernorm"
        norm(f"model.layers.{i}.{before_mlp}", (*path, "mlp_norm"))
        parts(mlp, gate_up, (*path, "gate_up"), bias=config.mlp_bias)
        linear(f"{mlp}down_proj", (*path, "down"), ffn, hidden, bias=config.mlp_bias)
    norm("model.norm", ("norm",))
    if not config.tie_embeddings:
        weights["lm_head.weight"] = Weight(path=("lm_head", "table"), shape=table)
    return weights
