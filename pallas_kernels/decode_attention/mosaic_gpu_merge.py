"""Attention over all tokens from that over splits of them, in one launch on GPUs.

In XLA it is three launches: the largest maximum, and two sums that wait for it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_memory import store
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import ROWS

AHEAD = 8  # splits that are on their way at a time


def merge(
    numerator: jax.Array, denominator: jax.Array, maximum: jax.Array, interpret=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One split from several.

    Args:
      numerator: f32[batch, heads, splits, head_dim, group], relative to exp(maximum).
      denominator, maximum: f32[batch, heads, splits, group].
      interpret: `plgpu.InterpretGPUParams`, for tests.

    Returns: the three without the axis of splits.
    """
    batch, heads, splits, head_dim, group = numerator.shape
    if splits == 1:
        return numerator[:, :, 0], denominator[:, :, 0], maximum[:, :, 0]
    shape = lambda *s: jax.ShapeDtypeStruct((batch, heads, *s), jnp.float32)
    options = {} if interpret is None else dict(interpret=interpret)
    # Each has 64 channels; all, where the last 64 overlap others.
    programs = 1 if head_dim % ROWS else head_dim // ROWS
    return plgpu.kernel(
        functools.partial(_kernel, splits=splits),
        out_type=(shape(head_dim, group), shape(group), shape(group)),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="merge_splits",
        grid=(programs, heads, batch),
        grid_names=("piece", "head", "batch"),
        **options,
    )(numerator, denominator, maximum)


def _kernel(numerator, denominator, maximum, *outputs, splits):
    piece, head, batch = (jax.lax.axis_index(name) for name in ("piece", "head", "batch"))
    head_dim, group = numerator.shape[3:]
    begins = [0, head_dim - ROWS] if head_dim % ROWS else [piece * ROWS]
    square, by_column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)
    load = functools.partial(plgpu.load, optimized=False)
    spread = lambda x: jax.lax.broadcast_in_dim(x, (ROWS, group), (1,))

    def add(begin, count, carry):
        totals, norm, top = carry
        # All of them are asked for before one is used.
        of = lambda a: [a.at[batch, head, begin + n] for n in range(count)]
        tops = [load(a, layout=by_column) for a in of(maximum)]
        norms = [load(a, layout=by_column) for a in of(denominator)]
        parts = [[load(a.at[pl.ds(b, ROWS)], layout=square) for a in of(numerator)] for b in begins]
        new = functools.reduce(jnp.maximum, tops, top)
        old = jnp.exp(top - new)
        weights = [jnp.exp(t - new) for t in tops]
        dot = lambda a, b: [x * y for x, y in zip(a, b, strict=True)]
        norm = functools.reduce(jnp.add, dot(norms, weights), norm * old)
        wide = [spread(w) for w in weights]
        totals = [
            functools.reduce(jnp.add, dot(part, wide), total * spread(old))
            for total, part in zip(totals, parts, strict=True)
        ]
        return totals, norm, new

    zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    first = load(maximum.at[batch, head, 0], layout=by_column)
    carry = [zeros((ROWS, group), square) for _ in begins], zeros((group,), by_column), first
    rounds, rest = divmod(splits, AHEAD)
    carry = jax.lax.fori_loop(0, rounds, lambda i, carry: add(i * AHEAD, AHEAD, carry), carry)
    if rest:
        carry = add(rounds * AHEAD, rest, carry)
    totals, *of_queries = carry
    numerator, *of_head = (a.at[batch, head] for a in outputs)
    for begin, total in zip(begins, totals, strict=True):
        store(numerator.at[pl.ds(begin, ROWS)], total)

    @pl.when(piece == 0)
    def _():
        for target, x in zip(of_head, of_queries, strict=True):
            store(target, x)
