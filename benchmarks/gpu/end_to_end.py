"""Tokens per second of whole decoders with random weights, by cache; and what fits into memory."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Collection, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpu import timing
from gpu.check import KERNEL
from gpu.dense_cache import DenseCache
from gpu.journal import Unit, reason_of
from nqkv_jax import schemes
from nqkv_jax.evaluation.throughput import NO_CACHE
from nqkv_jax.models import families
from nqkv_jax.models.config import ModelConfig
from nqkv_jax.models.loading import apply
from nqkv_jax.pallas_kernels import append_token, exact_attention
from nqkv_jax.plan import cache_sizes, largest

BEST = "nqkv:residual=128,codebook=cubic"  # the levels that take the kernel least
PUBLISHED = "nqkv"  # encoded token by token
CHUNK = 128  # tokens that are appended at a time to fill a cache
ROOM = 0.95  # of the memory that the allocator has, as blocks do not fit together without gaps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, and where it is measured: in batches of one size, and of the largest possible."""

    name: str
    config: ModelConfig
    batch: int
    context: int
    small: tuple[int, int]  # batch and tokens, where no cache is compared with


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
            small=(4, 512),
        ),
        Setting(
            name="opt-6.7b", config=presets["opt-6.7b"], batch=32, context=1920, small=(4, 512)
        ),
    ]  # fmt: skip


def tiny() -> list[Setting]:
    """To try the script."""
    small = dataclasses.replace(
        families.presets["llama-3-8b"], vocab_size=64, hidden_size=64, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=32, ffn_size=64,
    )  # fmt: skip
    return [Setting(name="tiny", config=small, batch=2, context=256, small=(1, 8))]


def variants(cuda: bool | None = None) -> list[Variant]:
    """The best of bfloat16 and of codes, then others; for GPUs or not (None: as the machine is)."""
    cuda = jax.default_backend() == "gpu" if cuda is None else cuda
    return [
        Variant(implementation="cudnn" if cuda else "xla", scheme=None),
        Variant(implementation=KERNEL, scheme=BEST),
        Variant(implementation=KERNEL, scheme=PUBLISHED),
        Variant(implementation="xla", scheme="none"),
        Variant(implementation="xla", scheme=BEST),
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


OTHERS = {"append": append_token, "exact": exact_attention}  # by how their checks are named


@contextlib.contextmanager
def left_to_xla(left_out: Collection[str]):
    """Inside, what is traced leaves those of `OTHERS` to XLA."""
    with contextlib.ExitStack() as stack:
        for name in left_out:
            stack.enter_context(mock.patch.object(OTHERS[name], "PLATFORMS", set()))
        yield


def abstract_cache(config: ModelConfig, variant: Variant, batch: int, max_len: int):
    """The shapes of a cache."""
    if variant.scheme is not None:
        cache = schemes.get(variant.scheme).abstract(
            **cache_sizes(config), batch=batch, max_len=max_len, dtype=jnp.bfloat16
        )
        return cache.with_implementation(variant.implementation).defer_flush()
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
    cache = cache.with_implementation(variant.implementation)
    heads = (config.num_kv_heads, config.head_dim)
    keys = jax.random.split(key, config.num_layers)
    layers = []
    for layer, key in zip(cache.layers, keys, strict=True):
        layers.append(_filled(layer, key, chunks=context // CHUNK, heads=heads))
    return dataclasses.replace(cache, layers=tuple(layers)).defer_flush()


def decode_loop(graphdef, steps: int):
    """(params, token, cache) -> (token, cache) after so many greedy tokens; jitted."""

    def decode(params, token, cache):
        def step(_, carry):
            token, cache = carry
            logits, cache = apply(graphdef, params, token, cache, last_only=True)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None], cache

        return jax.lax.fori_loop(0, steps, step, (token, cache))

    return jax.jit(decode, donate_argnums=2)


class Program:
    """The decoding loop of one variant: `steps` greedy tokens per call.

    Args:
      model: as `random_params` returns it.
      calls: that there will be of a program, beside the first.
      left_out: see `left_to_xla`.
    """

    def __init__(
        self, setting: Setting, variant: Variant, model, batch: int, steps: int, calls,
        left_out: Collection[str] = (),
    ):  # fmt: skip
        self.setting, self.variant, self.batch, self.steps = setting, variant, batch, steps
        graphdef, self._params = model
        self.max_len = setting.context + steps * (calls + 1)
        self._calls, self._program = calls, None

        shapes = abstract_cache(setting.config, variant, batch, self.max_len)
        self.cache_bytes = shapes.nbytes
        token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        with left_to_xla(left_out):
            self._lowered = decode_loop(graphdef, steps).lower(self._params, token, shapes)
        if variant.implementation == KERNEL and KERNEL not in self._lowered.as_text():
            raise RuntimeError("expected the kernel in the program, which has none")

    def compile(self) -> "Program":
        self._program, self._lowered = self._lowered.compile(), None
        return self

    @property
    def temporary_bytes(self) -> int:
        return self._program.memory_analysis().temp_size_in_bytes

    @property
    def peak_bytes(self) -> int:
        """Of the device while it runs: weights, cache and temporaries, as compiled. (What an
        allocator counts is the most that any program of the process took so far.)"""
        found = self._program.memory_analysis()
        once = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return once + found.temp_size_in_bytes

    def record(self) -> dict:
        """Fills a cache and decodes; each repeat goes on where the last one stopped."""
        cache = filled_cache(
            self.setting.config, self.variant, self.batch, self.setting.context, self.max_len
        )
        token, times = jnp.zeros((self.batch, 1), jnp.int32), []
        for _ in range(self._calls + 1):  # the first run is slower
            began = time.perf_counter()
            token, cache = jax.block_until_ready(self._program(self._params, token, cache))
            times.append((time.perf_counter() - began) / self.steps)
        return timing.summary(times[1:]) | dict(
            tokens_per_second=self.batch / float(np.median(times[1:])),
            cache_bytes=self.cache_bytes, temporary_bytes=self.temporary_bytes,
            peak_bytes=self.peak_bytes,
        )  # fmt: skip


def seconds_without_cache(model, batch: int, length: int, repeats: int) -> list[float]:
    """Of one token of each sequence, for which the whole text is read again."""
    graphdef, params = model
    run = jax.jit(lambda params, text: apply(graphdef, params, text, last_only=True)[0])
    text = jnp.asarray(np.random.default_rng(0).integers(0, 32, (batch, length)), jnp.int32)
    run(params, text).block_until_ready()
    return [timing.seconds(lambda: run(params, text)) for _ in range(repeats)]


class Measurements:
    """What is measured of the models, one of which is in memory at a time.

    Args:
      steps: tokens per call.
      repeats: calls that are timed.
      memory: bytes that the process may take on the device.
      left_out: see `left_to_xla`.
    """

    def __init__(self, *, steps: int, repeats: int, memory: int, left_out: Collection[str]):
        self._steps, self._repeats, self._memory = steps, repeats, memory
        self._left_out = left_out
        self._name, self._model = None, None
        self._temporary: dict[tuple, float] = {}  # bytes per sequence

    def _model_of(self, setting: Setting):
        if self._name != setting.name:
            self._model = None
            self._name, self._model = setting.name, random_params(setting.config)
        return self._model

    def _programs(self, setting: Setting, batches: dict[Variant, int]) -> dict[Variant, Any]:
        """Compiled programs, or exceptions."""
        model, lowered = self._model_of(setting), {}
        for variant, batch in batches.items():
            try:
                program = Program(
                    setting, variant, model, batch, self._steps, self._repeats, self._left_out
                )
                lowered[variant] = program.compile
            except Exception as error:
                lowered[variant] = functools.partial(_raise, error)
        made = timing.side_by_side(lowered)
        for variant, program in made.items():
            if isinstance(program, Program):
                key = setting.name, variant
                self._temporary[key] = program.temporary_bytes / batches[variant]
        return made

    def equal_batch(self, setting: Setting, note, fatal) -> list[dict]:
        batches = {v: setting.batch for v in variants() if not fatal.get(str(v)) and not why_not(v)}
        programs = self._programs(setting, batches)
        base = functools.partial(fields, setting, measure="equal batch")
        return [
            base(variant) | self._run(variant, programs.pop(variant, None), note, fatal)
            for variant in variants()
        ]

    def largest_batch(self, setting: Setting, note, fatal) -> list[dict]:
        """By the bytes of weights, cache and temporaries; fewer where that does not fit after all.

        Of the two best: bfloat16 by cuDNN, and the kernel.
        """
        base = functools.partial(fields, setting, measure="largest batch")
        chosen = [v for v in variants()[:2] if not fatal.get(str(v)) and not why_not(v)]
        unknown = {v: setting.batch for v in chosen if (setting.name, v) not in self._temporary}
        small = self._programs(setting, unknown)
        known = [v for v in chosen if (setting.name, v) in self._temporary]
        batches = {v: self._fitting(setting, v) for v in known}
        programs, records = small | self._programs(setting, batches), []
        for variant in variants()[:2]:
            found = self._run(variant, programs.pop(variant, None), note, fatal)
            for _ in range(3):
                if "RESOURCE_EXHAUSTED" not in found.get("skipped", ""):
                    break
                batches[variant] = batches[variant] * 9 // 10
                again = self._programs(setting, {variant: batches[variant]})
                found = self._run(variant, again.pop(variant), note, fatal)
            records.append(base(variant) | dict(batch=batches.get(variant)) | found)
        return records

    def _fitting(self, setting: Setting, variant: Variant) -> int:
        params = 2 * families.num_params(setting.config)
        temporary = self._temporary[setting.name, variant]
        max_len = setting.context + self._steps * (self._repeats + 1)
        budget = ROOM * self._memory - params

        def needed(batch: int) -> int:
            cache = abstract_cache(setting.config, variant, batch, max_len).nbytes
            return cache + math.ceil(batch * temporary)

        return largest(lambda batch: needed(batch) <= budget, guess=int(budget / needed(1)))

    def no_cache(self, setting: Setting, note, fatal) -> list[dict]:
        """Against reading the whole text again for every token, as the paper's 9.3x is."""
        small = dataclasses.replace(setting, batch=setting.small[0], context=setting.small[1])
        base = functools.partial(fields, small, measure="no cache")
        chosen = [v for v in variants()[:2] if not fatal.get(str(v)) and not why_not(v)]
        programs = self._programs(small, dict.fromkeys(chosen, small.batch))
        note(NO_CACHE)
        times = seconds_without_cache(self._model, *setting.small, self._repeats)
        nothing = Variant(implementation=NO_CACHE, scheme="none")
        found = [base(nothing) | timing.summary(times) | dict(
            tokens_per_second=small.batch / float(np.median(times)), cache_bytes=0
        )]  # fmt: skip
        for variant in variants()[:2]:
            row = base(variant) | self._run(variant, programs.pop(variant, None), note, fatal)
            if row["median_us"]:
                row["speedup_over_no_cache"] = found[0]["median_us"] / row["median_us"]
            found.append(row)
        return found

    def _run(self, variant: Variant, program, note, fatal) -> dict:
        """The rest of a record."""
        if reason := why_not(variant):
            return dict(skipped=reason)
        if reason := fatal.get(str(variant)):
            return dict(failure=reason)
        note(str(variant))
        try:
            if isinstance(program, Exception):
                raise program
            return program.record()
        except Exception as error:
            timing.examine(error)
            reason = reason_of(error)
            return {"skipped" if "RESOURCE_EXHAUSTED" in reason else "failure": reason}


def _raise(error: Exception):
    raise error


def fields(setting: Setting, variant: Variant, measure: str) -> dict:
    """What a record says whatever comes of it."""
    config = setting.config
    return dict(
        part="end-to-end", spec=f"{setting.name}/{measure}", measure=measure,
        implementation=variant.implementation, codebook=variant.scheme or "bf16",
        bits=variant.bits, batch=setting.batch, context=setting.context,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        median_us=None, spread=None, n=0,
    )  # fmt: skip


def why_not(variant: Variant) -> str | None:
    if variant.implementation == KERNEL and jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU; this is {jax.default_backend()}"
    return None


def units(
    chosen: Sequence[Setting], *, steps: int, repeats: int, memory: int,
    left_out: Collection[str] = (),
) -> list[Unit]:  # fmt: skip
    """Of each model: every variant in a batch of one size, the largest batches, and no cache."""
    found, measurements = (
        [],
        Measurements(steps=steps, repeats=repeats, memory=memory, left_out=left_out),
    )
    for setting in chosen:
        for measure in ("equal batch", "largest batch", "no cache"):
            method = getattr(measurements, measure.replace(" ", "_"))
            run = functools.partial(method, setting)
            failed = lambda reason, setting=setting, measure=measure: [
                fields(setting, variant, measure) | dict(failure=reason) for variant in variants()
            ]
            found.append(Unit(f"end-to-end/{setting.name}/{measure}", run, failed))
    return found
