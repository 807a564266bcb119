"""Into how many splits tokens are cut: the number that the kernel takes, against others.

What `pallas_kernels.decode_attention.splits` supposes of the time of a start and of a merge can be
set by this.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpu import sweep, timing
from gpu.check import KERNEL, why_not
from gpu.journal import Unit, reason_of
from gpu.shapes import Format, Shape, coded_caches
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import make_plan

SHAPES = tuple(
    Shape(batch=batch, context=context, num_heads=32, num_kv_heads=8)
    for batch, context in ((1, 2048), (1, 32768), (8, 32768), (32, 8192))
)


def candidates(shape: Shape, form: Format) -> list[int]:
    """Numbers of splits, of which the first is the one that is taken."""
    plan = make_plan(shape.group, *sweep.abstract(shape, form), None, None)
    others = (1, plan.splits // 2, plan.splits - 1, plan.splits + 1, 2 * plan.splits)
    units = -(-plan.num_tiles // plan.tiles)
    return list(dict.fromkeys([plan.splits, *(n for n in others if 1 <= n <= units)]))


def program(shape: Shape, form: Format, splits: int):
    """Of one token's attention, as the sweep has it."""

    def attention(q, key, value, lengths):
        first = jnp.zeros_like(lengths)
        return mosaic_gpu.decode_attention(q, key, value, lengths, first, splits=splits)

    return functools.partial(sweep.attend, form=form, shape=shape, attention=attention)


def measure(shape: Shape, form: Format, repeats: int, note, fatal) -> list[dict]:
    """A record for each number of splits."""
    rows = sweep.rows_of(shape, [form], most_copies=4)
    (row,) = (r for r in rows if r.implementation == KERNEL)
    numbers = candidates(shape, form)
    records = {n: fields(shape, form) | dict(splits=n, taken=n == numbers[0]) for n in numbers}
    reason = why_not(KERNEL, *sweep.abstract(shape, form), shape.group)
    if reason or "timing" in fatal:
        why = dict(skipped=reason) if reason else dict(failure=fatal["timing"])
        return [record | why for record in records.values()]
    q = jax.random.normal(jax.random.key(0), (shape.batch, shape.num_heads, shape.head_dim))
    given = q.astype(jnp.bfloat16), coded_caches(jax.random.key(1), shape, form, row.copies)
    compiled = timing.side_by_side({
        n: lambda n=n: timing.chained(program(shape, form, n), row.steps).lower(*given).compile()
        for n in numbers if str(n) not in fatal
    })  # fmt: skip
    runs = {}
    for n in numbers:
        if str(n) in fatal:
            records[n] |= dict(failure=fatal[str(n)])
            continue
        note(str(n))
        try:
            if isinstance(compiled[n], Exception):
                raise compiled[n]
            run, launches = functools.partial(compiled[n], *given), row.steps * row.copies
            jax.block_until_ready(run())  # the first run is slower
            runs[n] = lambda run=run, launches=launches: timing.seconds(run) / launches
        except Exception as error:
            timing.examine(error)
            records[n] |= dict(failure=reason_of(error))
    note("timing")
    for n, times in timing.in_turn(runs, repeats).items():
        records[n] |= timing.summary(times)
    return list(records.values())


def fields(shape: Shape, form: Format) -> dict:
    """What a record says whatever comes of it."""
    return dict(
        part="splits", spec=shape.name, implementation=KERNEL, codebook=form.name, bits=form.bits,
        batch=shape.batch, num_kv_heads=shape.num_kv_heads, context=shape.context,
        median_us=None, spread=None, n=0,
    )  # fmt: skip


def units(grid: Sequence[Shape], wanted: Sequence[Format], *, repeats: int) -> list[Unit]:
    def unit(shape: Shape, form: Format) -> Unit:
        run = functools.partial(measure, shape, form, repeats)
        failed = lambda reason: [fields(shape, form) | dict(failure=reason)]
        return Unit(f"splits/{shape.name}/{form.name}", run, failed)

    return [unit(shape, form) for shape in grid for form in wanted]
