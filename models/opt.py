"""OPT decoders, and where the tensors of their checkpoints go.

    x = embed(tokens) + positions
    x = x + out(attend(q, k, v));   q, k, v = qkv(norm(x))
    x = x + down(relu(up(norm(x))))
    logits = norm(x) @ embedding.T

Zhang et al. (2022), OPT: Open Pre-trained Transformer Language Models. Beware of one name in the
checkpoints: `final_layer_norm` is the norm before the MLP inside a layer, and also the norm after
the last layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nqkv_jax.attention import attend
from nqkv_jax.models.config import OptConfig
from nqkv_jax.models.layers import (
    ACTIVATIONS,
    Decoder,
    Embedding,
    LayerNorm,
    Linear,
    check_token_array,
)
from nqkv_jax.models.weights import Path, Weight

# Row p + 2 of the table belongs to position p; row 1 to padding. Row 0 is never read.
_POSITION_OFFSET = 2
_PADDING_ROW = 1


class OptLayer(nnx.Module):
    """Attention and MLP, each with a residual sum and a LayerNorm before or after it."""

    def __init__(self, config: OptConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.layer = config, layer
        hidden, bias = config.hidden_size, config.use_bias
        self.attention_norm = LayerNorm(hidden, affine=config.norm_affine, dtype=dtype)
        self.qkv = Linear(hidden, 3 * hidden, bias=bias, rngs=rngs, dtype=dtype)
        self.out = Linear(hidden, hidden, bias=bias, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(hidden, affine=config.norm_affine, dtype=dtype)
        self.up = Linear(hidden, config.ffn_size, bias=bias, rngs=rngs, dtype=dtype)
        self.down = Linear(config.ffn_size, hidden, bias=bias, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, cache: Any, num_new: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """[B, S, hidden_size] and the cache -> the same, one layer later."""
        norm_first = self.config.norm_first
        y, cache = self._attention(self.attention_norm(x) if norm_first else x, cache, num_new)
        x = x + y if norm_first else self.attention_norm(x + y)
        y = self.up(self.mlp_norm(x) if norm_first else x)
        y = self.down(ACTIVATIONS[self.config.activation](y))
        return (x + y if norm_first else self.mlp_norm(x + y)), cache

    def _attention(self, x, cache, num_new):
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        # The published code multiplies q by head_dim^-1/2 before the product with k, and so does
        # attend: in float16 the unscaled scores of the large models overflow.
        out, cache = attend(q, k, v, cache, layer=self.layer, rotary=None, num_new=num_new)
        return self.out(out.reshape(x.shape)), cache


class Opt(Decoder):
    """An OPT decoder with its head."""

    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        hidden, embed = config.hidden_size, config.embed_size
        projected = embed != hidden
        self.embed = Embedding(config.vocab_size, embed, rngs=rngs, dtype=dtype)
        self.positions = Embedding(
            config.max_positions + _POSITION_OFFSET, hidden, rngs=rngs, dtype=dtype
        )
        self.project_in = (
            Linear(embed, hidden, bias=False, rngs=rngs, dtype=dtype) if projected else None
        )
        self.layers = nnx.List(
            [OptLayer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        )
        self.norm = (
            LayerNorm(hidden, affine=config.norm_affine, dtype=dtype) if config.final_norm else None
        )
        self.project_out = (
            Linear(hidden, embed, bias=False, rngs=rngs, dtype=dtype) if projected else None
        )
        self.lm_head = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, embed, rngs=rngs, dtype=dtype)
        )

    def hidden(self, tokens, cache=None, *, num_new=None):
        check_token_array(tokens)
        if tokens.shape[1] > self.config.max_positions:
            raise ValueError(
                f"OPT has learned positions for {self.config.max_positions} tokens; "
                f"got {tokens.shape[1]}"
            )
        x = self.embed(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions(_position_rows(tokens.shape, cache, num_new))
        for layer in self.layers:
            x, cache = layer(x, cache, num_new)
        return (x if self.norm is None else self.norm(x)), cache

    def head(self, hidden):
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return (self.lm_head or self.embed).logits(hidden)


def _position_rows(shape: tuple[int, int], cache: Any, num_new: jax.Array | None) -> jax.Array:
    """i32[B, S]: rows of the position table."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    rows = (index if cache is None else cache.positions(shape[1])) + _POSITION_OFFSET
    if num_new is None:
        return rows
    # Padding has a row of its own. Looked up by position, padding after the last learned position
    # would be NaN.
    return jnp.where(index < num_new[:, None], rows, _PADDING_ROW)


def weight_map(config: OptConfig) -> dict[str, Weight]:
    """Checkpoint names ("model.decoder. ...") -> parameters of `Opt(config)`."""
    hidden, embed, root = config.hidden_size, config.embed_size, "model.decoder."
    weights: dict[str, Weight] = {}

    def linear(name: str, path: Path, fan_in: int, fan_out: int, *, bias: bool, part=None) -> None:
        offset = None if part is None else part * fan_out
        weights[f"{root}{name}.weight"] = Weight(
            path=(*path, "kernel"), shape=(fan_out, fan_in), transpose=True, axis=1, offset=offset
        )
        if bias:
            weights[f"{root}{name}.bias"] = Weight(
                path=(*path, "bias"), shape=(fan_out,), offset=offset
            )

    def norm(name: str, path: Path) -> None:
        if config.norm_affine:
            weights[f"{root}{name}.weight"] = Weight(path=(*path, "scale"), shape=(hidden,))
            weights[f"{root}{name}.bias"] = Weight(path=(*path, "bias"), shape=(hidden,))

    rows = config.max_positions + _POSITION_OFFSET
    weights[f"{root}embed_tokens.weight"] = Weight(
        path=("embed", "table"), shape=(config.vocab_size, embed)
    )
    weights[f"{root}embed_positions.weight"] = Weight(
        path=("positions", "table"), shape=(rows, hidden)
    )
    if embed != hidden:
        linear("project_in", ("project_in",), embed, hidden, bias=False)
        linear("project_out", ("project_out",), hidden, embed, bias=False)
    if config.final_norm:
        norm("final_layer_norm", ("norm",))
    for i in range(config.num_layers):
        name, path, bias = f"layers.{i}.", ("layers", i), config.use_bias
        for part, which in enumerate("qkv"):
            projection = f"{name}self_attn.{which}_proj"
            linear(projection, (*path, "qkv"), hidden, hidden, bias=bias, part=part)
        linear(f"{name}self_attn.out_proj", (*path, "out"), hidden, hidden, bias=bias)
        linear(f"{name}fc1", (*path, "up"), hidden, config.ffn_size, bias=bias)
        linear(f"{name}fc2", (*path, "down"), config.ffn_size, hidden, bias=bias)
        norm(f"{name}self_attn_layer_norm", (*path, "attention_norm"))
        norm(f"{name}final_layer_norm", (*path, "mlp_norm"))
    if not config.tie_embeddings:
        weights["lm_head.weight"] = Weight(
            path=("lm_head", "table"), shape=(config.vocab_size, embed)
        )
    return weights
