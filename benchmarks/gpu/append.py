"""Appending a token to one layer: encoded by the kernel or by XLA, against writing bfloat16.

First the kernel's bits are compared with XLA's, case by case, on this device.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpu import ROOT, timing
from gpu.end_to_end import PUBLISHED, Setting
from gpu.journal import Unit, reason_of
from nqkv_jax import schemes

sys.path.insert(0, str(ROOT / "tests"))
import append_token_cases as cases

from nqkv_jax.pallas_kernels.append_token import append_token

BY_KERNEL = "triton"
# (implementation, scheme); the first is no append, but what all of them wait for.
ROWS = (("nothing", "none"), ("xla", "none"), ("xla", PUBLISHED), (BY_KERNEL, PUBLISHED))


def why_not(implementation: str) -> str | None:
    if implementation == BY_KERNEL and jax.default_backend() != "gpu":
        return f"needs a GPU; this is {jax.default_backend()}"
    return None


def checks(names: Sequence[str] = tuple(cases.CASES)) -> list[Unit]:
    """Of every case: is each byte the one that XLA writes?"""

    def unit(case) -> Unit:
        base = dict(
            part="check", spec=f"append-{case.name}", implementation=BY_KERNEL,
            bits=case.quantizer.codebook.bits, num_kv_heads=case.heads, batch=len(cases.TOKEN),
        )  # fmt: skip

        def run(note, fatal) -> list[dict]:
            if reason := why_not(BY_KERNEL):
                return [base | dict(passed=None, skipped=reason)]
            before, x = cases.body(case), cases.tokens(case)
            after = jax.tree.leaves(appended(case, before, x))
            expected = jax.tree.leaves(cases.expected(case, before, x))
            as_bytes = lambda a: np.asarray(a).view(np.uint8)
            wrong = sum(
                int((as_bytes(a) != as_bytes(b)).sum())
                for a, b in zip(after, expected, strict=True)
            )
            return [base | dict(passed=not wrong, wrong_bytes=wrong)]

        failed = lambda reason: [base | dict(passed=False, failure=reason)]
        return Unit(f"check/append-{case.name}", run, failed)

    return [unit(cases.CASES[name]) for name in names]


def appended(case, before, x):
    """The bodies of all sequences after the kernel."""

    def one(before, x, token, keep):
        arrays = before.words, before.scale, before.zero
        return append_token(*arrays, x, token, keep, **case.options)

    token, keep = jnp.asarray(cases.TOKEN, jnp.int32), jnp.asarray(cases.KEEP)
    return jax.jit(jax.vmap(one))(before, x, token, keep)


def new_layer(setting: Setting, implementation: str, scheme: str, batch: int, steps: int):
    """An empty one, with room for `steps` tokens at least; and a token, key and value."""
    config = setting.config
    sizes = dict(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    cache = schemes.get(scheme).init(
        num_layers=1, batch=batch, max_len=max(setting.context, steps), dtype=jnp.bfloat16, **sizes
    )
    if implementation == BY_KERNEL:
        cache = cache.with_implementation(BY_KERNEL)
    new = jax.random.normal(jax.random.key(0), (2, batch, 1, *sizes.values()), jnp.bfloat16)
    return cache.layers[0], tuple(new)


def loop(implementation: str, steps: int):
    """(layer, token) -> (layer, token) after `steps` tokens, each another one; jitted."""

    def step(_, carry):
        layer, new = carry
        # In a decoder something comes before, too, with which encoding cannot be one launch. Two
        # factors, so that keys and values are not the same.
        factors = jnp.bfloat16(1.0078125), jnp.bfloat16(0.9921875)
        new = jax.lax.optimization_barrier(tuple(a * f for a, f in zip(new, factors, strict=True)))
        if implementation != "nothing":
            layer = layer.append(*new, jnp.ones_like(layer.lengths), None)
        return layer, new

    many = lambda layer, new: jax.lax.fori_loop(0, steps, step, (layer, new))
    return jax.jit(many, donate_argnums=0)


def measure(setting: Setting, batch: int, steps: int, repeats: int, note, fatal) -> list[dict]:
    if "timing" in fatal:
        return [fields(setting, batch, *row) | dict(failure=fatal["timing"]) for row in ROWS]
    runs, records, programs = {}, [], {}
    for implementation, scheme in ROWS:
        name, record = f"{implementation} {scheme}", fields(setting, batch, implementation, scheme)
        records.append(record)
        reason = fatal.get(name)
        if reason or (skipped := why_not(implementation)):
            record |= dict(failure=reason) if reason else dict(skipped=skipped)
            continue
        note(name)
        try:
            layer, new = new_layer(setting, implementation, scheme, batch, steps)
            compiled = loop(implementation, steps).lower(layer, new).compile()
            programs[name] = [compiled, layer, new]
            runs[name] = functools.partial(_seconds, programs[name], steps)
            runs[name]()  # the first run is slower
        except Exception as error:
            timing.examine(error)
            runs.pop(name, None)
            record |= dict(failure=reason_of(error))
    note("timing")
    times = timing.in_turn(runs, repeats)
    nothing = times.get("nothing none")
    for record in records:
        name = f"{record['implementation']} {record['codebook']}"
        if name not in times:
            continue
        record |= timing.summary(times[name])
        if nothing is not None:
            record["own_us"] = record["median_us"] - 1e6 * float(np.median(nothing))
    return records


def _seconds(program: list, steps: int) -> float:
    """Of one token. The layer is given away, and the one that comes back is the next one's."""
    run, layer, new = program
    empty = jnp.zeros_like(layer.lengths)
    layer = dataclasses.replace(layer, lengths=empty, overflow=jnp.zeros_like(empty))
    jax.block_until_ready(layer)
    began = time.perf_counter()
    program[1], _ = jax.block_until_ready(run(layer, new))
    return (time.perf_counter() - began) / steps


def fields(setting: Setting, batch: int, implementation: str, scheme: str) -> dict:
    """What a record says whatever comes of it."""
    config = setting.config
    return dict(
        part="append", spec=f"{setting.name}/b{batch}", implementation=implementation,
        codebook=scheme, bits=4 if scheme == PUBLISHED else 16, batch=batch,
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        context=setting.context, median_us=None, spread=None, n=0, own_us=None,
    )  # fmt: skip


def units(chosen: Sequence[Setting], *, steps: int, repeats: int) -> list[Unit]:
    """Each model's layers, for one sequence and for the batch in which it is measured."""

    def unit(setting: Setting, batch: int) -> Unit:
        failed = lambda reason: [
            fields(setting, batch, *row) | dict(failure=reason) for row in ROWS
        ]
        run = functools.partial(measure, setting, batch, steps, repeats)
        return Unit(f"append/{setting.name}/b{batch}", run, failed)

    return [unit(setting, batch) for setting in chosen for batch in (1, setting.batch)]
