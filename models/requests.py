"""What is asked of a generation, checked on the host before anything runs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache
from nqkv_jax.checks import is_whole
from nqkv_jax.models.config import ModelConfig, check_tokens
from nqkv_jax.models.loading import LanguageModel
from nqkv_jax.models.sampling import GREEDY, Sampling
from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.plan import cache_sizes
from nqkv_jax.schemes.base import Scheme
from nqkv_jax.words import counted

_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request."""

    config: ModelConfig = dataclasses.field(repr=False)
    prompts: list[list[int]]
    cache: KVCache | None = dataclasses.field(repr=False)  # that they go on from
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

    @property
    def batch(self) -> int:
        """Sequences that are generated: samples of a prompt in a row."""
        return len(self.prompts) * self.num_samples

    def new_cache(self) -> KVCache:
        """A cache that the prompts can be appended to, for one sequence each."""
        if self.cache is not None:  # whoever passed it may use it again; ours is donated
            cache = jax.tree.map(jnp.copy, self.cache)
        else:
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
        """bool[batch, V], the tokens of each prompt."""
        seen = np.zeros((len(self.prompts), self.vocab_size), bool)
        for i, prompt in enumerate(self.prompts):
            seen[i, prompt] = True
        return np.repeat(seen, self.num_samples, axis=0)


def prepare(
    lm: LanguageModel,
    prompts: Any,
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
) -> Request:
    """Checks the arguments of `generate`, which describes them, and encodes the prompts.

    Raises:
      ValueError: says which argument is wrong and what would be right.
      NotImplementedError: see `generate`.
    """
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"generate: expected lm to be a model that from_pretrained returned; got {lm!r:.200}"
        )
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
    prompts = _listed(lm, prompts)
    cached = np.zeros(len(prompts), int)
    if cache is not None:
        cached = _cached(lm, cache, len(prompts), scheme, max_len, cache_dtype)
        scheme, max_len, cache_dtype = cache.scheme, cache.max_len, cache.layers[0].dtype
    scheme = schemes.get("nqkv" if scheme is None else scheme)
    stop = _stop_strings(lm, stop)
    ids = _encode(lm, prompts, [add_special_tokens and not n for n in cached])
    sizes, limit = cached + [len(p) for p in ids], lm.config.max_positions
    longest = int(sizes.max())
    what = f"longest prompt: {counted(longest, 'token')}"
    if cache is not None:
        what = f"most tokens of cache and prompt: {longest}"
    total = f"{what}, plus max_new_tokens={max_new_tokens}"
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt and new tokens must fit into the {limit} positions of {lm.name}; "
            f"got {longest + max_new_tokens} ({total}). Shorten the prompt, or lower max_new_tokens"
        )
    longest_prompt = max(map(len, ids))
    chunk = min(_bucket(longest_prompt, prefill_chunk), limit)
    padded = -(-longest_prompt // chunk) * chunk
    if max_len is None:
        max_len = min(decode_attention.room(implementation, padded + max_new_tokens), limit)
    elif longest + max_new_tokens > max_len:
        better = "Raise max_len, or leave it out"
        if cache is not None:
            better = (
                "A cache does not grow: make the one that is gone on from with a larger max_len"
            )
        raise ValueError(
            f"generate: prompt and new tokens must fit into max_len={max_len}; got "
            f"{longest + max_new_tokens} ({total}). {better}"
        )
    elif cache is None and max_len > limit:
        raise ValueError(
            f"generate: max_len must be at most the {limit} positions of {lm.name}; got {max_len}"
        )
    request = Request(
        config=lm.config,
        prompts=ids,
        cache=cache,
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
    if not is_whole(value) or value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"generate: {name} must be a whole number {bounds}; got {value!r}")


def _cached(
    lm: Any, cache: Any, num_prompts: int, scheme: Any, max_len: int | None, dtype: Any
) -> np.ndarray:
    """i64[B], tokens of a cache that prompts are to go on from; ValueError if they cannot."""
    leaves = jax.tree.leaves(cache)
    if not isinstance(cache, KVCache) or not all(isinstance(a, jax.Array) for a in leaves):
        raise ValueError(
            f"generate: cache must be a KVCache, such as Generation.cache; got {cache!r:.200}"
        )
    if any(a.is_deleted() for a in leaves):
        raise ValueError(
            "generate: the cache is gone, as its arrays were donated to a program. Keep a copy of "
            "it, or save it with save_cache, to go on from it more than once"
        )
    sizes = cache_sizes(lm.config)
    windows = sizes.pop("windows") or (None,) * sizes["num_layers"]
    one = cache.layers[0]
    found = dict(num_layers=len(cache.layers), num_kv_heads=one.num_kv_heads, head_dim=one.head_dim)
    if found != sizes:
        raise ValueError(f"generate: cache must have {sizes}, as {lm.name} does; got {found}")
    for i, (layer, window) in enumerate(zip(cache.layers, windows, strict=True)):
        if layer.window is not None and (window is None or layer.window < window):
            raise ValueError(
                f"generate: cache must have all tokens that {lm.name} attends to; in layer {i} it "
                f"keeps {layer.window} of {window or 'all'}"
            )
    if num_prompts != cache.batch:
        raise ValueError(
            f"generate: there must be a prompt for each of the cache's {cache.batch} sequences; "
            f"got {num_prompts}. cache.take([0, 0, ...]) repeats a sequence"
        )
    for name, wanted, has in (
        ("scheme", None if scheme is None else str(schemes.get(scheme)), cache.scheme),
        ("max_len", max_len, cache.max_len),
        ("cache_dtype", None if dtype is None else _cache_dtype(dtype), one.dtype),
    ):
        if wanted not in (None, has):
            raise ValueError(
                f"generate: {name} is what the cache has, {has}; got {wanted}. Leave it out, or "
                "begin without a cache"
            )
    for layer in cache.layers:
        layer.check_flushed()
    return np.asarray(cache.check().lengths, int)


def _listed(lm: Any, prompts: Any) -> list:
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
    if lm.tokenizer is None and any(isinstance(p, str) for p in prompts):
        raise ValueError(f"generate: {lm.name} has no tokenizer; pass lists of token ids")
    return prompts


def _encode(lm: Any, prompts: list, special: list[bool]) -> list[list[int]]:
    """Token ids of the prompts; special[i]: whether the i-th gets special tokens, if a text."""
    ids = list(prompts)
    for wanted in (True, False):
        texts = [i for i, p in enumerate(prompts) if isinstance(p, str) and special[i] is wanted]
        if texts:
            found = lm.tokenizer.encode_batch([prompts[i] for i in texts], wanted)
            for i, encoded in zip(texts, found, strict=True):
                ids[i] = encoded
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
