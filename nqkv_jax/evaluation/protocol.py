"""What evaluation asks of a language model."""

from typing import Any, Protocol

import jax

from nqkv_jax.plan import CacheShape


class ModelShape(CacheShape, Protocol):
    """What a cache depends on, and the vocabulary.

    There may be `opening`, too: token ids that every text must begin with; and `window(layer)`, the
    sliding window of a layer, or None.
    """

    vocab_size: int


class LanguageModel(Protocol):
    """A decoder: `apply` is pure, so that it can be traced, and takes its parameters explicitly.

    Attributes:
      params: a pytree of arrays.
      config: the model's sizes.
      tokenizer: has `encode(text, add_special_tokens=...) -> list[int]`; None if there is none.
      name: for messages and records.
      dtype: of parameters and activations.
    """

    params: Any
    config: ModelShape
    tokenizer: Any
    name: str
    dtype: Any

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        cache: Any = None,
        *,
        num_new: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Any]:
        """The logits after tokens i32[B, S], and the cache with these tokens.

        Logits are [B, S, vocabulary]; with `last_only` [B, vocabulary], after the last valid token.
        """

    def hidden(self, params: Any, tokens: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
        """The states [B, S, width] that `head` turns into logits, and the cache."""

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """The logits [B, S, vocabulary] of states [B, S, width], of any tokens.

        The two together are `apply`, for callers that cannot hold all logits of a text at once.
        """
