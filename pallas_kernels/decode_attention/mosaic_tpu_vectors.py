"""Decode attention on TPU over codes of eight channels and a table of 256 entries.

Tokens lie along the 128 lanes of a register, and the eight channels of a code along its sublanes:
the entries that 128 tokens select are two gathers along lanes, one from each half of the table.
With products in bfloat16 an element of the gather holds two channels, and two codes share one.

For keys of 1 bit and few queries, products of queries with the table's entries are made once, and a
score is a sum of those that the codes select (asymmetric distance computation, Jegou et al. 2011):
two gathers per query and eight codes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_common import (
    FLOOR,
    UNSEEN,
    in_steps,
    load_float32,
    mix,
    product,
)
from nqkv_jax.pallas_kernels.decode_attention.vectors import (
    CHANNELS,
    ENTRIES,
    VectorCodes,
)

TILES_PER_STEP = 8


def unsupported(key: VectorCodes, value: VectorCodes, group: int) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if key.head_dim % 32:
        return f"head_dim to be a multiple of 32; got {key.head_dim}"
    if key.mean is not None and not key.apart:
        return "means of keys as channels of their own"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    head_dim: int
    queries: int  # per KV head
    step: int  # tiles
    key: VectorCodes  # without arrays
    value: VectorCodes
    dtype: jnp.dtype  # of products
    soft_cap: float | None

    @property
    def group(self) -> int:
        """Queries, padded to whole registers."""
        return -(-self.queries // 8) * 8

    @property
    def looks_up(self) -> bool:
        """Whether scores are looked up: not from as many queries on as decoding has gathers."""
        return self.key.bits == 1 and self.queries < (4 if self.dtype == jnp.bfloat16 else 8)


def decode_attention(
    q: jax.Array,
    key: VectorCodes,
    value: VectorCodes,
    lengths: jax.Array,
    first: jax.Array,
    *,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`."""
    batch, heads, queries, _ = q.shape
    head_dim = key.head_dim
    shapes = lambda side: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), side)
    num_tiles = min(key.num_tiles, value.num_tiles)
    plan = _Plan(
        head_dim=head_dim,
        queries=queries,
        step=min(TILES_PER_STEP, num_tiles),
        key=shapes(key),
        value=shapes(value),
        dtype=jnp.dtype(jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32),
        soft_cap=soft_cap,
    )
    operands, specs = [], []

    def add(a, spec):
        operands.append(a), specs.append(spec)

    whole = lambda a: pl.BlockSpec((1, *a.shape[1:]), lambda b, *_: (b,) + (0,) * (a.ndim - 1))
    walked = functools.partial(in_steps, step=plan.step)
    codes, means = q[..., :head_dim], q[..., head_dim:]
    if plan.looks_up:
        products = _products(codes, key.table)
        add(products, whole(products))
    else:
        padded = jnp.pad(codes, ((0, 0), (0, 0), (0, plan.group - queries), (0, 0)))
        add(padded.astype(plan.dtype), whole(padded))
    for side in (key, value):
        add(
            _halves(side.table, plan.dtype),
            pl.BlockSpec((2, CHANNELS, tiles.LANES), lambda *_: (0, 0, 0)),
        )
        add(side.words, walked(side.words)), add(side.scale, walked(side.scale))
    if key.apart:
        shift = key.shift(means)
        add(shift, walked(shift))
    if value.mean is not None:
        mean = value.mean.swapaxes(2, 3)  # [B, tiles, Hkv, windows, D]
        add(value.weight, walked(value.weight)), add(mean, walked(mean))
    sums = [(heads, plan.group, head_dim), *[(heads, plan.group, tiles.LANES)] * 2]
    per_token = [(plan.step, heads, tiles.LANES)] * (2 + (value.mean is not None))
    outputs = [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in sums]
    numerator, denominator, maximum = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, -(-num_tiles // plan.step)),
            in_specs=specs,
            out_specs=[whole(o) for o in outputs],
            scratch_shapes=[
                *(pltpu.VMEM(shape, jnp.float32) for shape in (*sums, *per_token)),
                pltpu.VMEM((plan.step, head_dim // CHANNELS, tiles.LANES), jnp.int32),
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
    )(lengths, first, *operands)
    denominator, maximum = denominator[:, :, :queries, 0], maximum[:, :, :queries, 0]
    return numerator[:, :, :queries], denominator, jnp.where(denominator == 0, -jnp.inf, maximum)


def _halves(table: jax.Array, dtype) -> jax.Array:
    """[2, 8, 128] of 32 bits: table.T, or its rows in pairs of bfloat16 numbers, twice."""
    table = table.T
    if dtype == jnp.bfloat16:
        pairs = jnp.swapaxes(table.reshape(CHANNELS // 2, 2, ENTRIES), 1, 2)
        pairs = jax.lax.bitcast_convert_type(pairs.astype(jnp.bfloat16), jnp.int32)
        table = jnp.concatenate([pairs, pairs], axis=0)
    return jnp.stack(jnp.split(table, 2, axis=1))


def _products(q: jax.Array, table: jax.Array) -> jax.Array:
    """f32[B, Hkv, G, 2, D / 8, 128]: of the parts of the queries with the halves of the table."""
    parts = q.reshape(*q.shape[:3], -1, CHANNELS).astype(jnp.float32)
    table = table.reshape(2, tiles.LANES, CHANNELS)
    return jnp.einsum("bhgri,cei->bhgcre", parts, table, precision="highest")


def _kernel(lengths, first, q_ref, *refs, plan: _Plan):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    key_table, key_words, key_scale, value_table, value_words, value_scale = take(6)
    (shift,) = take(1) if plan.key.apart else (None,)
    weight, mean = take(2) if plan.value.mean is not None else (None, None)
    outputs, (acc, denominator, maximum), (*per_token, placed) = take(3), take(3), refs
    b, i = pl.program_id(0), pl.program_id(1)
    begin = i * (plan.step * tiles.TOKENS)
    low, high = first[b] - begin, lengths[b] - begin  # tokens of this step that are seen

    @pl.when(i == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        denominator[...] = jnp.zeros_like(denominator)
        maximum[...] = jnp.full_like(maximum, FLOOR)

    @pl.when((high > 0) & (low < plan.step * tiles.TOKENS))
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, (plan.group, tiles.LANES), 1)
        seen = [
            (lane >= low - n * tiles.TOKENS) & (lane < high - n * tiles.TOKENS)
            for n in range(plan.step)
        ]

        # As float32, of which rows can be read at any place; what is not seen may be NaN.
        for source, target in zip((key_scale, value_scale, weight), per_token, strict=False):
            for n in range(plan.step):
                rows = jnp.broadcast_to(seen[n][:1], target.shape[1:])
                target[n] = jnp.where(rows, load_float32(source[0, n]), jnp.float32(0))
        key_scales, value_scales, *weights = per_token

        def head(h, carry):
            scores = []
            for n in range(plan.step):
                words = _in_rows(key_words[0, n, h], plan.key)
                if plan.looks_up:
                    s = _look_up(q_ref.at[0, h], words, plan)
                else:
                    placed[n] = words
                    x = _entries(key_table, placed.at[n], plan, plan.key)
                    s = product(q_ref[0, h], x, 0)
                s = s * key_scales[n, pl.ds(h, 1)]
                if shift is not None:
                    s = s + _padded(shift[0, n, h], plan)
                if plan.soft_cap is not None:
                    s = jnp.float32(plan.soft_cap) * jnp.tanh(s * jnp.float32(1 / plan.soft_cap))
                scores.append(jnp.where(seen[n], s, jnp.float32(UNSEEN)))
            top = functools.reduce(jnp.maximum, scores)
            top = jnp.maximum(maximum[h], jnp.max(top, axis=-1, keepdims=True))
            old = jnp.exp(maximum[h] - top)
            update, total = jnp.zeros(acc.shape[1:], jnp.float32), jnp.zeros_like(old)
            for n, s in enumerate(scores):
                p = jnp.exp(s - top)
                total = total + p
                scaled = p * value_scales[n, pl.ds(h, 1)]
                placed[n] = _in_rows(value_words[0, n, h], plan.value)
                x = _entries(value_table, placed.at[n], plan, plan.value)
                update = update + mix(scaled, x, 1)
                if mean is not None:
                    scaled = p * weights[0][n, pl.ds(h, 1)]
                    update = update + _means(scaled, mean[0, n, h])
            denominator[h] = denominator[h] * old + jnp.sum(total, axis=-1, keepdims=True)
            maximum[h] = top
            acc[h] = acc[h] * old[:, :1] + update
            return carry

        jax.lax.fori_loop(0, acc.shape[0], head, 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        for output, scratch in zip(outputs, (acc, denominator, maximum), strict=True):
            output[0] = scratch[...]


def _in_rows(words: jax.Array, side: VectorCodes) -> jax.Array:
    """i32[head_dim / 8, 128]: codes in the lowest 8 bits. From bit 8 on: which even channels are
    negative, and from bit 24 on which odd ones."""
    words = words.astype(jnp.int32)
    code = words & jnp.int32(255)
    if side.bits == 1:
        return jnp.concatenate([code, (words >> jnp.int32(8)) & jnp.int32(255)], axis=0)
    negative = ~words
    for i in range(CHANNELS):
        bit = (negative >> jnp.int32(8 + i)) & jnp.int32(1)
        code = code | (bit << jnp.int32(8 + i // 2 + 16 * (i % 2)))
    return code


def _select(low: jax.Array, high: jax.Array, codes: jax.Array) -> jax.Array:
    """Entries of rows of 256, low and high [rows, 128], by the lowest 8 bits of i32[rows, 128]."""
    place = codes & jnp.int32(tiles.LANES - 1)
    low, high = (jnp.take_along_axis(half, place, axis=1) for half in (low, high))
    return jnp.where((codes & jnp.int32(tiles.LANES)) != 0, high, low)


def _entries(table, rows, plan: _Plan, side: VectorCodes) -> jax.Array:
    """dtype[head_dim, 128 tokens] of `_in_rows`, in memory, where a row is repeated for nothing.

    A gather fetches 32 bits: one number, or two in bfloat16, and then of two codes at a time.
    """
    low, high = table[0], table[1]
    sublane = jax.lax.broadcasted_iota(jnp.int32, (CHANNELS, tiles.LANES), 0)
    row = lambda r: jnp.broadcast_to(rows[r : r + 1], sublane.shape)
    paired = plan.dtype == jnp.bfloat16
    parts = []
    for r in range(0, rows.shape[0], 1 + paired):
        if paired:
            codes = jnp.where(sublane < CHANNELS // 2, row(r), row(r + 1))
            signs = codes << (jnp.int32(7) - (sublane & jnp.int32(3)))
            mask = jnp.int32(-(2**31) + 2**15)
        else:
            codes = row(r)
            even = (sublane & jnp.int32(1)) == 0
            signs = codes << (
                jnp.where(even, jnp.int32(23), jnp.int32(7)) - (sublane >> jnp.int32(1))
            )
            mask = jnp.int32(-(2**31))
        x = _select(low, high, codes)
        if side.bits == 2:
            x = pltpu.bitcast(x, jnp.int32) ^ (signs & mask)
        parts.append(pltpu.bitcast(x, plan.dtype))
    return jnp.concatenate(parts, axis=0)


def _look_up(products, codes: jax.Array, plan: _Plan) -> jax.Array:
    """f32[group, 128]: scores from the products of the queries with the table."""
    rows = [
        jnp.sum(_select(products[g, 0], products[g, 1], codes), axis=0, keepdims=True)
        for g in range(plan.queries)
    ]
    return _padded(jnp.concatenate(rows, axis=0), plan)


def _padded(x: jax.Array, plan: _Plan) -> jax.Array:
    """[queries, lanes] with rows of zeros up to whole registers."""
    if plan.group == plan.queries:
        return x
    zeros = jnp.zeros((plan.group - plan.queries, x.shape[1]), x.dtype)
    return jnp.concatenate([x, zeros], axis=0)


def _means(weights: jax.Array, mean: jax.Array) -> jax.Array:
    """sum over tokens of weights [group, 128] * the mean [windows, D] of their window."""
    windows, places = mean.shape[0], tiles.TOKENS // mean.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    out = jnp.zeros((weights.shape[0], mean.shape[1]), jnp.float32)
    for w in range(windows):
        own = (lane >= w * places) & (lane < (w + 1) * places)
        total = jnp.sum(jnp.where(own, weights, 0.0), axis=-1, keepdims=True)
        row = mean[w : w + 1].astype(jnp.float32)
        # The mean of a window in which nothing is seen may be NaN.
        out = out + jnp.where(total == 0, 0.0, total * row)
    return out
