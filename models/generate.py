"""Generation: prefill the prompts in chunks, then one jitted loop over the cache of any scheme.

    lm = from_pretrained("smollm2-135m")
    result = generate(lm, ["The capital of France is"], scheme="nqkv", max_new_tokens=32)
    result.texts, result.tokens_per_second, result.cache_bytes

Prompts of different lengths are right-padded; every sequence has its own length in the cache.
Prompts are padded to a power of two from 16 up to `prefill_chunk`; longer ones are walked in chunks
of that size, so that the memory for activations does not grow with the prompt. Tokens of one chunk
see each other in full precision, and earlier chunks through the cache.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nqkv_jax.cache import KVCache
from nqkv_jax.models import decoding
from nqkv_jax.models.loading import LanguageModel
from nqkv_jax.models.requests import Request, prepare
from nqkv_jax.models.sampling import GREEDY, Sampling
from nqkv_jax.models.stopping import TextWriter
from nqkv_jax.schemes.base import Scheme

# Stop strings are looked for in Python; between two looks so many tokens are generated.
_STOP_CHUNK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns. Lists have one entry per sequence, samples of a prompt in a row.

    Attributes:
      texts: without the prompt, the stop token or the stop string; None without a tokenizer.
      tokens: the new ids, the stop token included, or up to the one that completed a stop string.
      prompt_tokens: ids of the prompts.
      finish_reasons: "stop" (a stop token or string came) or "length".
      prefill_seconds: for all prompts, up to their logits.
      decode_seconds: for everything after the prefill; compiling not included.
      compile_seconds: tracing and compiling; almost nothing where the programs were there already.
      tokens_per_second: tokens of all sequences that the decoding loop made, per decode second. The
        first token of a sequence comes out of the prefill and does not count.
      cache_bytes: of all arrays of the cache.
      stored_bits: bits per element of the cache's body; 0 if it has none.
      scheme: its string form.
      cache: as generation left it: everything but the last token of each sequence. With stop
        strings it may hold a few tokens more than `tokens`.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    prompt_tokens: list[list[int]] = dataclasses.field(repr=False)
    finish_reasons: list[str]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    tokens_per_second: float
    cache_bytes: int
    stored_bits: float
    scheme: str
    cache: KVCache = dataclasses.field(repr=False)


def generate(
    lm: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    scheme: str | Scheme | None = None,
    cache: KVCache | None = None,
    max_new_tokens: int = 64,
    max_len: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    num_samples: int = 1,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int = 1024,
    cache_dtype: Any = None,
    implementation: str = "auto",
    add_special_tokens: bool = True,
) -> Generation:
    """Continues the prompts.

    Compiles once per (batch, max_len, padded prompt length up to `prefill_chunk`, which rules of
    `Sampling` there are), for each scheme and model architecture.

    Args:
      lm: as `from_pretrained` returns it.
      prompts: a text, texts, or lists of token ids.
      scheme: of the cache, or its string form: `nqkv_jax.schemes.names()`. Default: "nqkv".
      cache: to go on from, in place of an empty one, with room for what is to come: prompts are
        what follows there, one for each of its sequences. It is copied, and can be used again. The
        last token of a `Generation` is not in its cache: begin with it, or generate only one token
        where the prompt is all that is to be kept. A repetition penalty does not see what is in it.
      max_new_tokens: at most so many per sequence.
      max_len: tokens per sequence that the cache has room for. Default: the padded prompt length
        plus `max_new_tokens`, in steps of 128; for a kernel that is asked for at least 1,024; as
        far as the model has positions.
      sampling: greedy by default.
      seed: what is drawn for sample j of prompt i depends on the model's distribution and on
        (seed, i, j), not on the other prompts.
      num_samples: continuations of each prompt, which is read once.
      stop: strings that end a sequence; they are cut from its text.
      stop_ids: token ids that end a sequence, in addition to those of the model and its tokenizer.
      prefill_chunk: prompt tokens that go through the model at a time.
      cache_dtype: of what the scheme keeps in full precision; default: the dtype of the model, or
        of `cache`.
      implementation: of decoding with the cache: see `KVCache.with_implementation`.
      add_special_tokens: whether texts get a BOS token, if the model wants one, and they do not
        follow anything in `cache`.

    Raises:
      ValueError: an argument is wrong, a prompt has no token or an id outside the vocabulary, or
        prompt and new tokens do not fit into `max_len` or the model's positions; or `cache` is not
        of this model, these prompts, or what else is asked for.
      NotImplementedError: the kernel that `implementation` names cannot serve scheme and model.
      FloatingPointError: the model's logits are not numbers.
    """
    request = prepare(
        lm, prompts, scheme=scheme, cache=cache, max_new_tokens=max_new_tokens, max_len=max_len,
        sampling=sampling, seed=seed, num_samples=num_samples, stop=stop, stop_ids=stop_ids,
        prefill_chunk=prefill_chunk, cache_dtype=cache_dtype, implementation=implementation,
        add_special_tokens=add_special_tokens,
    )  # fmt: skip
    run = _Run(lm, request)
    step = _STOP_CHUNK if request.stop else max_new_tokens
    while not run.finished:
        run.advance(step)
    return run.result()


def stream(
    lm: LanguageModel, prompt: str | Sequence[int], *, chunk: int = 8, **options: Any
) -> "TextStream":
    """Continues one prompt, and yields the text while it is made.

        pieces = stream(lm, "Once upon a time", max_new_tokens=200)
        for piece in pieces:
            print(piece, end="", flush=True)
        pieces.result.tokens_per_second

    Args:
      prompt: a text, or token ids.
      chunk: tokens that are generated between two pieces.
      options: those of `generate`, except `num_samples`; the text is the same as there.

    Returns: an iterator over pieces of text; once it is exhausted, `result` is the `Generation`.
    Raises:  as `generate`, at once; and ValueError if the model has no tokenizer.
    """
    if isinstance(lm, LanguageModel) and lm.tokenizer is None:
        raise ValueError(f"stream: {lm.name} has no tokenizer to make text; use generate")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"stream: chunk must be a whole number >= 1; got {chunk!r}")
    if options.get("num_samples", 1) != 1:
        raise ValueError(
            f"stream: there is one sequence; got num_samples={options['num_samples']}. Use generate"
        )
    return TextStream(_Run(lm, prepare(lm, [prompt], **options)), chunk)


class TextStream:
    """Iterates over the text of a sequence as it is generated; see `stream`."""

    def __init__(self, run: "_Run", chunk: int):
        self._run, self._result = run, None
        self._pieces = self._iterate(chunk)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """The whole generation. Raises: RuntimeError while there is text to come."""
        if self._result is None:
            raise RuntimeError("stream: the result is there once all pieces have been taken")
        return self._result

    def _iterate(self, chunk: int) -> Iterator[str]:
        while not self._run.finished:
            (piece,) = self._run.advance(chunk)
            if self._run.finished:
                self._result = self._run.result()
            if piece:
                yield piece


class _Run:
    """One generation in progress: the state on the device, and what came of it so far."""

    def __init__(self, lm: LanguageModel, request: Request):
        request.scheme.check_model(lm)
        self._request, self._scheme = request, request.scheme
        self._model = (nnx.graphdef(lm.model), lm.params)
        self._seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}
        self._cache = request.new_cache()
        self._state: decoding.DecodeState | None = None
        # Padded, so that a few more or fewer of them are the same program. No token has id -1.
        stop_ids = sorted(request.stop_ids)
        stop_ids += [-1] * (-len(stop_ids) % 8)
        self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
        self._rules = request.sampling.rules()
        self._prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)]
        self._writers = None
        if lm.tokenizer is not None:
            self._writers = [TextWriter(lm.tokenizer, p, request.stop) for p in self._prompts]
        self._tokens: list[list[int]] = [[] for _ in range(request.batch)]
        self._reasons: list[str | None] = [None] * request.batch

    @property
    def finished(self) -> bool:
        return None not in self._reasons

    def advance(self, count: int) -> list[str]:
        """Generates up to `count` more tokens per sequence; the new text of each sequence."""
        if self._state is None:
            self._begin()
        made = max(map(len, self._tokens))
        limit = min(made + count, self._request.max_new_tokens)
        if limit > 1:
            stopped = jnp.asarray([reason is not None for reason in self._reasons])
            self._state = self._call(
                "decode", decoding.decode, *self._model, self._state, stopped, self._stop_ids,
                jnp.asarray(limit, jnp.int32), rules=self._rules,
            )  # fmt: skip
        return self._read()

    def result(self) -> Generation:
        cache = self._state.cache.check()
        # Also the tokens that were made after a stop string: the loop took its time for them.
        made = int(jnp.sum(self._state.count - 1))
        decode = self._seconds["decode"]
        return Generation(
            texts=None if self._writers is None else [writer.text for writer in self._writers],
            tokens=self._tokens,
            prompt_tokens=self._prompts,
            finish_reasons=self._reasons,
            prefill_seconds=self._seconds["prefill"],
            decode_seconds=decode,
            compile_seconds=self._seconds["compile"],
            tokens_per_second=made / decode,
            cache_bytes=cache.nbytes,
            stored_bits=cache.stored_bits,
            scheme=str(self._scheme),
            cache=cache,
        )

    def _begin(self) -> None:
        """Prefill, and the first token."""
        request = self._request
        logits = jnp.zeros((len(request.prompts), request.vocab_size), jnp.float32)
        for tokens, num_new in request.chunks():
            logits, self._cache = self._call(
                "prefill", decoding.prefill, *self._model, jnp.asarray(tokens),
                jnp.asarray(num_new), logits, self._cache,
            )  # fmt: skip
        if request.num_samples > 1:
            logits, self._cache = self._call(
                "prefill", decoding.repeat, logits, self._cache, num_samples=request.num_samples
            )
        penalised = self._rules.repetition_penalty is not None
        seen = jnp.asarray(request.seen()) if penalised else None
        self._state = self._call(
            "decode", decoding.start, logits, self._cache, seen, np.uint32(request.seed),
            self._stop_ids, rules=self._rules, num_samples=request.num_samples,
        )  # fmt: skip
        self._cache = None

    def _call(self, kind: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        # The compiled program is kept where the call looks for it, so that times are apart.
        function.lower(*args, **kwargs).compile()
        compiled = time.perf_counter()
        out = jax.block_until_ready(function(*args, **kwargs))
        self._seconds["compile"] += compiled - begin
        self._seconds[kind] += time.perf_counter() - compiled
        return out

    def _read(self) -> list[str]:
        """Takes over the tokens that are new on the device; their text."""
        state, request = self._state, self._request
        tokens, counts, failed = (np.array(a) for a in (state.tokens, state.count, state.failed))
        if failed.any():
            raise FloatingPointError(
                f"generate: the logits must be numbers; those of sequences "
                f"{np.flatnonzero(failed).tolist()} are NaN. A float16 model can overflow: load it "
                "as bfloat16 or float32. Otherwise the weights or the cache hold NaN"
            )
        return [
            self._extend(i, tokens[i, len(self._tokens[i]) : counts[i]].tolist())
            if self._reasons[i] is None
            else ""
            for i in range(request.batch)
        ]

    def _extend(self, i: int, tokens: list[int]) -> str:
        writer = None if self._writers is None else self._writers[i]
        text = ""
        for token in tokens:
            self._tokens[i].append(token)
            if token in self._request.stop_ids:
                self._reasons[i] = "stop"
                break
            if writer is not None:
                text += writer.push(token)
                if writer.stopped:
                    self._reasons[i] = "stop"
                    break
        if self._reasons[i] is None and len(self._tokens[i]) == self._request.max_new_tokens:
            self._reasons[i] = "length"
        if self._reasons[i] is not None and writer is not None:
            text += writer.finish()
            if writer.stopped:
                self._reasons[i] = "stop"
        return text
