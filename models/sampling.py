"""Choosing the next token from logits.

The order and the definitions are those of Hugging Face transformers: repetition penalty on the raw
logits, then temperature, top-k, top-p and min-p, then a draw from what is left.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the token with the largest logit.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: draw from the k most likely tokens only.
      top_p: draw from the fewest most likely tokens whose probabilities sum to `top_p` or more.
      min_p: leave out tokens less likely than `min_p` times the most likely one.
      repetition_penalty: of tokens that are in the prompt or were generated, positive logits are
        divided and negative ones multiplied by it; 1 is none. Greedy choice heeds it too.

    Tokens that tie with the last one inside top-k or top-p are inside as well.

    Source: Fan et al. (2018), top-k; Holtzman et al. (2020), top-p (nucleus); Nguyen et al. (2024),
      min-p; Keskar et al. (2019), CTRL, section 4.1, the penalty.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Beyond these a float32 quotient would be infinite, or none.
        held = lambda x: 1e-30 <= x <= 1e30
        bounds = "a finite number in [1e-30, 1e30]"
        self._check("temperature", lambda x: x == 0 or held(x), f"{bounds}, or 0 (greedy)")
        whole = numbers.Integral
        self._check("top_k", lambda x: x >= 1, "a whole number >= 1, or None", whole)
        self._check("top_p", lambda x: 0 < x <= 1, "a number in (0, 1], or None")
        self._check("min_p", lambda x: 0 <= x <= 1, "a number in [0, 1], or None")
        self._check("repetition_penalty", held, bounds)
        filters = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        given = ", ".join(f"{name}={value}" for name, value in filters.items() if value is not None)
        if self.greedy and given:
            raise ValueError(
                f"Sampling: {given} would change nothing, because temperature=0 is greedy. Set a "
                "temperature (1.0 is the model's own distribution), or leave them out"
            )

    def _check(
        self, name: str, good: Callable[[Any], bool], expected: str, kind: type = numbers.Real
    ) -> None:
        value = getattr(self, name)
        if value is None and getattr(type(self), name) is None:
            return
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not good(value):
            raise ValueError(f"Sampling.{name} must be {expected}; got {value!r}")

    def rules(self) -> "Rules":
        """The same as an argument of a program."""
        drawn = self.temperature != 0
        number = lambda value, there: np.float32(value) if there else None
        return Rules(
            temperature=number(self.temperature, drawn),
            top_k=self.top_k,
            top_p=number(self.top_p, self.top_p is not None and self.top_p < 1),
            min_p=number(self.min_p, bool(self.min_p)),
            repetition_penalty=number(self.repetition_penalty, self.repetition_penalty != 1),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """A `Sampling` as a pytree: what is there at all, and `top_k`, make the program; numbers are
    arrays f32[], so that others are the same program. None: there is no such rule.
    """

    temperature: jax.Array | None  # None: greedy
    top_k: int | None = dataclasses.field(metadata={"static": True})
    top_p: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None


GREEDY = Sampling()


def scores(
    logits: jax.Array, sampling: Sampling | Rules, seen: jax.Array | None = None
) -> jax.Array:
    """Logits of the distribution that is drawn from: -inf for what is left out.

    Args:    logits f32[B, V]; seen: bool[B, V], tokens to be penalised, if there is a penalty.
    Returns: f32[B, V], not normalised.
    """
    rules = sampling.rules() if isinstance(sampling, Sampling) else sampling
    if rules.repetition_penalty is not None:
        if seen is None:
            raise ValueError(
                "sample: repetition_penalty needs `seen` bool[batch, vocabulary]; got None"
            )
        penalty = rules.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if rules.temperature is None:
        return logits
    logits = logits / rules.temperature
    ranked = _ranked(logits, rules)
    if rules.top_k is not None:
        logits = jnp.where(logits < ranked[:, -1:], -jnp.inf, logits)
    if rules.top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        # What the more likely tokens sum to. The first is always inside.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = (before < rules.top_p).at[:, 0].set(True)
        least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if rules.min_p is not None:
        # The ratio of two probabilities needs no normalisation.
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rules.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _ranked(logits: jax.Array, rules: Rules) -> jax.Array | None:
    """The largest logits in descending order, as many as top-k and top-p look at."""
    if rules.top_k is not None:
        return jax.lax.top_k(logits, min(rules.top_k, logits.shape[1]))[0]
    return None if rules.top_p is None else jnp.sort(logits, axis=-1, descending=True)


def sample(
    logits: jax.Array, keys: jax.Array, sampling: Sampling | Rules, seen: jax.Array | None = None
) -> jax.Array:
    """Chooses one token per sequence. Pure; a `Sampling` is static in `jit`, its `rules` are not.

    Args:
      logits: f32[B, V].
      keys: one random key, or [B], one per sequence: then what is drawn for a sequence does not
        depend on the others. Greedy choice ignores them.
      seen: bool[B, V], tokens that are in the prompt or were generated; only a repetition penalty
        needs it.

    Returns: i32[B].
    Raises:  ValueError if there is a repetition penalty and no `seen`.
    """
    rules = sampling.rules() if isinstance(sampling, Sampling) else sampling
    logits = scores(logits, rules, seen)
    if rules.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys.ndim == 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
