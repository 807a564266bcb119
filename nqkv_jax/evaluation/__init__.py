"""How good and how fast a language model is through a quantized cache.

Works with any object that is a `nqkv_jax.evaluation.protocol.LanguageModel`; knows no model.
"""

from nqkv_jax.evaluation.divergence import DivergenceResult, divergence
from nqkv_jax.evaluation.perplexity import PerplexityResult, decode_perplexity, perplexity
from nqkv_jax.evaluation.throughput import CacheTiming, cache_timings

__all__ = [
    "CacheTiming",
    "DivergenceResult",
    "PerplexityResult",
    "cache_timings",
    "decode_perplexity",
    "divergence",
    "perplexity",
]
