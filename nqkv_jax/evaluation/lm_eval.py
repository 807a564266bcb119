"""A model with a quantized cache for EleutherAI's lm-evaluation-harness (package `lm-eval`).

    lm = from_pretrained("smollm2-135m")
    lm_eval.simple_evaluate(HarnessLM(lm, generate, scheme="nqkv"), tasks=["lambada_openai"])

Log-likelihoods are those that decoding through the cache would see (`likelihood.Scorer`);
generation is greedy, through the cache. On the command line: `python -m nqkv_jax.cli.lm_eval`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nqkv_jax import schemes
from nqkv_jax.evaluation.likelihood import Likelihood, Scorer, batches, check_pairs
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.retrieval import Generate
from nqkv_jax.evaluation.windows import opened
from nqkv_jax.words import counted

# How other programs call the limit of a generation, those that win first.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def check_sizes(batch_size: int | str, max_gen_toks: int | str) -> None:
    """Raises ValueError unless both are positive whole numbers, as such or in digits."""
    for name, size in dict(batch_size=batch_size, max_gen_toks=max_gen_toks).items():
        if not str(size).isdecimal() or int(size) < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {size!r}")


class HarnessLM(TemplateLM):
    """The harness's interface to a model and a scheme.

    Args:
      lm: the model, with a tokenizer.
      generate: `nqkv_jax.models.generate`.
      scheme: how keys and values are cached.
      cache_dtype: of what the cache keeps in full precision; default the model's.
      batch_size: prompts that are continued together. Log-likelihoods have batches of their own.
      max_gen_toks: of a generation whose task sets no limit.

    Raises: ValueError: an argument is wrong, or the scheme does not fit the model.
    """

    def __init__(
        self,
        lm: LanguageModel,
        generate: Generate,
        *,
        scheme: str | schemes.Scheme = "nqkv",
        cache_dtype: Any = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        if lm.tokenizer is None:
            raise ValueError(f"{lm.name} came without a tokenizer, which the harness's texts need")
        check_sizes(batch_size, max_gen_toks)
        self.tokenizer = lm.tokenizer
        self._lm, self._generate = lm, generate
        self._scheme, self._cache_dtype = schemes.get(scheme), cache_dtype
        self._batch_size, self._max_gen_toks = int(batch_size), int(max_gen_toks)
        self._scorer = Scorer(lm, self._scheme, cache_dtype)

    @property
    def tokenizer_name(self) -> str:
        return self._lm.name

    @property
    def eot_token_id(self) -> int:
        if not self._lm.eos_ids:
            raise ValueError(f"{self._lm.name} has no end-of-text token, which this task needs")
        return min(self._lm.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or else end-of-text."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def get_model_info(self) -> dict[str, str]:
        """For the harness's record of a run."""
        return dict(pretrained=self._lm.name, scheme=str(self._scheme))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """No BOS token unless it is asked for, or the model needs it (Gemma)."""
        ids = list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))
        return opened(self._lm, ids) if add_special_tokens is None else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([pair for _, *pair in requests], disable_tqdm)
        results = [(f.log_likelihood, f.greedy) for f in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _likelihoods(self, pairs: Sequence[Any], disable_tqdm: bool) -> list[Likelihood]:
        pairs = check_pairs(self._lm, pairs)
        results: list[Any] = [None] * len(pairs)
        with tqdm.tqdm(total=len(pairs), desc=str(self._scheme), disable=disable_tqdm) as bar:
            for size, members in batches(pairs, self._lm.config.max_positions):
                found = self._scorer.batch(size, pairs, members)
                for member, result in zip(members, found, strict=True):
                    results[member] = result
                bar.update(len(members))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in disjoint windows as long as the model has positions."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                # A window's last token is predicted and not read, but stands in it here.
                max_seq_len=self._lm.config.max_positions - 1,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in rolling]
            windows += own
            owners += [i] * len(own)
        results = [0.0] * len(requests)
        found = self._likelihoods(windows, disable_tqdm)
        for owner, likelihood in zip(owners, found, strict=True):
            results[owner] += likelihood.log_likelihood
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, which is cut off, or the end of the text."""
        jobs = [(request.args[0], *self._stopping(request.args[1])) for request in requests]
        results: list[Any] = [None] * len(jobs)
        # Prompts of similar length pad each other less.
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1:], -len(jobs[i][0])))
        with tqdm.tqdm(total=len(jobs), desc=str(self._scheme), disable=disable_tqdm) as bar:
            while order:
                _, until, limit = jobs[order[0]]
                members = [i for i in order[: self._batch_size] if jobs[i][1:] == (until, limit)]
                order = order[len(members) :]
                texts = self._continue([jobs[i][0] for i in members], until, limit)
                for i, text in zip(members, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(members))
        return results

    def _continue(self, contexts: list[str], until: tuple[str, ...], limit: int) -> list[str]:
        room = self._lm.config.max_positions - limit
        if room < 1:
            raise ValueError(
                f"generate_until: {counted(limit, 'new token')} must fit into the "
                f"{self._lm.config.max_positions} positions of {self._lm.name}, and a prompt too. "
                "Lower max_gen_toks"
            )
        # The end of a prompt is what is to be continued. An empty one is the beginning of a text.
        encode = functools.partial(self.tok_encode, add_special_tokens=False)
        prompts = [opened(self._lm, encode(c), room) or [self.prefix_token_id] for c in contexts]
        result = self._generate(
            self._lm, prompts, scheme=self._scheme, max_new_tokens=limit, stop=until,
            cache_dtype=self._cache_dtype,
        )  # fmt: skip
        return result.texts

    def _stopping(self, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop strings and the most tokens, from a task's generation_kwargs."""
        if settings.get("do_sample") or (
            settings.get("temperature") and settings.get("do_sample", True)
        ):
            raise ValueError(
                "generate_until: generation is greedy here, so do_sample must be false and "
                f"temperature 0; got {dict(settings)}. Set --gen_kwargs do_sample=False"
            )
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        limits = [settings[name] for name in _LIMITS if settings.get(name) is not None]
        return tuple(s for s in until if s), int(limits[0] if limits else self._max_gen_toks)
