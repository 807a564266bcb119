"""Flax NNX decoders, and pretrained weights for them.

    lm = from_pretrained("smollm2-135m")
    lm.logits([lm.tokenizer.encode("The capital of France is")])    # f32[1, tokens, vocabulary]

See `nqkv_jax.models.loading` for what can be loaded.
"""

from nqkv_jax.models.generate import Generation, TextStream, generate, stream
from nqkv_jax.models.loading import LanguageModel, from_pretrained
from nqkv_jax.models.sampling import Sampling

__all__ = [
    "Generation",
    "LanguageModel",
    "Sampling",
    "TextStream",
    "from_pretrained",
    "generate",
    "stream",
]
