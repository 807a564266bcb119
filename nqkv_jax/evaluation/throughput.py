"""Seconds per decoded token: with a cache, with a quantized one, and with none at all.

All variants are timed in one process and in turn, so that whatever else the machine does meets them
alike.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.cache import KVCache
from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.plan import cache_sizes

_CHUNK = 64  # tokens of the prompt that are appended at a time
NO_CACHE = "no cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheTiming:
    """One variant at one length.

    Attributes:
      variant: a scheme, or `NO_CACHE`: the whole text is read again for every token.
      cache_dtype: of what the cache keeps in full precision; "" without one.
      length: tokens of the text before the timed ones.
      seconds: of every repeat, per token of one sequence's text.
      cache_bytes: of a cache that is allocated for `length` tokens; 0 without one.
    """

    variant: str
    cache_dtype: str
    length: int
    seconds: tuple[float, ...]
    cache_bytes: int

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """(longest - shortest) / median."""
        return float(np.ptp(self.seconds)) / self.median


def cache_timings(
    lm: LanguageModel,
    caches: Sequence[tuple[str | schemes.Scheme, Any]],
    *,
    lengths: Iterable[int],
    batch: int = 1,
    steps: int = 8,
    repeats: int = 5,
    no_cache: bool = True,
    implementation: str = "auto",
    progress: bool | None = None,
) -> list[CacheTiming]:
    """Times one more token after texts of several lengths.

    A cache is filled to the length, untimed; then `steps` tokens are decoded in one jitted loop,
    the cache donated to it. Without a cache a token costs one pass over the text, of which only the
    last position's logits are made.

    Args:
      lm: the model.
      caches: (scheme, dtype of what it keeps in full precision).
      lengths: of the text, in tokens.
      batch: sequences that are decoded together.
      steps: tokens per repeat.
      repeats: of every measurement; the variants take turns.
      no_cache: time decoding without a cache as well.
      implementation: of decoding with all caches but "none": see `KVCache.with_implementation`.
      progress: a bar on stderr; None: if that is a terminal.

    Returns: for every length, ascending: no cache, then `caches` in their order.

    Raises:
      ValueError: a length is not positive or exceeds the model's positions, or a scheme does not
        fit the model.
      NotImplementedError: the kernel that `implementation` names cannot serve a scheme.
    """
    lengths = list(lengths)
    check_timings(lm, lengths=lengths, batch=batch, steps=steps, repeats=repeats)
    lengths = sorted(set(lengths))
    decode_attention.check_backend(implementation)
    # Real words are not needed: time depends on shapes and lengths alone.
    text = np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, lengths[-1]))
    text = jnp.asarray(text, jnp.int32)
    room = min(decode_attention.room(implementation, lengths[-1] + steps), lm.config.max_positions)
    variants = [
        _Cached(
            lm, schemes.get(scheme), dtype, text, room, steps,
            "auto" if str(scheme) == "none" else implementation,
        )
        for scheme, dtype in caches
    ]  # fmt: skip
    if no_cache:
        variants.insert(0, _Uncached(lm, text))
    timings = []
    disable = None if progress is None else not progress
    with tqdm.tqdm(
        total=len(lengths) * len(variants) * (repeats + 1),
        disable=disable,
        desc="bench",
        unit="run",
    ) as bar:
        for length in lengths:
            for variant in variants:
                variant.prepare(length)
                bar.update()
            seconds: list[list[float]] = [[] for _ in variants]
            for _ in range(repeats):
                for variant, times in zip(variants, seconds, strict=True):
                    times.append(variant.time())
                    bar.update()
            timings += [
                CacheTiming(variant=v.name, cache_dtype=v.cache_dtype, length=length,
                            seconds=tuple(times), cache_bytes=v.nbytes(length))
                for v, times in zip(variants, seconds, strict=True)
            ]  # fmt: skip
    return timings


def check_timings(
    lm: LanguageModel, *, lengths: Sequence[int], batch: int = 1, steps: int, repeats: int
) -> None:
    """Raises ValueError for sizes that cannot be timed: see `cache_timings`."""
    whole_numbers("timings", batch=batch, steps=steps, repeats=repeats)
    for length in lengths:
        whole_numbers("timings", length=length)
    if min(batch, steps, repeats) < 1:
        raise ValueError(
            f"timings: batch, steps and repeats must be positive; got {batch}, {steps}, {repeats}"
        )
    longest = lm.config.max_positions - steps
    if not lengths or min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(
            f"timings: lengths must be between 1 and {longest} (the positions of {lm.name}, less "
            f"{steps} that are decoded); got {list(lengths)}"
        )


class PairedTimings:
    """Times schemes one after another, each in turn with a full-precision cache.

    The machine may change its mind between two schemes, but then the baseline does too: ratios of
    the two can be compared where seconds cannot.

    Args:
      lm: the model.
      length: tokens of the text before the timed ones.
      steps: tokens per repeat.
      repeats: of every measurement.

    Raises: ValueError: a size is wrong.
    """

    def __init__(self, lm: LanguageModel, *, length: int, steps: int = 8, repeats: int = 5):
        check_timings(lm, lengths=[length], steps=steps, repeats=repeats)
        self._lm, self._length, self._steps, self._repeats = lm, length, steps, repeats
        rng = np.random.default_rng(0)
        self._text = jnp.asarray(rng.integers(0, lm.config.vocab_size, (1, length)), jnp.int32)
        self._baseline: _Cached | None = None

    def __call__(self, scheme: str | schemes.Scheme) -> tuple[CacheTiming, CacheTiming]:
        """The timings of a scheme and of "none"."""
        if self._baseline is None:
            self._baseline = self._prepared("none")
        pair = (self._prepared(scheme), self._baseline)
        seconds: tuple[list[float], ...] = ([], [])
        for _ in range(self._repeats):
            for variant, times in zip(pair, seconds, strict=True):
                times.append(variant.time())
        return tuple(
            CacheTiming(variant=v.name, cache_dtype=v.cache_dtype, length=self._length,
                        seconds=tuple(times), cache_bytes=v.nbytes(self._length))
            for v, times in zip(pair, seconds, strict=True)
        )  # fmt: skip

    def _prepared(self, scheme: str | schemes.Scheme) -> "_Cached":
        room = self._length + self._steps
        variant = _Cached(
            self._lm, schemes.get(scheme), self._lm.dtype, self._text, room, self._steps
        )
        variant.prepare(self._length)
        return variant


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


class _Uncached:
    name, cache_dtype = NO_CACHE, ""

    def __init__(self, lm: LanguageModel, text: jax.Array):
        self._params, self._text = lm.params, text

        @jax.jit
        def step(params, tokens):
            logits, _ = lm.apply(params, tokens, last_only=True)
            return jnp.argmax(logits, axis=-1)

        self._step = step

    def prepare(self, length: int) -> None:
        self._prefix = self._text[:, :length]
        self.time()  # compiles

    def time(self) -> float:
        return _timed(lambda: self._step(self._params, self._prefix))

    def nbytes(self, length: int) -> int:
        return 0


class _Cached:
    def __init__(
        self,
        lm: LanguageModel,
        scheme: schemes.Scheme,
        dtype: Any,
        text: jax.Array,
        max_len: int,
        steps: int,
        implementation: str = "auto",
    ):
        self.name, self.cache_dtype = str(scheme), jnp.dtype(dtype).name
        self._scheme, self._steps, self._params, self._text = scheme, steps, lm.params, text
        self._sizes = dict(**cache_sizes(lm.config), batch=text.shape[0], dtype=dtype)
        # One cache for all lengths: what is filled is read, not what is allocated.
        # A copy, as it will be donated and calibrated quantizers belong to the scheme.
        cache = scheme.init(**self._sizes, max_len=max_len).with_implementation(implementation)
        self._cache = jax.tree.map(jnp.copy, cache)
        self._length = 0

        @functools.partial(jax.jit, donate_argnames=("cache",))
        def fill(params, tokens, cache, num_new):
            return lm.apply(params, tokens, cache, num_new=num_new, last_only=True)[1]

        @functools.partial(jax.jit, donate_argnames=("cache",))
        def decode(params, token, cache):
            def step(_, carry):
                token, cache = carry
                logits, cache = lm.apply(params, token, cache, last_only=True)
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None], cache

            token, cache = jax.lax.fori_loop(0, steps, step, (token, cache.defer_flush()))
            return token, cache.flush()

        # Compiled here, so that no run that is timed ever compiles; side by side, as XLA compiles a
        # program on one core.
        chunk = jax.ShapeDtypeStruct((text.shape[0], _CHUNK), jnp.int32)
        num_new = jax.ShapeDtypeStruct(text.shape[:1], jnp.int32)
        programs = [
            fill.lower(lm.params, chunk, self._cache, num_new),
            decode.lower(lm.params, text[:, :1], self._cache),
        ]
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            self._fill, self._decode = pool.map(lambda program: program.compile(), programs)

    def prepare(self, length: int) -> None:
        batch = self._text.shape[0]
        while self._length < length:
            size = min(_CHUNK, length - self._length)
            chunk = np.zeros((batch, _CHUNK), np.int32)
            chunk[:, :size] = self._text[:, self._length : self._length + size]
            num_new = np.full(batch, size, np.int32)
            self._cache = self._fill(self._params, chunk, self._cache, num_new)
            self._length += size
        self.time()  # the first run is slower

    def time(self) -> float:
        # The loop appends, so every repeat has a cache of its own to begin with.
        cache: KVCache = jax.block_until_ready(jax.tree.map(jnp.copy, self._cache))
        token = self._text[:, self._length - 1 : self._length]
        return _timed(lambda: self._decode(self._params, token, cache)) / self._steps

    def nbytes(self, length: int) -> int:
        return self._scheme.abstract(**self._sizes, max_len=length).nbytes
