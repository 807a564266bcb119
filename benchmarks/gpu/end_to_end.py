"""Tokens per second of whole decoders with random weights, by cache; and what fits into memory."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpu import timing
from gpu.check import KERNEL
from gpu.dense_cache import DenseCache
from gpu.journal import Unit, reason_of
from nqkv_jax import schemes
from nqkv_jax.evaluation.throughput import NO_CACHE, cache_timings
from nqkv_jax.models import families
from nqkv_jax.models.config import ModelConfig
from nqkv_jax.models.loading import LanguageModel, apply
from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.plan import cache_sizes, largest

TILED = "nqkv:residual=128,codebook=cubic"  # what the kernel serves
CHUNK = 256  # tokens that are appended at a time to fill a cache
ROOM = 0.95  # of the memory that the allocator has, as blocks do not fit together without gaps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, and where it is measured: in batches of one size, and of the largest possible."""

    name: str
    config: ModelConfig
    batch: int
    context: int
    no_cache: tuple[int, int]  # batch, tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A scheme's cache, or (scheme None) one in bfloat16 that cuDNN reads."""

    implementation: str
    scheme: str | None

    @property
    def bits(self) -> int:
        return 4 if self.scheme not in (None, "none") else 16


def settings() -> list[Setting]:
    presets = families.presets
    return [
        Setting(
            name="llama-3-8b", config=presets["llama-3-8b"], batch=32, context=7936,
            no_cache=(4, 512),
        ),
        Setting(
            name="opt-6.7b", config=presets["opt-6.7b"], batch=32, context=1920, no_cache=(4, 512)
        ),
    ]  # fmt: skip


def tiny() -> list[Setting]:
    """To try the script."""
    small = dataclasses.replace(
        families.presets["llama-3-8b"], vocab_size=64, hidden_size=64, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=32, ffn_size=64,
    )  # fmt: skip
    return [Setting(name="tiny", config=small, batch=2, context=256, no_cache=(1, 8))]


def variants() -> list[Variant]:
    cuda = jax.default_backend() == "gpu"
    return [
        Variant(implementation="cudnn" if cuda else "xla", scheme=None),
        Variant(implementation=KERNEL, scheme=TILED),
        Variant(implementation="xla", scheme="none"),
        Variant(implementation="xla", scheme=TILED),
    ]


def random_params(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model in bfloat16, made on the device."""
    graphdef, shapes = nnx.split(families.abstract(config, dtype=jnp.bfloat16))
    normal = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02),
        static_argnums=1,
    )
    keys = iter(
        jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(jax.tree.leaves(shapes)))
    )

    def draw(path, leaf):
        kind = jax.tree_util.keystr(path)
        if "scale" in kind or "bias" in kind:
            return jnp.full(leaf.shape, "scale" in kind, leaf.dtype)
        return normal(next(keys), leaf.shape)

    return graphdef, jax.block_until_ready(jax.tree_util.tree_map_with_path(draw, shapes))


@contextlib.contextmanager
def kernel_is_automatic():
    """Models attend by what "auto" takes; inside, on a GPU, that is the kernel for it."""
    decode_attention.PLATFORMS[KERNEL] = "cuda"
    try:
        yield
    finally:
        del decode_attention.PLATFORMS[KERNEL]


def abstract_cache(config: ModelConfig, variant: Variant, batch: int, max_len: int):
    """The shapes of a cache."""
    if variant.scheme is not None:
        return schemes.get(variant.scheme).abstract(
            **cache_sizes(config), batch=batch, max_len=max_len, dtype=jnp.bfloat16
        )
    size = (batch, max_len, config.num_kv_heads, config.head_dim)
    side = (jax.ShapeDtypeStruct(size, jnp.bfloat16),) * config.num_layers
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return DenseCache(
        keys=side, values=side, lengths=lengths, implementation=variant.implementation
    )


@functools.partial(jax.jit, static_argnames=("chunks", "heads"), donate_argnames=("layer",))
def _filled(layer, key, *, chunks: int, heads: tuple[int, int]):
    batch = layer.lengths.shape[0]

    def one(i, layer):
        size = (2, batch, CHUNK, *heads)
        k, v = jax.random.normal(jax.random.fold_in(key, i), size, layer.dtype)
        return layer.append(k, v, jnp.full(batch, CHUNK, jnp.int32), None)

    return jax.lax.fori_loop(0, chunks, one, layer)


def filled_cache(config: ModelConfig, variant: Variant, batch: int, context: int, max_len: int):
    """A cache with `context` random tokens in every sequence."""
    shapes = abstract_cache(config, variant, batch, max_len)
    key = jax.random.key(1, impl="unsafe_rbg")
    if variant.scheme is None:
        draw = jax.jit(lambda key: jax.random.normal(key, shapes.keys[0].shape, jnp.bfloat16))
        keys = iter(jax.random.split(key, 2 * config.num_layers))
        sides = [tuple(draw(next(keys)) for _ in range(config.num_layers)) for _ in range(2)]
        lengths = jnp.full(batch, context, jnp.int32)
        return dataclasses.replace(shapes, keys=sides[0], values=sides[1], lengths=lengths)
    cache = schemes.get(variant.scheme).init(
        **cache_sizes(config), batch=batch, max_len=max_len, dtype=jnp.bfloat16
    )
    heads = (config.num_kv_heads, config.head_dim)
    keys = jax.random.split(key, config.num_layers)
    layers = []
    for layer, key in zip(cache.layers, keys, strict=True):
        layers.append(_filled(layer, key, chunks=context // CHUNK, heads=heads))
    return dataclasses.replace(cache, layers=tuple(layers))


class Program:
    """The decoding loop of one variant: `steps` greedy tokens per call, compiled but not run."""

    def __init__(self, setting: Setting, variant: Variant, model, batch: int, steps: int, calls):
        self.setting, self.variant, self.batch, self.steps = setting, variant, batch, steps
        graphdef, self._params = model
        self.max_len = setting.context + steps * (calls + 1)

        def decode(params, token, cache):
            def step(_, carry):
                token, cache = carry
                logits, cache = apply(graphdef, params, token, cache, last_only=True)
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None], cache

            return jax.lax.fori_loop(0, steps, step, (token, cache))

        shapes = abstract_cache(setting.config, variant, batch, self.max_len)
        token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        automatic = variant.implementation == KERNEL
        with kernel_is_automatic() if automatic else contextlib.nullcontext():
            lowered = jax.jit(decode, donate_argnums=2).lower(self._params, token, shapes)
        if automatic and jax.default_backend() == "gpu" and KERNEL not in lowered.as_text():
            raise RuntimeError("expected the kernel in the program; it is not there")
        self._program = lowered.compile()
        self.cache_bytes = shapes.nbytes
        memory = self._program.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def record(self, repeats: int) -> dict:
        """Fills a cache and decodes; each repeat goes on where the last one stopped."""
        cache = filled_cache(
            self.setting.config, self.variant, self.batch, self.setting.context, self.max_len
        )
        token, times = jnp.zeros((self.batch, 1), jnp.int32), []
        for _ in range(repeats + 1):  # the first run is slower
            began = time.perf_counter()
            token, cache = jax.block_until_ready(self._program(self._params, token, cache))
            times.append(time.perf_counter() - began)
        times = np.array(times[1:]) / self.steps
        stats = jax.local_devices()[0].memory_stats() or {}
        return timing.summary(list(times)) | dict(
            tokens_per_second=self.batch / float(np.median(times)),
            process_peak_bytes=stats.get("peak_bytes_in_use"),
            cache_bytes=self.cache_bytes, temporary_bytes=self.temporary_bytes,
        )  # fmt: skip


def fields(setting: Setting, variant: Variant, measure: str) -> dict:
    config = setting.config
    return dict(
        part="end-to-end", spec=f"{setting.name}/{measure}", measure=measure,
        implementation=variant.implementation, codebook=variant.scheme or "bf16",
        bits=variant.bits, batch=setting.batch, context=setting.context,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        median_us=None, spread=None, n=0,
    )  # fmt: skip


class _Models:
    """The model that was asked for last, so that only one is in memory."""

    def __init__(self):
        self._name, self._model = None, None

    def __call__(self, setting: Setting):
        if self._name != setting.name:
            self._model = None
            self._name, self._model = setting.name, random_params(setting.config)
        return self._model


def why_not(variant: Variant) -> str | None:
    if variant.implementation == KERNEL and jax.default_backend() != "gpu":
        return f"needs a Hopper GPU; this is {jax.default_backend()}"
    return None


def units(chosen: Sequence[Setting], *, steps: int, repeats: int, memory: int) -> list[Unit]:
    """Of each model: every variant in a batch of one size, then of the largest, then no cache.

    Args: memory: bytes that a process may take on the device.
    """
    models, found = _Models(), []
    for setting in chosen:
        for measure, batch_of in (("equal batch", None), ("largest batch", _largest_batch)):
            for variant in variants()[: 4 if batch_of is None else 2]:
                found.append(
                    _decoding(setting, variant, measure, batch_of, models, steps, repeats, memory)
                )
        found.append(_against_no_cache(setting, models, steps, repeats))
    return found


def _decoding(setting, variant, measure, batch_of, models, steps, repeats, memory) -> Unit:
    base = fields(setting, variant, measure)

    def run(note, fatal) -> list[dict]:
        if reason := why_not(variant):
            return [base | dict(skipped=reason)]
        program = lambda batch: Program(setting, variant, models(setting), batch, steps, repeats)
        tried = setting.batch if batch_of is None else batch_of(setting, variant, program, memory)
        for _ in range(4):
            try:
                measured = program(tried).record(repeats)
                return [base | dict(batch=tried) | measured]
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                reason = reason_of(error)
            if batch_of is None:
                break
            tried = tried * 9 // 10
        return [base | dict(batch=tried, skipped=reason)]

    failed = lambda reason: [base | dict(failure=reason)]
    return Unit(f"end-to-end/{base['spec']}/{variant.implementation} {variant.scheme}", run, failed)


def _largest_batch(setting: Setting, variant: Variant, program: Callable, memory: int) -> int:
    """By the bytes of weights and cache, with temporaries as a small batch's program has them."""
    small = program(setting.batch)
    params = families.num_params(setting.config) * 2
    per_sequence = small.temporary_bytes / setting.batch

    def fits(batch: int) -> bool:
        cache = abstract_cache(setting.config, variant, batch, small.max_len).nbytes
        return params + cache + math.ceil(per_sequence * batch) <= ROOM * memory

    each = small.cache_bytes / setting.batch
    return largest(fits, guess=int((ROOM * memory - params) / each))


def _against_no_cache(setting: Setting, models: _Models, steps: int, repeats: int) -> Unit:
    """Reading the whole text again for every token, as the paper's 9.3x does; by the library."""
    batch, length = setting.no_cache
    kernel = jax.default_backend() == "gpu"
    quantized = Variant(implementation=KERNEL if kernel else "xla", scheme=TILED)
    base = lambda variant: fields(setting, variant, "no cache") | dict(batch=batch, context=length)
    none = Variant(implementation=NO_CACHE, scheme="none")

    def run(note, fatal) -> list[dict]:
        graphdef, params = models(setting)
        lm = LanguageModel(
            model=nnx.merge(graphdef, params), config=setting.config, tokenizer=None,
            name=setting.name, dtype=np.dtype(jnp.bfloat16),
        )  # fmt: skip
        automatic = kernel_is_automatic() if kernel else contextlib.nullcontext()
        with automatic:
            timings = cache_timings(
                lm, [("none", jnp.bfloat16), (TILED, jnp.bfloat16)], lengths=[length],
                batch=batch, steps=steps, repeats=repeats, progress=False,
            )  # fmt: skip
        rows = (none, Variant(implementation="xla", scheme="none"), quantized)
        return [
            base(variant) | timing.summary(list(t.seconds)) | dict(
                tokens_per_second=batch / t.median, cache_bytes=t.cache_bytes,
                speedup_over_no_cache=timings[0].median / t.median,
            )
            for variant, t in zip(rows, timings, strict=True)
        ]  # fmt: skip

    failed: Callable[[str], Any] = lambda reason: [base(quantized) | dict(failure=reason)]
    return Unit(f"end-to-end/{setting.name}/no cache", run, failed)
