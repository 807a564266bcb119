"""Rotary position embedding, in the rotate-half convention of the Hugging Face checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotates pairs (i, i + R/2) of the first R = 2 * len(inverse_frequencies) channels.

    Attributes:
      inverse_frequencies: f32[R / 2], radians per token.
      attention_factor: multiplies cosine and sine (1 except for YaRN-like scaling).

    Source: Su et al. (2021), RoFormer, equation 34; pairing as in GPT-NeoX.
    """

    inverse_frequencies: jax.Array
    attention_factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates `x` [..., tokens, heads, head_dim] to `positions` i32[..., tokens]."""
        frequencies = jnp.expand_dims(self.inverse_frequencies, range(positions.ndim + 1))
        angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [..., T, 1, R / 2]
        cos = jnp.cos(angles) * self.attention_factor
        sin = jnp.sin(angles) * self.attention_factor
        half = self.inverse_frequencies.shape[-1]
        first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate([r.astype(x.dtype) for r in rotated] + [rest], axis=-1)
