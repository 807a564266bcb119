"""What is asked of a generation, checked on the host before anything runs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache
from nqkv_jax.models.config import ModelConfig, check_tokens
from nqkv_jax.models.sampling import GREEDY, Sampling
from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.plan import cache_sizes
from nqkv_jax.schemes.base import Scheme
from nqkv_jax.words import counted

_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request; `prompts` has one entry per sequence, samples of a prompt in a row."""

    config: ModelConfig = dataclasses.field(repr=False)
    prompts: list[list[int]]
    scheme: Scheme
    max_new_tokens: int
    max_len: int
    chunk: int
    sampling: Sampling
    seed: int
    num_samples: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    cache_dtype: np.dtype
    implementation: str

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def new_cache(self) -> KVCache:
        """An empty cache."""
        cache = self.scheme.init(
            **cache_sizes(self.config), batch=len(self.prompts), max_len=self.max_len,
            dtype=self.cache_dtype,
        )  # fmt: skip
        return cache.with_implementation(self.implementation)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The prompts, `chunk` tokens at a time: tokens i32[B, chunk] and valid counts i32[B]."""
        longest = max(map(len, self.prompts))
        for begin in range(0, longest, self.chunk):
            tokens = np.zeros((len(self.prompts), self.chunk), np.int32)
            num_new = np.zeros(len(self.prompts), np.int32)
            for i, prompt in enumerate(self.prompts):
                part = prompt[begin : begin + self.chunk]
                tokens[i, : len(part)], num_new[i] = part, len(part)
            yield tokens, num_new

    def seen(self) -> np.ndarray:
        """bool[B, V], the tokens of each prompt."""
        seen = np.zeros((len(self.prompts), self.vocab_size), bool)
        for i, prompt in enumerate(self.prompts):
            seen[i, prompt] = True
        return seen


def prepare(
    lm: Any,
    prompts: Any,
    *,
    scheme: str | Scheme = "nqkv",
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
) -> Request:
    """Checks the arguments of `generate`, which describes them, and encodes the prompts.

    Raises:
      ValueError: says which argument is wrong and what would be right.
      NotImplementedError: see `generate`.
    """
    _whole("max_new_tokens", max_new_tokens, 1)
    _whole("num_samples", num_samples, 1)
    # A chunk of one token would be a decoding step, which some schemes treat otherwise.
    _whole("prefill_chunk", prefill_chunk, 2)
    _whole("seed", seed, 0, 2**32 - 1)
    if max_len is not None:
        _whole("max_len", max_len, 1)
    if not isinstance(add_special_tokens, bool):
        raise ValueError(
            f"generate: add_special_tokens must be True or False; got {add_special_tokens!r}"
        )
    if not isinstance(sampling, Sampling):
        raise ValueError(f"generate: sampling must be a Sampling(...); got {sampling!r}")
    if implementation not in decode_attention.IMPLEMENTATIONS:
        raise ValueError(
            f"generate: implementation must be one of {decode_attention.IMPLEMENTATIONS}; got "
            f"{implementation!r}"
        )
    scheme = schemes.get(scheme)
    stop = _stop_strings(lm, stop)
    ids = _encode(lm, prompts, add_special_tokens)
    longest, limit = max(map(len, ids)), lm.config.max_positions
    total = f"longest prompt: {counted(longest, 'token')}, plus max_new_tokens={max_new_tokens}"
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt and new tokens must fit into the {limit} positions of {lm.name}; "
            f"got {longest + max_new_tokens} ({total}). Shorten the prompt, or lower max_new_tokens"
        )
    chunk = min(_bucket(longest, prefill_chunk), limit)
    padded = -(-longest // chunk) * chunk
    if max_len is None:
        max_len = min(decode_attention.room(implementation, padded + max_new_tokens), limit)
    elif longest + max_new_tokens > max_len:
        raise ValueError(
            f"generate: prompt and new tokens must fit into max_len={max_len}; got "
            f"{longest + max_new_tokens} ({total}). Raise max_len, or leave it out"
        )
    request = Request(
        config=lm.config,
        prompts=[prompt for prompt in ids for _ in range(num_samples)],
        scheme=scheme,
        max_new_tokens=max_new_tokens,
        max_len=max_len,
        chunk=chunk,
        sampling=sampling,
        seed=seed,
        num_samples=num_samples,
        stop=stop,
        stop_ids=lm.eos_ids | _stop_ids(lm, stop_ids),
        cache_dtype=_cache_dtype(lm.dtype if cache_dtype is None else cache_dtype),
        implementation=implementation,
    )
    if implementation in decode_attention.KERNELS:
        # What a kernel cannot serve should be said before the prompts are read.
        decode_attention.check_backend(implementation)
        token = jax.ShapeDtypeStruct((len(request.prompts), 1), jnp.int32)
        jax.eval_shape(lambda t, p: lm.apply(p, t, request.new_cache()), token, lm.params)
    return request


def _bucket(length: int, largest: int) -> int:
    """The power of two that a prompt of this length is padded to, but at most `largest`."""
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), largest)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        good = False
    else:
        good = least <= value and (most is None or value <= most)
    if not good:
        bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"generate: {name} must be a whole number {bounds}; got {value!r}")


def _encode(lm: Any, prompts: Any, add_special_tokens: bool) -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    expected = "generate: prompts must be a text, texts or lists of token ids"
    if not np.iterable(prompts) or isinstance(prompts, bytes | Mapping | Set):
        raise ValueError(f"{expected}; got {prompts!r}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"{expected}; got none")
    if not any(map(np.iterable, prompts)):
        raise ValueError(
            f"{expected}; got {type(prompts[0]).__name__} at the top level. For one list of ids: "
            "[ids]"
        )
    texts = [p for p in prompts if isinstance(p, str)]
    if texts and lm.tokenizer is None:
        raise ValueError(f"generate: {lm.name} has no tokenizer; pass lists of token ids")
    encoded = iter(lm.tokenizer.encode_batch(texts, add_special_tokens) if texts else ())
    ids = [next(encoded) if isinstance(p, str) else p for p in prompts]
    return [_check_ids(lm.config, i, p, prompts[i]) for i, p in enumerate(ids)]


def _check_ids(config: ModelConfig, i: int, ids: Any, prompt: Any) -> list[int]:
    try:
        found = np.asarray(ids)
    except ValueError:  # rows of several lengths
        found = np.empty(())
    if found.ndim != 1:
        raise ValueError(f"generate: prompt {i} must be a list of token ids; got {prompt!r}")
    if not found.size:
        raise ValueError(
            f"generate: a prompt must have at least one token; prompt {i} has none: {prompt!r}. "
            "For a model with a BOS token, [bos_id] is an empty prompt"
        )
    try:
        return check_tokens(config, found).tolist()
    except ValueError as error:
        raise ValueError(f"generate: prompt {i}: {error}") from error


def _stop_strings(lm: Any, stop: Any) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) or not np.iterable(stop) else tuple(stop)
    if not all(isinstance(s, str) and s for s in found):
        raise ValueError(f"generate: stop must be strings that are not empty; got {stop!r}")
    if found and lm.tokenizer is None:
        raise ValueError(f"generate: {lm.name} has no tokenizer for stop strings; use stop_ids")
    return found


def _stop_ids(lm: Any, stop_ids: Any) -> frozenset[int]:
    stop_ids = () if stop_ids is None else stop_ids
    if np.ndim(stop_ids) != 1:
        raise ValueError(f"generate: stop_ids must be a list of token ids; got {stop_ids!r}")
    try:
        return frozenset(check_tokens(lm.config, stop_ids).tolist())
    except ValueError as error:
        raise ValueError(f"generate: stop_ids: {error}") from error


def _cache_dtype(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"generate: cache_dtype must be float32, bfloat16 or float16, or None; got {dtype!r}"
        )
    return found
