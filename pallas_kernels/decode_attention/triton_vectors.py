"""Decode attention on GPUs over codes of eight channels and a table of 256 entries, by Triton.

An entry of eight float16 channels is one load of 16 bytes, from a table of 4 KB that stays in the
first-level cache: what Mosaic GPU has no operation for. One program serves one KV head of one
sequence and one of several splits of its tokens; the splits are merged in XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import as_float32
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_machine import SHARED_MEMORY, machine
from nqkv_jax.pallas_kernels.decode_attention.splits import number_of_splits
from nqkv_jax.pallas_kernels.decode_attention.vectors import CHANNELS, VectorCodes
from nqkv_jax.pallas_kernels.triton_backend import capped, missing, pltriton

COLUMNS = 16  # of a tensor core's operand, at least: queries are padded to them
PROGRAMS = 2 * 132  # that an H100 can run at a time: 2 on each multiprocessor
STAGED = 116  # KiB of shared memory, at most, if what is next is on its way while one is read
UNIT = 4  # tiles, of which splits have whole numbers, as far as they go
# Unseen scores, and the first maximum: exp(UNSEEN - FLOOR) is 0, and nothing is infinite.
UNSEEN, FLOOR = -1e30, -1e29


def unsupported(key: VectorCodes, value: VectorCodes, group: int) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if reason := missing():
        return reason
    if key.head_dim not in (64, 128, 256):
        return f"head_dim 64, 128 or 256; got {key.head_dim}"
    if key.mean is not None and not key.apart:
        return "means of keys as channels of their own"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    head_dim: int
    queries: int
    num_tiles: int
    splits: int
    key: VectorCodes  # without arrays
    value: VectorCodes
    soft_cap: float | None

    @property
    def columns(self) -> int:
        return max(COLUMNS, pl.next_power_of_2(self.queries))


def decode_attention(
    q: jax.Array,
    key: VectorCodes,
    value: VectorCodes,
    lengths: jax.Array,
    first: jax.Array,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`; products are in float16."""
    batch, heads, queries, _ = q.shape
    num_tiles, head_dim = min(key.num_tiles, value.num_tiles), key.head_dim
    units = -(-num_tiles // UNIT)
    shapes = lambda side: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), side)
    plan = _Plan(
        head_dim=head_dim,
        queries=queries,
        num_tiles=num_tiles,
        splits=number_of_splits(batch * heads, units, PROGRAMS),
        key=shapes(key),
        value=shapes(value),
        soft_cap=soft_cap,
    )
    codes, means = q[..., :head_dim], q[..., head_dim:]
    pad = ((0, 0), (0, 0), (0, plan.columns - queries), (0, 0))
    operands = [lengths, first, jnp.pad(codes, pad).astype(jnp.float16)]
    for side in (key, value):
        operands += [side.table.astype(jnp.float16), side.words, as_float32(side.scale)]
    if key.apart:
        operands.append(key.shift(means))
    if value.mean is not None:
        operands += [as_float32(value.weight), value.mean.swapaxes(2, 3)]
    roomy = SHARED_MEMORY.get(machine().capability, 0) >= STAGED
    outer = (batch, heads, plan.splits)
    shape = lambda *s: jax.ShapeDtypeStruct((*outer, *s), jnp.float32)
    whole = pl.BlockSpec()
    numerator, denominator, maximum = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(plan.splits, heads, batch),
        in_specs=[whole] * len(operands),
        out_specs=[whole] * 3,
        out_shape=[shape(plan.columns, head_dim), shape(plan.columns), shape(plan.columns)],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2 if roomy else 1),
        interpret=interpret,
        name="decode_attention_vectors",
    )(*operands)
    top = jnp.max(maximum, axis=2, keepdims=True)
    weight = jnp.exp(maximum - top)
    denominator = jnp.sum(weight * denominator, axis=2)[..., :queries]
    numerator = jnp.sum(weight[..., None] * numerator, axis=2)[:, :, :queries]
    return numerator, denominator, jnp.where(denominator == 0, -jnp.inf, top[:, :, 0, :queries])


def _kernel(lengths, first, q_ref, *refs, plan: _Plan):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    key_table, key_words, key_scale, value_table, value_words, value_scale = take(6)
    (shift,) = take(1) if plan.key.apart else (None,)
    weight, mean = take(2) if plan.value.mean is not None else (None, None)
    numerator_ref, denominator_ref, maximum_ref = refs
    split, h, b = (pl.program_id(axis) for axis in range(3))
    length, oldest = lengths[b], first[b]
    div = lambda a, n: jax.lax.div(a, jnp.int32(n))
    begin = div(oldest, tiles.TOKENS)
    steps = jnp.maximum(div(length + (tiles.TOKENS - 1), tiles.TOKENS) - begin, 0)
    each = div(steps + (plan.splits - 1), plan.splits)
    begin, end = begin + split * each, begin + jnp.minimum(steps, (split + 1) * each)
    square = (tiles.TOKENS, plan.columns)
    iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    by_token = lambda x: jnp.broadcast_to(x[:, None], square)
    by_query = lambda x: jnp.broadcast_to(x[None, :], square)
    # Without slices of registers, halves of the channels are accumulated apart.
    parts = lambda side: range(0, plan.head_dim, plan.head_dim * side.bits // 2)
    query = iota(square, 1)

    def step(tile, carry):
        *sums, denominator, maximum = carry
        s = jnp.zeros(square, jnp.float32)
        words = key_words[b, tile, h]
        for start in parts(plan.key):
            x = _entries(key_table, words, start > 0, plan.key.bits)
            part = q_ref[b, h, :, pl.ds(start, x.shape[1])]
            s = s + pltriton.dot(x, part, trans_b=True)
        s = s * by_token(key_scale[b, tile, h])
        if shift is not None:
            # Rows beyond the queries repeat the last one; nobody reads what comes of them.
            place = jnp.minimum(query, plan.queries - 1)
            s = s + shift[b, tile, h, place, iota(square, 0)]
        s = capped(s, plan.soft_cap)
        token = tile * tiles.TOKENS + iota(square, 0)
        seen = (token < length) & (token >= oldest)
        s = jnp.where(seen, s, jnp.float32(UNSEEN))
        top = jnp.maximum(maximum, jnp.max(s, axis=0))
        old, p = jnp.exp(maximum - top), jnp.exp(s - by_query(top))
        # What is stored for unseen tokens may be NaN. (A weight that is NaN is not 0.)
        scaled = jnp.where(p == 0, jnp.float32(0), p * by_token(value_scale[b, tile, h]))
        if mean is not None:
            shared = jnp.where(p == 0, jnp.float32(0), p * by_token(weight[b, tile, h]))
        words = value_words[b, tile, h]
        for n, start in enumerate(parts(plan.value)):
            x = _entries(value_table, words, start > 0, plan.value.bits)
            sums[n] = sums[n] * jnp.broadcast_to(old[:, None], sums[n].shape)
            sums[n] = sums[n] + pltriton.dot(scaled.astype(jnp.float16), x, trans_a=True)
            if mean is None:
                continue
            windows = plan.value.mean.shape[2]
            places = tiles.TOKENS // windows
            for w in range(windows):
                at = iota(square, 0)
                own = (at >= w * places) & (at < (w + 1) * places)
                total = jnp.sum(jnp.where(own, shared, jnp.float32(0)), axis=0)[:, None]
                row = mean[b, tile, h, w, pl.ds(start, x.shape[1])].astype(jnp.float32)[None, :]
                size = sums[n].shape
                row, total = jnp.broadcast_to(row, size), jnp.broadcast_to(total, size)
                # The mean of a window in which nothing is seen may be NaN.
                sums[n] = sums[n] + jnp.where(total == 0, jnp.float32(0), total * row)
        return *sums, denominator * old + jnp.sum(p, axis=0), top

    width = plan.head_dim * plan.value.bits // 2
    zeros = [jnp.zeros((plan.columns, width), jnp.float32) for _ in parts(plan.value)]
    nothing = jnp.zeros(plan.columns, jnp.float32)
    *sums, denominator, maximum = jax.lax.fori_loop(
        begin, end, step, (*zeros, nothing, nothing + jnp.float32(FLOOR))
    )
    for start, x in zip(parts(plan.value), sums, strict=True):
        numerator_ref[b, h, split, :, pl.ds(start, width)] = x
    denominator_ref[b, h, split] = denominator
    maximum_ref[b, h, split] = maximum


def _entries(table, words: jax.Array, upper: bool, bits: int) -> jax.Array:
    """float16[128, channels] of words int16[rows, 128]: with 1 bit, of one byte of each."""
    words = words.astype(jnp.int32).T
    codes = (words >> jnp.int32(8 * upper)) & jnp.int32(255)
    shape = (*codes.shape, CHANNELS)
    spread = lambda a: jnp.broadcast_to(a[:, :, None], shape)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    x = table[spread(codes), channel]
    if bits == 2:
        positive = (spread(words) >> (jnp.int32(8) + channel)) & jnp.int32(1)
        x = jnp.where(positive != 0, x, -x)
    return x.reshape(shape[0], shape[1] * CHANNELS)
