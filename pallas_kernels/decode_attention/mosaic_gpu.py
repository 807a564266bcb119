"""Decode attention on Hopper GPUs: codes become float16 in registers, the operands of `wgmma`.

One program (a warpgroup) serves one KV head of one sequence and one of several splits of its
tokens, with an online softmax; the splits are merged in XLA. Tokens of keys, and channels of
values, are the 64-row side of the tensor core, and the query heads of a group the other, so that
hardly anything is padded and what was decoded goes from registers into the product.

A *unit* is 64 rows of words: of each field, 64 tokens. Words of keys are loaded as they lie, those
of values transposed (`ldmatrix.trans`). Codes become numbers by an OR into the mantissa of a
float16, two at a time; scales multiply scores and weights, or if they are of channels the queries,
but never elements.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import Levels
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import (
    ROWS,
    SHARED_MEMORY,
    STAGES,
    Plan,
    low_bits,
    make_plan,
)

# Unseen scores, and the first maximum: exp(UNSEEN - FLOOR) is 0, and nothing is infinite.
UNSEEN, FLOOR = -1e30, -1e29


def unsupported(key: TiledCodes, value: TiledCodes, group: int) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"jax 0.11 or later; got {jax.__version__}"
    if capability := _other_capability():
        return f"a Hopper GPU (compute capability 9.0); got {capability}"
    if key.head_dim not in (64, 128, 256):
        # Channels of values are rows of a tensor core's operand, 64 at a time.
        return f"head_dim 64, 128 or 256; got {key.head_dim}"
    bits = key.codebook.bits, value.codebook.bits
    if bits[0] != bits[1]:
        return f"keys and values of as many bits; got {bits[0]} and {bits[1]}"
    if any(not Levels(side.codebook).computed for side in (key, value)):
        names = key.codebook.name, value.codebook.name
        return f"levels that are computed (uniform, integer, cubic, NF4); got {' and '.join(names)}"
    if value.per_channel or (key.per_channel and key.zero is not None):
        return "values with scales of tokens, and channels of keys without zeros"
    if key.blocks_per_head > 1 or value.blocks_per_head > 1:
        return "scales of whole heads"
    if any(side.scale.dtype != jnp.int16 for side in (key, value)):
        return "scales in float16"
    num_tiles = min(key.num_tiles, value.num_tiles)
    field = 8 * low_bits(bits[0])
    if num_tiles * field < ROWS:
        return f"at least {ROWS // field} tiles; got {num_tiles}"
    plan = make_plan(group, key, value, None, None)
    if not plan.programs:
        return (
            f"at most {SHARED_MEMORY // 2**10 - 1} KiB of shared memory; head_dim {key.head_dim} "
            f"with {bits[0]} bits and {group} query heads per KV head take "
            f"{plan.shared_bytes // 2**10}"
        )
    return None


def _other_capability() -> str | None:
    """The compute capability of the GPU at hand, if there is one and it is no Hopper."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:  # none: traced to be compiled for another machine
        return None
    return None if capability.startswith("9.") else capability


def decode_attention(
    q: jax.Array,
    key: TiledCodes,
    value: TiledCodes,
    lengths: jax.Array,
    first: jax.Array,
    *,
    soft_cap: float | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`.

    `interpret` are `plgpu.InterpretGPUParams`, for tests.
    """
    (batch, heads, group, _), head_dim = q.shape, key.head_dim
    plan = make_plan(group, key, value, soft_cap, interpret)
    q, waves = jnp.split(q, [head_dim], axis=-1)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.group - group), (0, 0)))
    sums = jnp.sum(q.astype(jnp.float16).astype(jnp.float32), axis=3)
    if plan.channels:  # queries wait, in columns, for the scales of every tile
        q = jnp.swapaxes(q, 2, 3).astype(jnp.float32)
    else:
        q = q.astype(jnp.float16)
    # Free reshapes: the words of a token in a column are a row, and so are the tokens of a field.
    words = lambda a: a.reshape(*a.shape[:3], -1, plan.width)
    fields = lambda a: a.reshape(*a.shape[:3], plan.fields, plan.field)
    per_token = [
        fields(a)
        for s in (key, value)
        if not s.per_channel
        for a in (s.scale, s.zero)
        if a is not None
    ]
    per_channel = [key.scale] if plan.channels else []
    shift = []
    if plan.waves:  # columns beside the scores': [batch, heads, tiles, fields, field, group]
        waves = jnp.pad(waves, ((0, 0), (0, 0), (0, plan.group - group), (0, 0)))
        added = key.waves.shift(waves).transpose(0, 2, 1, 4, 3)
        shift = [added.reshape(*added.shape[:3], plan.fields, plan.field, plan.group)]

    word_tiles = (plan.planes, plan.columns, ROWS, plan.width)
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    half = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
    token_size = (STAGES, plan.fields, plan.tiles, plan.field)
    copies = 2 * plan.columns * plan.tiles * (2 * plan.planes - 1)
    copies += plan.arrays * plan.fields + plan.channels + plan.waves * plan.tiles * plan.fields
    shape = lambda *s: jax.ShapeDtypeStruct((batch, heads, plan.splits, *s), jnp.float32)
    options = {} if interpret is None else dict(interpret=interpret)
    numerator, denominator, maximum = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(shape(head_dim, plan.group), shape(plan.group), shape(plan.group)),
        scratch_types=[
            plgpu.SMEM((head_dim, plan.group), jnp.float32)
            if plan.channels
            else plgpu.SMEM((plan.group, head_dim), jnp.float16, transforms=half),
            plgpu.SMEM((plan.group,), jnp.float32),
            plgpu.SMEM((STAGES, *word_tiles), jnp.int16, transforms=swizzled),
            plgpu.SMEM((STAGES, *word_tiles), jnp.int16, transforms=swizzled),
            [plgpu.SMEM(token_size, jnp.int16) for _ in per_token],
            [plgpu.SMEM((STAGES, plan.tiles, head_dim), jnp.int16) for _ in per_channel],
            [
                plgpu.SMEM((plan.tiles * plan.group, head_dim), jnp.float16, transforms=half)
                for _ in per_channel
            ],
            [plgpu.SMEM((STAGES, plan.fields, ROWS, plan.group), jnp.float32) for _ in shift],
            plgpu.SMEM((plan.per_part, plan.group, ROWS), jnp.float16, transforms=half),
            plgpu.SMEM((head_dim, plan.group), jnp.float32),
            [plgpu.SMEM((plan.group,), jnp.float32) for _ in range(2)],
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        ],
        kernel_name="decode_attention",
        grid=(plan.splits, heads, batch),
        grid_names=("split", "head", "batch"),
        **options,
    )(
        lengths,
        first,
        q,
        sums,
        words(key.words),
        words(value.words),
        *per_token,
        *per_channel,
        *shift,
    )
    top = jnp.max(maximum, axis=2, keepdims=True)
    weight = jnp.exp(maximum - top)
    denominator = jnp.sum(weight * denominator, axis=2)[..., :group]
    numerator = jnp.sum(weight[:, :, :, None] * numerator, axis=2)
    numerator = jnp.swapaxes(numerator, 2, 3)[:, :, :group]
    return numerator, denominator, jnp.where(denominator == 0, -jnp.inf, top[:, :, 0, :group])


def _kernel(lengths, first, q_gmem, sums_gmem, key_gmem, value_gmem, *refs, plan: Plan):
    token_gmem, refs = refs[: plan.arrays], refs[plan.arrays :]
    channel_gmem, refs = refs[: plan.channels], refs[plan.channels :]
    shift_gmem, refs = refs[: plan.waves], refs[plan.waves :]
    numerator_gmem, denominator_gmem, maximum_gmem, *scratch = refs
    q_smem, sums_smem, key_smem, value_smem, token_smem = scratch[:5]
    channel_smem, scaled_smem, shift_smem, p_smem, out_smem, row_smem = scratch[5:11]
    query_barrier, barrier = scratch[11:]
    split, head, batch = (jax.lax.axis_index(name) for name in ("split", "head", "batch"))
    unit_tokens = plan.tiles * tiles.TOKENS
    length, oldest = lengths[batch], first[batch]
    div = lambda a, b: jax.lax.div(a, jnp.int32(b))
    begin = div(oldest, unit_tokens)
    units = jnp.maximum(div(length + (unit_tokens - 1), unit_tokens) - begin, 0)
    each = div(units + (plan.splits - 1), plan.splits)
    begin = begin + split * each
    steps = jnp.clip(units - split * each, 0, each)

    blocks = [plan.key_block] * plan.key_arrays + [plan.value_block] * (1 + plan.value_zero)

    def first_tile(unit):
        # The last unit is moved back to fit; what an earlier one has seen is masked out.
        return jnp.clip(unit * plan.tiles, 0, plan.num_tiles - plan.tiles)

    def copy_words(source, target, n, column, done):
        low, high = plan.rows(column)
        copy = lambda start, plane, at, size: plgpu.copy_gmem_to_smem(
            source.at[pl.ds(start, size)],
            target.at[plane, column, pl.ds(n * plan.field + at, size)],
            done,
        )
        copy(low, 0, 0, plan.field)
        if plan.planes == 2:  # a word has high bits for two rows: twice, so that each has its own
            copy(high, 1, 0, plan.field // 2)
            copy(high, 1, plan.field // 2, plan.field // 2)

    def fetch(step, slot):
        tile = first_tile(begin + jnp.minimum(step, jnp.maximum(steps - 1, 0)))
        done = barrier.at[slot]
        for n, c in itertools.product(range(plan.tiles), range(plan.columns)):
            for source, target in ((key_gmem, key_smem), (value_gmem, value_smem)):
                copy_words(source.at[batch, tile + n, head], target.at[slot], n, c, done)
        for source, target, block in zip(token_gmem, token_smem, blocks, strict=True):
            for k in range(plan.fields):
                plgpu.copy_gmem_to_smem(
                    source.at[batch, pl.ds(tile, plan.tiles), div(head, block), k],
                    target.at[slot, k],
                    done,
                )
        for source, target in zip(shift_gmem, shift_smem, strict=True):
            for n, k in itertools.product(range(plan.tiles), range(plan.fields)):
                plgpu.copy_gmem_to_smem(
                    source.at[batch, head, tile + n, k],
                    target.at[slot, k, pl.ds(n * plan.field, plan.field)],
                    done,
                )
        for source, target in zip(channel_gmem, channel_smem, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[batch, pl.ds(tile, plan.tiles), head], target.at[slot], done
            )

    plgpu.copy_gmem_to_smem(q_gmem.at[batch, head], q_smem, query_barrier)
    plgpu.copy_gmem_to_smem(sums_gmem.at[batch, head], sums_smem, query_barrier)
    for slot in range(STAGES):
        fetch(jnp.int32(slot), slot)
    plgpu.barrier_wait(query_barrier)

    square = (ROWS, plan.group)
    by_row = lambda x: jax.lax.broadcast_in_dim(x, square, (0,))
    by_column = lambda x: jax.lax.broadcast_in_dim(x, square, (1,))
    needs_sums = not plan.channels and (plan.key_zero or plan.key.ratio != 0)
    sums = by_column(sums_smem[...]) if needs_sums else None
    float32 = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)

    def per_token(number, slot, k):
        bits = token_smem[number].at[slot, k]  # [tiles, field]: contiguous
        return by_row(
            float32(bits[...].reshape(ROWS) if plan.interpret else bits.reshape(ROWS)[...])
        )

    def scale_queries(slot):
        """Queries by the scales of each tile's channels, and their sums by tile."""
        sums = []
        for tile in range(plan.tiles):
            total, columns = None, pl.ds(tile * plan.group, plan.group)
            for c in range(0, plan.head_dim, ROWS):
                rows = pl.ds(c, ROWS)
                q = plgpu.load(q_smem.at[rows], layout=plgpu.Layout.WGMMA)
                scaled = q * by_row(float32(channel_smem[0].at[slot, tile, rows][...]))
                scaled = scaled.astype(jnp.float16)
                scaled_smem[0].at[columns, rows].transpose((1, 0))[...] = scaled
                if plan.key.ratio:
                    # Of what was rounded: the constant is large, and must cancel.
                    part = jnp.sum(scaled.astype(jnp.float32), axis=0)
                    total = part if total is None else total + part
            sums.append(total)
        plgpu.commit_smem()
        return sums

    def of_own_tile(parts):
        """Each row of the part of its tile."""
        log = plan.field.bit_length() - 1
        tile = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=plgpu.Layout.WGMMA) >> log
        own = parts[0]
        for n, part in enumerate(parts[1:], start=1):
            own = jnp.where(tile == n, part, own)
        return own

    def scores_of(factor, column, slot):
        """f32 square: of a column of keys' factors with the queries."""
        channels = pl.ds(column * plan.width, plan.width)
        if not plan.channels:
            q = q_smem if plan.columns == 1 else q_smem.at[:, channels]
            return _matmul(factor, q, square, plan)
        q = scaled_smem[0] if plan.columns == 1 else scaled_smem[0].at[:, channels]
        every = _matmul(factor, q, (ROWS, plan.tiles * plan.group), plan)
        cut = lambda n: jax.lax.slice(every, (0, n * plan.group), (ROWS, (n + 1) * plan.group))
        return of_own_tile([cut(n) for n in range(plan.tiles)])

    value_array = plan.key_arrays
    needs_constant = plan.value_zero or plan.value.ratio != 0

    def load(words, slot, column, part, token_axis):
        """A column of a unit, with tokens along an axis: what `Levels.factor` needs of it."""
        planes = [words.at[slot, plane, column] for plane in range(plan.planes)]
        low, *high = [(a.transpose((1, 0)) if token_axis else a)[...] for a in planes]
        if not high:
            return low, None
        (high,) = high
        row = plgpu.broadcasted_iota(jnp.int32, high.shape, token_axis, layout=plgpu.Layout.WGMMA)
        upper = jax.lax.shift_right_logical(high, jnp.full_like(high, 8))
        high = jnp.where((row & (plan.field // 2)) != 0, upper, high)
        first_bit = (part * plan.per_part).astype(jnp.int16)
        return low, jax.lax.shift_right_logical(high, jnp.full_like(high, first_bit))

    def attend(slot, unit, part, tile_sums, carry):
        """Merges the fields of one part of a unit's words."""
        numerators, denominator, constant, maximum = carry
        row = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=plgpu.Layout.WGMMA)
        log = plan.field.bit_length() - 1
        in_field = (row >> log) * tiles.TOKENS + (row & (plan.field - 1))
        in_field = in_field + first_tile(unit) * tiles.TOKENS
        oldest_here = jnp.maximum(oldest, unit * unit_tokens)
        bit = part * (plan.per_part * plan.low_bits)  # of a word, where the part begins
        scores = []
        keys = [load(key_smem, slot, c, part, 0) for c in range(plan.columns)]
        for n in range(plan.per_part):
            k = part * plan.per_part + n
            s = None
            for c in range(plan.columns):
                words, high = keys[c]
                of_column = scores_of(plan.key.factor(words, bit, n, high), c, slot)
                s = of_column if s is None else s + of_column
            if plan.key.ratio:
                total = of_own_tile([by_column(t) for t in tile_sums]) if plan.channels else sums
                s = s + total * jnp.float32(plan.key.ratio)
            if plan.channels:
                s = s * jnp.float32(plan.key.slope)
            else:
                s = s * (per_token(0, slot, k) * jnp.float32(plan.key.slope))
            if plan.key_zero:
                s = s + sums * per_token(1, slot, k)
            if plan.waves:
                s = s + plgpu.load(shift_smem[0].at[slot, k], layout=plgpu.Layout.WGMMA)
            if plan.soft_cap is not None:
                s = jnp.float32(plan.soft_cap) * jnp.tanh(s * jnp.float32(1 / plan.soft_cap))
            token = in_field + k * plan.field
            seen = (token < length) & (token >= oldest_here)
            scores.append(jnp.where(seen, s, jnp.float32(UNSEEN)))
        top = jnp.maximum(maximum, jnp.max(functools.reduce(jnp.maximum, scores), axis=0))
        old = jnp.exp(maximum - top)
        denominator = denominator * by_column(old)
        constant = constant * by_column(old) if needs_constant else constant
        for n, s in enumerate(scores):
            k = part * plan.per_part + n
            p = jnp.exp(s - by_column(top))
            denominator = denominator + p
            scaled = p * (per_token(value_array, slot, k) * jnp.float32(plan.value.slope))
            # What is stored for unseen tokens may be NaN. (A weight that is NaN is not 0.)
            scaled = jnp.where(p == 0, jnp.float32(0), scaled).astype(jnp.float16)
            p_smem.at[n].transpose((1, 0))[...] = scaled
            if plan.value.ratio:
                constant = constant + scaled.astype(jnp.float32) * jnp.float32(plan.value.ratio)
            if plan.value_zero:
                zero = p * per_token(value_array + 1, slot, k)
                constant = constant + jnp.where(p == 0, jnp.float32(0), zero)
        plgpu.commit_smem()
        size, merged = (plan.width, plan.group), []
        for c, numerator in enumerate(numerators):
            numerator = numerator * jax.lax.broadcast_in_dim(old, size, (1,))
            words, high = load(value_smem, slot, c, part, 1)
            for n in range(plan.per_part):
                factor = plan.value.factor(words, bit, n, high)
                numerator = numerator + _matmul(factor, p_smem.at[n], size, plan)
            merged.append(numerator)
        plgpu.commit_smem()  # these reads come before what is written next
        return tuple(merged), denominator, constant, top

    def step(i, carry):
        slot = jax.lax.rem(i, jnp.int32(STAGES))
        plgpu.barrier_wait(barrier.at[slot])
        tile_sums = scale_queries(slot) if plan.channels else None
        # A loop, not copies: the compiler would compute all factors of a word at once, and they
        # do not fit into the registers.
        one = lambda part, carry: attend(slot, begin + i, part, tile_sums, carry)
        carry = jax.lax.fori_loop(0, plan.parts, one, carry)
        fetch(i + STAGES, slot)
        return carry

    zeros = lambda *s: plgpu.layout_cast(jnp.zeros(s, jnp.float32), plgpu.Layout.WGMMA)
    floor = plgpu.layout_cast(
        jnp.full((plan.group,), FLOOR, jnp.float32), plgpu.Layout.WGMMA.reduce(0)
    )
    numerators = tuple(zeros(plan.width, plan.group) for _ in range(plan.columns))
    start = (numerators, zeros(*square), zeros(*square), floor)
    numerators, denominator, constant, maximum = jax.lax.fori_loop(0, steps, step, start)
    for slot in range(STAGES):
        plgpu.barrier_wait(barrier.at[slot])
    total = jnp.sum(constant, axis=0) if needs_constant else None
    for c, numerator in enumerate(numerators):
        if needs_constant:
            numerator = numerator + jax.lax.broadcast_in_dim(total, numerator.shape, (1,))
        rows = pl.ds(c * plan.width, plan.width)
        (out_smem if plan.columns == 1 else out_smem.at[rows])[...] = numerator
    row_smem[0][...] = jnp.sum(denominator, axis=0)
    row_smem[1][...] = maximum
    plgpu.commit_smem()
    place = (batch, head, split)
    plgpu.copy_smem_to_gmem(out_smem, numerator_gmem.at[place])
    plgpu.copy_smem_to_gmem(row_smem[0], denominator_gmem.at[place])
    plgpu.copy_smem_to_gmem(row_smem[1], maximum_gmem.at[place])
    plgpu.wait_smem_to_gmem(0)


def _matmul(left: jax.Array, right, shape: tuple[int, int], plan: Plan) -> jax.Array:
    """f32 left [M, K] @ right [N, K]^T; `right` is in shared memory."""
    if plan.interpret:  # which has no products with an operand in registers
        return jnp.dot(left, right[...].T, preferred_element_type=jnp.float32)

    def run(accumulator):
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
