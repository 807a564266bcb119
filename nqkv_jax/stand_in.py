"""What models and `attend` ask of an object that takes the place of a cache."""

import jax
import jax.numpy as jnp

from nqkv_jax.partial import Partial
from nqkv_jax.rotary import Rotary


class StandIn:
    """Passed to a model in place of a cache, with whole texts, all of one length, from position 0.

    Subclasses are frozen dataclasses, registered as pytrees, as `attend` returns what takes their
    place for the next layer.
    """

    def positions(self, num_tokens: int) -> jax.Array:
        """i32[1, num_tokens]."""
        return jnp.arange(num_tokens)[None]

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        unrotated: jax.Array,
        *,
        layer: int,
        rotary: Rotary | None,
        window: int | None,
        soft_cap: float | None,
    ) -> tuple[Partial, "StandIn"]:
        """Causal attention of one layer, and what the next layer is to be called with.

        Args:
          q: [B, Hkv, G, S, D], rotated and scaled.
          k, v: [B, S, Hkv, D], as the model made them.
          unrotated: the queries as the model made them, [B, S, Hkv, G, D].
          layer: its index.
          rotary, window, soft_cap: as for `nqkv_jax.attend`.
        """
        raise NotImplementedError
