"""Decode attention on NVIDIA GPUs since Ampere: codes become float16 in registers, operands of the
tensor core.

One program (four warps) serves one KV head of one sequence and one of several splits of its
tokens, with an online softmax; another kernel merges them. Tokens of keys, and channels of
values, are the rows of a product, 16 for each warp, and the query heads of a group its columns, so
that hardly anything is padded and what was decoded goes from registers into the product.

A *unit* is 64 rows of words: of each field, 64 tokens. Words of keys are loaded as they lie, those
of values transposed (`ldmatrix.trans`). Codes become numbers by an OR into the mantissa of a
float16, two at a time; or, where levels are evenly spaced, by no more than a mask: they are small
numbers then, of which sums are scaled and centred. Scales multiply scores and weights, or if they
are of channels the queries, but never elements.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu_waves as waves
from nqkv_jax.pallas_kernels.decode_attention.codes import SHARING, TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import MOST, Levels
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_machine import SHARED_MEMORY, machine
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_memory import Source, memory
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_merge import merge
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import make_plan
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_program import program


def unsupported(key: TiledCodes, value: TiledCodes, group: int) -> str | None:
    """What this kernel would need to serve the case, or None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"jax 0.11 or later; got {jax.__version__}"
    if (found := machine().capability) not in SHARED_MEMORY:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY)
        return f"a GPU of compute capability {known}; got {found[0]}.{found[1]}"
    if not 64 <= key.head_dim <= 256:
        return f"head_dim 64 to 256; got {key.head_dim}"
    if any(not Levels(side.codebook).served for side in (key, value)):
        names = key.codebook.name, value.codebook.name
        return (
            f"8-bit floats, at most 16 levels, or those that a polynomial of {MOST} operations "
            f"gives; got {' and '.join(names)}"
        )
    if key.per_channel and Levels(key.codebook).floats:
        # Queries meet them in float16, and the numbers of float8 are large.
        return "scales of tokens, where keys are 8-bit floats"
    if key.waves is not None and not key.per_channel:
        return "scales of channels, where keys have waves"
    if value.per_channel:
        return "values with scales of tokens, not of channels"
    if key.groups > tiles.TOKENS // SHARING:
        return f"groups of at least {SHARING} tokens; got {tiles.TOKENS // key.groups}"
    if any(side.blocks_per_head > 1 and side.block_size % SHARING for side in (key, value)):
        sizes = key.block_size, value.block_size
        return f"blocks of a multiple of {SHARING} channels; got {sizes[0]} and {sizes[1]}"
    if any(side.scale.dtype != jnp.int16 for side in (key, value)):
        return "scales in float16"
    plan = make_plan(group, key, value, None, None)
    bits = " and ".join(dict.fromkeys(str(side.bits) for side in plan.sides))
    if max(side.pieces for side in plan.sides) > min(2, plan.fitting):
        # All pieces of a field are decoded together.
        return (
            "keys and values of which one has at most twice the other's bits, and registers for "
            f"both; got {bits} bits, head_dim {key.head_dim} and {group} query heads per KV head"
        )
    if any(side.high and side.levels.ratio and side.blocks > 4 for side in plan.sides):
        # What such levels are counted from, of so many blocks, takes too many registers.
        return (
            f"at most 4 blocks of a head, where 3 bits have signed scales; got {plan.value.blocks}"
        )
    if plan.num_tiles < plan.tiles:
        room = [n * tiles.TOKENS for n in (plan.tiles, plan.num_tiles)]
        return f"room for at least {room[0]} encoded tokens; got {room[1]} (raise max_len)"
    if not plan.programs:
        return (
            f"at most {plan.machine.shared_memory // 2**10 - 1} KiB of shared memory; head_dim "
            f"{key.head_dim} with {bits} bits and {group} query heads per KV head take "
            f"{plan.shared_bytes // 2**10}"
        )
    return None


def decode_attention(
    q: jax.Array,
    key: TiledCodes,
    value: TiledCodes,
    lengths: jax.Array,
    first: jax.Array,
    *,
    soft_cap: float | None = None,
    splits: int | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention.decode_attention`.

    Args:
      splits: of a head's tokens, another number than `number_of_splits`, to tune that.
      interpret: `plgpu.InterpretGPUParams`, for tests.
    """
    (batch, heads, group, _), head_dim = q.shape, key.head_dim
    plan = make_plan(group, key, value, soft_cap, interpret)
    if splits is not None:
        plan = dataclasses.replace(plan, splits=splits)
    # Each chunk is a head: those of a KV head read the same, which a GPU caches.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.chunks * plan.group - group), (0, 0)))
    q = q.reshape(batch, heads * plan.chunks, plan.group, -1)
    if plan.key.channels:  # queries wait, in columns, for the scales of every tile
        q, *cosine_and_sine = _columns(q, head_dim)
        q = q * jnp.float32(plan.key.levels.slope)
        # What meets waves follows. All in one array, which is one launch.
        q = jnp.concatenate([q, *(waves.padded(a, 2, plan) for a in cosine_and_sine)], axis=2)
    q = q.astype(jnp.float16)
    # A free reshape: the words of a token in a column are a row.
    words = lambda a: a.reshape(a.shape[0] * a.shape[1], -1, plan.stored_width)
    of_tokens = lambda side: [] if side.per_channel else [side.scale, side.zero]
    starts, *places = waves.operands(key.waves, plan) if plan.wave_rows else [None]
    source = Source(
        words=(words(key.words), words(value.words)),
        token_scales=tuple([a for a in of_tokens(side) if a is not None] for side in (key, value)),
        channel_scales=[key.scale, key.zero][: plan.key.channel_arrays],
        starts=[starts] * (plan.wave_rows > 0),
    )
    arrays = source, places
    shape = lambda *s: jax.ShapeDtypeStruct((*q.shape[:2], plan.splits, *s), jnp.float32)
    options = {} if interpret is None else dict(interpret=interpret)
    numerator, denominator, maximum = plgpu.kernel(
        functools.partial(program, plan=plan, treedef=jax.tree.structure(arrays)),
        out_type=(shape(head_dim, plan.group), shape(plan.group), shape(plan.group)),
        scratch_types=[memory(plan)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exponentials are as good as float32, in two instructions of eight
            reduction_scratch_bytes=0,
            # One before and one after every store: the program has what is needed.
            unsafe_no_auto_barriers=True,
        ),
        kernel_name="decode_attention",
        grid=(plan.splits, heads * plan.chunks, batch),
        grid_names=("split", "head", "batch"),
        **options,
    )(lengths, first, q, *jax.tree.leaves(arrays))
    numerator, denominator, maximum = merge(numerator, denominator, maximum, interpret)
    maximum = jnp.where(denominator == 0, -jnp.inf, maximum)
    of_heads = lambda a: a.reshape(batch, heads, -1, *a.shape[3:])[:, :, :group]
    return tuple(map(of_heads, (jnp.swapaxes(numerator, 2, 3), denominator, maximum)))


def _columns(q: jax.Array, head_dim: int) -> list[jax.Array]:
    """f32[batch, programs, channels, group]: queries, and if there are waves what meets cosines and
    sines."""
    q = jnp.swapaxes(q, 2, 3).astype(jnp.float32)
    width = q.shape[2]
    return jnp.split(q, [head_dim, (head_dim + width) // 2] * (width > head_dim), axis=2)
