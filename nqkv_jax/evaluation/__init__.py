"""How good and how fast a language model is through a quantized cache.

Works with any object that is a `nqkv_jax.evaluation.protocol.LanguageModel`; knows no model.
"""

from nqkv_jax.evaluation.choice import ChoiceResult, LastWordResult, last_word, multiple_choice
from nqkv_jax.evaluation.divergence import DivergenceResult, divergence
from nqkv_jax.evaluation.drift import DriftBucket, DriftResult, drift
from nqkv_jax.evaluation.perplexity import PerplexityResult, decode_perplexity, perplexity
from nqkv_jax.evaluation.retrieval import RetrievalCell, RetrievalResult, retrieval
from nqkv_jax.evaluation.throughput import CacheTiming, cache_timings

__all__ = [
    "CacheTiming",
    "ChoiceResult",
    "DivergenceResult",
    "DriftBucket",
    "DriftResult",
    "LastWordResult",
    "PerplexityResult",
    "RetrievalCell",
    "RetrievalResult",
    "cache_timings",
    "decode_perplexity",
    "divergence",
    "drift",
    "last_word",
    "multiple_choice",
    "perplexity",
    "retrieval",
]
