"""lm-evaluation-harness with the model "nqkv" in it.

    python -m nqkv_jax.cli.lm_eval --model nqkv \\
        --model_args pretrained=smollm2-135m,scheme=nqkv,bits=3 --tasks lambada_openai

All else is as with the harness's own `lm_eval`, which finds models only where its own are:
importing this module registers ours. Options of the scheme stand beside it, as commas separate
arguments.
"""

import sys
from typing import Any

from nqkv_jax.extras import missing

try:
    from lm_eval.api.registry import register_model
except ImportError as error:
    needed = f"{missing('the harness', 'lm-eval', 'lm-eval')} ({error})"
    if __name__ == "__main__":
        sys.exit(f"nqkv: error: {needed}")
    raise ImportError(needed) from error

from nqkv_jax import schemes
from nqkv_jax.evaluation.lm_eval import HarnessLM, check_sizes
from nqkv_jax.models import from_pretrained, generate


@register_model("nqkv")
class NqkvLM(HarnessLM):
    """`HarnessLM` from names.

    Args:
      pretrained: as `from_pretrained` takes it.
      scheme: of the cache.
      dtype: of the weights.
      cache_dtype, batch_size, max_gen_toks: of `HarnessLM`.
      max_batch_size, device: given by the harness; JAX has its own ways to choose a device.
      options: of the scheme.
    """

    def __init__(
        self,
        pretrained: str,
        scheme: str = "nqkv",
        *,
        dtype: Any = None,
        cache_dtype: Any = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        # Before minutes of loading.
        chosen = schemes.get(scheme, **options)
        check_sizes(batch_size, max_gen_toks)
        lm = from_pretrained(pretrained, dtype=dtype)
        super().__init__(
            lm, generate, scheme=chosen, cache_dtype=cache_dtype, batch_size=batch_size,
            max_gen_toks=max_gen_toks,
        )  # fmt: skip


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
