"""Queries, keys and values of every layer of a model, on a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.windows import encode, opened
from nqkv_jax.partial import attend_new
from nqkv_jax.rotary import Rotary
from nqkv_jax.stand_in import StandIn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Of one layer and one sequence, as the model made them.

    Attributes:
      queries: [S, Hkv, G, D], before RoPE, not scaled.
      rotated_queries: [1, Hkv, G, S, D], after RoPE and scaled: what attention multiplies.
      keys: [S, Hkv, D], before RoPE.
      rotated_keys: [S, Hkv, D], after it; None for a model without RoPE.
      values: [S, Hkv, D].
      rotary: how the layer rotates; None if it does not.
      window: of its attention, in tokens; None for all.
      soft_cap: of its scores; None for no cap.
    """

    queries: jax.Array
    rotated_queries: jax.Array
    keys: jax.Array
    rotated_keys: jax.Array | None
    values: jax.Array
    rotary: Rotary | None
    window: int | None = dataclasses.field(metadata={"static": True})
    soft_cap: float | None = dataclasses.field(metadata={"static": True})

    @property
    def sides(self) -> dict[str, np.ndarray]:
        """What a cache may hold, f64[S, Hkv * D] each: "keys", "rotated_keys", "values"."""
        sides = dict(keys=self.keys, rotated_keys=self.rotated_keys, values=self.values)
        return {
            name: np.asarray(x, np.float64).reshape(len(x), -1)
            for name, x in sides.items()
            if x is not None
        }


def check_tokens(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """i32[tokens], of a text.

    Raises: ValueError unless there are 2 tokens or more, ids of the vocabulary, and positions for
      all of them.
    """
    tokens = np.asarray(opened(lm, encode("analysis", lm, tokens)), np.int32)
    longest = lm.config.max_positions
    if not 2 <= tokens.size <= longest:
        raise ValueError(
            f"analysis: expected 2 to {longest} token ids, as many as {lm.name} can read at once; "
            f"got {tokens.size}"
        )
    return tokens


def record(lm: LanguageModel, tokens: np.ndarray) -> list[LayerActivations]:
    """Reads the text i32[tokens] at once, with exact attention; see `check_tokens`."""

    @jax.jit
    def run(params, tokens):
        return lm.apply(params, tokens[None], _Recorder(), last_only=True)[1].layers

    return list(run(lm.params, jnp.asarray(check_tokens(lm, tokens))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorder(StandIn):
    layers: tuple[LayerActivations, ...] = ()

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
        rotated = k if rotary is None else rotary(k, positions)
        activations = LayerActivations(
            queries=unrotated[0],
            rotated_queries=q,
            keys=k[0],
            rotated_keys=None if rotary is None else rotated[0],
            values=v[0],
            rotary=rotary,
            window=window,
            soft_cap=soft_cap,
        )
        valid = jnp.ones(k.shape[:2], jnp.bool_)
        out = attend_new(q, rotated, v, positions, valid, window, soft_cap)
        return out, _Recorder(layers=(*self.layers, activations))
