"""Rotary position embedding, in the rotate-half convention of the Hugging Face checkpoints."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.checks import concrete


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryAngles:
    """How tokens at certain positions are rotated.

    Attributes:
      cos, sin: f32[..., tokens, 1, R / 2].
      factor: multiplies both.
    """

    cos: jax.Array
    sin: jax.Array
    factor: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Rotates `x` [..., tokens, heads, head_dim]; `positions` are those it was made for."""
        cos, sin, half = self.cos * self.factor, self.sin * self.factor, self.cos.shape[-1]
        first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate([r.astype(x.dtype) for r in rotated] + [rest], axis=-1)

    def moved(self, by: "RotaryAngles") -> "RotaryAngles":
        """Of the sums of both positions, by the addition theorems."""
        return dataclasses.replace(
            self,
            cos=self.cos * by.cos - self.sin * by.sin,
            sin=self.sin * by.cos + self.cos * by.sin,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotates pairs (i, i + R/2) of the first R = 2 * len(inverse_frequencies) channels.

    Attributes:
      inverse_frequencies: f32[R / 2], radians per token; any float dtype.
      attention_factor: multiplies cosine and sine (1 except for YaRN-like scaling); a number > 0.

    Raises: ValueError for another `attention_factor`, when it is made; for other frequencies when
      it is used (`check`).
    Source: Su et al. (2021), RoFormer, equation 34; pairing as in GPT-NeoX.
    """

    inverse_frequencies: jax.Array
    attention_factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self):
        factor = self.attention_factor
        number = isinstance(factor, numbers.Real) and not isinstance(factor, bool)
        if not (number and 0 < factor < math.inf):
            raise ValueError(
                f"Rotary: expected attention_factor > 0, a finite number; got {factor!r}"
            )
        object.__setattr__(self, "attention_factor", float(factor))

    def check(self, what: str = "Rotary", head_dim: int | None = None) -> None:
        """Raises ValueError, for `what`, unless there are frequencies, for heads of `head_dim`.

        They are a leaf of a pytree: whatever `jax.tree.map` returns may be in their place, so that
        the constructor cannot ask for an array.
        """
        a = self.inverse_frequencies
        array = hasattr(a, "shape") and hasattr(a, "dtype")
        if not array or len(a.shape) != 1 or not jnp.issubdtype(a.dtype, jnp.floating):
            got = f"{a.dtype}{list(a.shape)}" if array else f"{a!r:.200}"
            raise ValueError(
                f"{what}: expected inverse_frequencies to be an array of floats [R / 2], radians "
                f"per token, one for every pair of channels; got {got}"
            )
        if not a.size:
            raise ValueError(
                f"{what}: expected at least one frequency; got none. A model without RoPE has "
                "rotary=None"
            )
        if head_dim is not None and 2 * a.size > head_dim:
            raise ValueError(
                f"{what}: expected at most {head_dim // 2} frequencies, one for every pair of the "
                f"{head_dim} channels; got {a.size}"
            )
        known = concrete(a)
        if known is not None and not np.all(np.isfinite(known.astype(np.float32))):
            raise ValueError(f"{what}: expected inverse_frequencies to be finite; got {known}")

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates `x` [..., tokens, heads, head_dim] to `positions` i32[..., tokens]."""
        self.check(head_dim=x.shape[-1])
        return self.at(positions)(x)

    def rest(self) -> "Rotary":
        """Of what was rotated to one position, and multiplied by the factor, on to another."""
        return dataclasses.replace(self, attention_factor=1.0)

    def at(self, positions: jax.Array) -> RotaryAngles:
        """The rotation to `positions` i32[..., tokens]."""
        self.check()
        frequencies = self.inverse_frequencies.astype(jnp.float32)
        frequencies = jnp.expand_dims(frequencies, range(positions.ndim + 1))
        angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [..., T, 1, R / 2]
        return RotaryAngles(cos=jnp.cos(angles), sin=jnp.sin(angles), factor=self.attention_factor)


def amplitudes(q: jax.Array, x: jax.Array, half: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(a, b, c) with <q, x turned by the angles t> = sum_i (a_i cos t_i + b_i sin t_i) + c.

    Of f32 `q` and `x` [..., head_dim], the first `half` pairs of which are turned: a and b are
    [..., half]; c [..., 1] is the product of the other channels.
    """
    (q1, q2, q3), (x1, x2, x3) = (jnp.split(a, [half, 2 * half], axis=-1) for a in (q, x))
    return q1 * x1 + q2 * x2, q2 * x1 - q1 * x2, jnp.sum(q3 * x3, axis=-1, keepdims=True)
