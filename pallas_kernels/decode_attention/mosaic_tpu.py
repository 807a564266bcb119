"""Decode attention on TPU: codes become levels in registers, on their way into the MXU.

A grid step walks some tiles of every head of one sequence, with running maxima and sums in VMEM
(online softmax). Steps past the end of a sequence, or before its window, ask for a block that is
there already, so nothing is fetched for them.

A *unit* is 128 rows of 128 lanes: one tile for head_dim 128 and above, two for 64, whose rows hold
two tokens each. Queries are laid out so that one matrix product serves all: a row per (place of the
token in its row, block of the head, query), zero in the lanes of other places and blocks. Scales
multiply scores and weights, or if they are of channels the queries, but never elements.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention import mosaic_tpu_waves as waves
from nqkv_jax.pallas_kernels.decode_attention.codes import SHARING, TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_common import (
    FLOOR,
    UNSEEN,
    in_steps,
    load_float32,
    mix,
    product,
)
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_plan import Plan, Side, make_plan


def unsupported(key: TiledCodes, value: TiledCodes, group: int) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if tiles.LANES % key.head_dim and key.head_dim % tiles.LANES:
        return f"head_dim to divide 128 or be a multiple of it; got {key.head_dim}"
    if key.head_dim < 64:
        return f"head_dim of at least 64; got {key.head_dim}"
    if value.per_channel:
        return "values with scales of tokens, not of channels"
    if key.groups > tiles.TOKENS // SHARING:
        return f"groups of at least {SHARING} tokens; got {tiles.TOKENS // key.groups}"
    return None


def decode_attention(
    q: jax.Array,
    key: TiledCodes,
    value: TiledCodes,
    lengths: jax.Array,
    first: jax.Array,
    *,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`."""
    batch, heads, group, _ = q.shape
    plan = make_plan(q, key, value, soft_cap)
    q, meeting_waves = jnp.split(q, [plan.head_dim], axis=-1)
    walked = functools.partial(in_steps, step=plan.step)
    whole = lambda a: pl.BlockSpec((1, *a.shape[1:]), lambda b, *_: (b,) + (0,) * (a.ndim - 1))
    queries = _expand(q, plan)
    codes = [
        a for side in (key, value) for a in (side.words, side.scale, side.zero) if a is not None
    ]
    in_specs = [whole(queries), *map(walked, codes)]
    added = []
    if key.waves is not None:
        added = waves.operands(key.waves, meeting_waves, plan)
        places = pl.BlockSpec(added[2].shape, lambda *_: (0, 0, 0))
        in_specs += [whole(added[0]), walked(added[1], batched=False), places]
    scales = [
        pltpu.VMEM(plan.scratch(side), jnp.float32)
        for side in (plan.key, plan.value)
        for _ in range(side.num_arrays)
    ]
    sums = [
        (heads, plan.rows * plan.value.blocks, plan.lanes),
        (heads, plan.rows, tiles.LANES),
        (heads, plan.rows, tiles.LANES),
    ]
    outputs = [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in sums]
    results = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, -(-min(key.num_tiles, value.num_tiles) // plan.step)),
            in_specs=in_specs,
            out_specs=[whole(o) for o in outputs],
            scratch_shapes=[*(pltpu.VMEM(shape, jnp.float32) for shape in sums), *scales],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
    )(lengths, first, queries, *codes, *added)
    return _collect(*results, plan, group)


def _expand(q: jax.Array, plan: Plan) -> jax.Array:
    """[B, Hkv, fold * blocks * group, lanes] from q [B, Hkv, G, D]."""
    head_dim, fold, blocks = plan.head_dim, plan.fold, plan.key.blocks
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.group - q.shape[2]), (0, 0)))
    levels = plan.key.levels
    q = q.astype(levels.dtype) * jnp.asarray(levels.gain, levels.dtype)
    block = np.arange(head_dim) // (head_dim // blocks) == np.arange(blocks)[:, None]
    own = np.eye(fold, dtype=bool)[:, None, None, :, None] & block[:, None, None, :]
    q = jnp.where(own[None, None], q[:, :, None, None, :, None], jnp.zeros((), q.dtype))
    return q.reshape(*q.shape[:2], fold * blocks * plan.group, plan.lanes)


def _collect(numerator, denominator, maximum, plan: Plan, group: int):
    """The outputs of the kernel, of all places in a row together: as the caller wants them."""
    fold, blocks, head_dim = plan.fold, plan.value.blocks, plan.head_dim
    batch, heads = numerator.shape[:2]
    numerator = numerator.reshape(
        batch, heads, fold, blocks, plan.group, fold, blocks, head_dim // blocks
    )
    numerator = jnp.einsum("bhfjgfjd->bhfgjd", numerator)
    numerator = numerator.reshape(batch, heads, fold, plan.group, head_dim)[..., :group, :]
    rows = lambda a: a[..., 0].reshape(batch, heads, fold, plan.group)[..., :group]
    denominator, maximum = rows(denominator), rows(maximum)
    top = jnp.max(maximum, axis=2, keepdims=True)
    weight = jnp.exp(maximum - top)
    denominator = jnp.sum(weight * denominator, axis=2)
    numerator = jnp.sum(weight[..., None] * numerator, axis=2)
    return numerator, denominator, jnp.where(denominator == 0, -jnp.inf, top[:, :, 0])


def _kernel(lengths, first, q_ref, *refs, plan: Plan):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    key_words, *key_arrays = take(1 + plan.key.num_arrays)
    value_words, *value_arrays = take(1 + plan.value.num_arrays)
    added = take(3 if plan.key.codes.waves else 0)
    outputs, (acc, denominator, maximum) = take(3), take(3)
    key_scales, value_scales = take(plan.key.num_arrays), take(plan.value.num_arrays)

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
        tokens = [plan.token(row) for row in range(plan.fold)]
        for side, arrays, scratch in (
            (plan.key, key_arrays, key_scales),
            (plan.value, value_arrays, value_scales),
        ):
            for n, (source, target) in enumerate(zip(arrays, scratch, strict=True)):
                factor = side.levels.slope if n == 0 else 1.0
                if side.codes.per_channel:
                    _spread_channels(source, target, factor, plan)
                else:
                    _spread(source, target, tokens, factor, low, high, plan)

        rows = jnp.concatenate([jnp.broadcast_to(t, (plan.group, tiles.LANES)) for t in tokens], 0)

        def head(h, carry):
            score = _channel_scores if plan.key.codes.per_channel else _scores
            scores = score(q_ref[0, h], h, key_words, key_scales, plan)
            if added:
                of_waves = waves.scores(added[0][0, h], *added[1:], plan)
                scores = map(jnp.add, scores, of_waves)
            scores = [_capped(s, plan) for s in scores]
            scores = [
                jnp.where((rows >= low - at) & (rows < high - at), s, jnp.float32(UNSEEN))
                for s, at in zip(scores, _starts(plan), strict=True)
            ]
            top = functools.reduce(jnp.maximum, scores)
            top = jnp.maximum(maximum[h], jnp.max(top, axis=-1, keepdims=True))
            old = jnp.exp(maximum[h] - top)
            weights = [jnp.exp(s - top) for s in scores]
            total = jnp.sum(sum(weights), axis=-1, keepdims=True)
            denominator[h] = denominator[h] * old + total
            maximum[h] = top
            update = _mix(weights, h, value_words, value_scales, plan)
            old = _per_block(old, plan.value.blocks, plan)
            acc[h] = acc[h] * _lanes(old, plan) + update
            return carry

        jax.lax.fori_loop(0, key_words.shape[2], head, 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        for output, scratch in zip(outputs, (acc, denominator, maximum), strict=True):
            output[0] = scratch[...]


def _starts(plan: Plan) -> list[int]:
    return [u * plan.fold * tiles.TOKENS for u in range(plan.units)]


def _spread(source, target, tokens, factor: float, low, high, plan: Plan) -> None:
    """Scales, token by token in memory, to the lanes of scores: target[row, unit, block].

    Tokens that are not seen get 0: what is stored for them may be NaN.
    """
    for unit, start in enumerate(_starts(plan)):
        in_tiles = [load_float32(source[0, unit * plan.fold + t]) for t in range(plan.fold)]
        for row, token in enumerate(tokens):
            token = jnp.broadcast_to(token, in_tiles[0].shape)
            spread = in_tiles[0]
            if plan.fold > 1:
                place = token & (tiles.TOKENS - 1)
                spread = _gather_lanes(spread, place)
                for t in range(1, plan.fold):
                    other = _gather_lanes(in_tiles[t], place)
                    spread = jnp.where(
                        (token >= t * tiles.TOKENS) & (token < (t + 1) * tiles.TOKENS),
                        other,
                        spread,
                    )
            seen = (token >= low - start) & (token < high - start)
            target[row, unit] = jnp.where(seen, spread * jnp.float32(factor), jnp.float32(0))


def _spread_channels(source, target, factor: float, plan: Plan) -> None:
    """Scales of channels, to the lanes of queries: target[tile, head]."""
    for tile in range(plan.step):
        scale = load_float32(source[0, tile]) * jnp.float32(factor)
        target[tile] = jnp.concatenate([scale] * plan.fold, axis=1)


def _gather_lanes(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[r, index[r, l]]; one row alone would be another kind of gather, which is not supported."""
    rows = x.shape[0]
    if rows == 1:
        x, index = (jnp.broadcast_to(a, (8, tiles.LANES)) for a in (x, index))
    return jnp.take_along_axis(x, index, axis=1)[:rows]


def _scale_rows(scratch, side: Side, head, unit: int, plan: Plan) -> jax.Array:
    """f32[fold * blocks * group, 128]: the scales of a unit, for each row of a product."""
    block = side.codes.block_of(head)
    rows = [
        jnp.broadcast_to(scratch[row, unit, pl.ds(block + j, 1)], (plan.group, tiles.LANES))
        for row in range(plan.fold)
        for j in range(side.blocks)
    ]
    return jnp.concatenate(rows, axis=0)


def _per_block(x: jax.Array, blocks: int, plan: Plan) -> jax.Array:
    """Rows (place, query) to rows (place, block, query)."""
    if blocks == 1:
        return x
    parts = [x[f * plan.group : (f + 1) * plan.group] for f in range(plan.fold)]
    return jnp.concatenate([part for part in parts for _ in range(blocks)], axis=0)


def _over_blocks(x: jax.Array, blocks: int, plan: Plan) -> jax.Array:
    """The inverse: the sum over the blocks."""
    if blocks == 1:
        return x
    part = lambda n: x[n * plan.group : (n + 1) * plan.group]
    sums = [sum(part(f * blocks + j) for j in range(blocks)) for f in range(plan.fold)]
    return jnp.concatenate(sums, axis=0)


def _lanes(x: jax.Array, plan: Plan) -> jax.Array:
    """[rows, 128], alike in all lanes, as wide as an output."""
    return jnp.concatenate([x] * (plan.lanes // tiles.LANES), axis=1)


def _unit_factors(words, side: Side, head, unit: int, plan: Plan) -> jax.Array:
    parts = [
        side.levels.factors(words[0, unit * plan.fold + t, head], plan.head_dim)
        for t in range(plan.fold)
    ]
    return jnp.concatenate(parts, axis=0)


def _products(left: list[jax.Array], unit: int, head, words, plan: Plan) -> list[jax.Array]:
    """f32[rows, 128] of each `left` [rows, lanes] with a unit of keys, of those from `unit` on."""
    side = plan.key
    right = [_unit_factors(words, side, head, unit + n, plan) for n in range(len(left))]
    if len(left) > 1:
        # Units side by side; queries meet theirs by zeros in the lanes of the others.
        zero = jnp.zeros_like(left[0])
        apart = lambda n: [q if n == m else zero for m, q in enumerate(left)]
        left = [jnp.concatenate(apart(n), axis=1) for n in range(len(left))]
    products = product(jnp.concatenate(left, axis=0), jnp.concatenate(right, axis=1), 1)
    rows = left[0].shape[0]
    parts = [products[n * rows : (n + 1) * rows] for n in range(len(left))]
    return [side.levels.restore(part, plan.fold) for part in parts]


def _paired(rows: int, plan: Plan) -> int:
    """How many units to take at a time: two fill an MXU of 256 rows."""
    return 1 + (plan.lanes == tiles.LANES and rows <= 16 and plan.units % 2 == 0)


def _capped(s: jax.Array, plan: Plan) -> jax.Array:
    if plan.soft_cap is None:
        return s
    return jnp.float32(plan.soft_cap) * jnp.tanh(s * jnp.float32(1 / plan.soft_cap))


def _scores(q, head, words, scales, plan: Plan) -> list[jax.Array]:
    """f32[rows, 128] of each unit."""
    side = plan.key
    total = jnp.sum(q.astype(jnp.float32), axis=-1, keepdims=True)
    total = total * jnp.float32(1 / side.levels.gain)
    constant = total * jnp.float32(side.levels.offset / side.levels.slope)
    out, pair = [], _paired(q.shape[0], plan)
    for unit in range(0, plan.units, pair):
        for n, s in enumerate(_products([q] * pair, unit, head, words, plan)):
            if side.levels.offset:
                s = s + constant
            s = s * _scale_rows(scales[0], side, head, unit + n, plan)
            if len(scales) > 1:
                s = s + total * _scale_rows(scales[1], side, head, unit + n, plan)
            out.append(_over_blocks(s, side.blocks, plan))
    return out


def _channel_scores(q, head, words, scales, plan: Plan) -> list[jax.Array]:
    """As `_scores`, where channels have scales: those of each group of tokens multiply the queries,
    and the products with all tokens of a unit are computed for each."""
    levels, rows, groups = plan.key.levels, q.shape[0], plan.key.codes.groups
    q, coefficients = q.astype(jnp.float32), levels.codebook.coefficients
    offset = levels.offset / levels.slope
    middle = coefficients[0] / levels.slope if coefficients else offset

    def queries(unit):
        """For the groups of a unit: [fold * groups * rows, lanes], and what is constant, 1 lane."""
        left, constant = [], []
        for n in range(unit * plan.fold * groups, (unit + 1) * plan.fold * groups):
            tile, own = n // groups, pl.ds(head * groups + n % groups, 1)
            exact = q * scales[0][tile, own]
            scaled = exact.astype(levels.dtype)
            # The offset, of what was rounded: it is large, and must cancel. But of the middle of
            # the levels, so that what rounding cuts off meets the distance from there only.
            parts = [exact * jnp.float32(middle)] if middle else []
            if offset != middle:
                parts.append(scaled.astype(jnp.float32) * jnp.float32(offset - middle))
            if len(scales) > 1:
                parts.append(q * scales[1][tile, own])
            total = sum(parts) if parts else jnp.zeros_like(exact)
            left.append(scaled), constant.append(jnp.sum(total, axis=-1, keepdims=True))
        return jnp.concatenate(left, axis=0), jnp.concatenate(constant, axis=0)

    out, pair = [], _paired(plan.fold * groups * rows, plan)
    for unit in range(0, plan.units, pair):
        left, constant = zip(*(queries(unit + n) for n in range(pair)), strict=True)
        for s, c in zip(_products(list(left), unit, head, words, plan), constant, strict=True):
            s = s + c
            parts = [s[n * rows : (n + 1) * rows] for n in range(plan.fold * groups)]
            out.append(plan.of_own_group(parts))
    return out


def _mix(weights, head, words, scales, plan: Plan) -> jax.Array:
    """sum over tokens of weights * values, f32[rows * blocks, lanes]."""
    side = plan.value
    out = jnp.zeros((plan.rows * side.blocks, plan.lanes), jnp.float32)
    total = zeros = jnp.zeros((plan.rows * side.blocks, tiles.LANES), jnp.float32)
    pair = 1 + (plan.units % 2 == 0)
    for unit in range(0, plan.units, pair):
        left, right = [], []
        for n in range(unit, unit + pair):
            p = _per_block(weights[n], side.blocks, plan)
            scaled = p * _scale_rows(scales[0], side, head, n, plan)
            scaled = side.levels.permute(scaled, plan.fold)
            if side.levels.offset:
                total = total + scaled
            if len(scales) > 1:
                zeros = zeros + p * _scale_rows(scales[1], side, head, n, plan)
            left.append(scaled)
            right.append(_unit_factors(words, side, head, n, plan))
        out = out + mix(jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=0), 0)
    constant = total * jnp.float32(side.levels.offset / side.levels.slope) + zeros
    out = out * jnp.float32(side.levels.gain)
    return out + jnp.sum(constant, axis=-1, keepdims=True)
