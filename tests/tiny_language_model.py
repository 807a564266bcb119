"""A language model of a few thousand parameters with the protocol of `nqkv_jax.evaluation`."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import Rotary, attend


class ByteTokenizer:
    """One token per byte of UTF-8; a BOS token, which perplexity must not ask for, is 0."""

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + list(text.encode())

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode(errors="replace")


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class TinyLM:
    """Two layers of grouped-query attention and an MLP, random weights, float32."""

    params: dict
    name: str = "tiny"
    dtype: str = "float32"
    tokenizer: ByteTokenizer = dataclasses.field(default_factory=ByteTokenizer)
    config = types.SimpleNamespace(
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=256, max_positions=512
    )

    @classmethod
    def random(cls, seed=0, **fields):
        rng = np.random.default_rng(seed)

        def matrix(*shape):
            return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)

        layers = [
            dict(
                q=matrix(64, 128),
                kv=2 * matrix(64, 128),
                out=2 * matrix(128, 64),
                up=matrix(64, 96),
                down=matrix(96, 64),
            )
            for _ in range(2)
        ]
        # Large enough for predictions to depend on the cache, small enough to be no certainties.
        params = dict(embed=matrix(256, 64) * 16, head=matrix(64, 256) * 2, layers=layers)
        return cls(params, **fields)

    def hidden(self, params, tokens, cache=None, *, num_new=None):
        rotary = Rotary(inverse_frequencies=jnp.asarray(1e4 ** -np.linspace(0, 1, 16), jnp.float32))
        x = params["embed"][tokens]
        rows = tokens.shape
        for i, layer in enumerate(params["layers"]):
            y = rms_norm(x)
            q = (y @ layer["q"]).reshape(*rows, 4, 32)
            k, v = jnp.split((y @ layer["kv"]).reshape(*rows, 4, 32), 2, axis=2)
            out, cache = attend(q, k, v, cache, layer=i, rotary=rotary, num_new=num_new)
            x = x + out.reshape(*rows, 128) @ layer["out"]
            x = x + jax.nn.silu(rms_norm(x) @ layer["up"]) @ layer["down"]
        return rms_norm(x), cache

    def head(self, params, hidden):
        return hidden @ params["head"]

    def apply(self, params, tokens, cache=None, *, num_new=None, last_only=False):
        rows = tokens.shape
        x, cache = self.hidden(params, tokens, cache, num_new=num_new)
        logits = self.head(params, x)
        if last_only:
            last = jnp.full(rows[:1], rows[1]) if num_new is None else num_new
            logits = jnp.take_along_axis(logits, last[:, None, None] - 1, axis=1)[:, 0]
        return logits, cache
