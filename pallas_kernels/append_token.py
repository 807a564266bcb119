"""Encodes one token and writes it into its bits of a body in tiles, in one launch, by Triton.

XLA takes several: a block's extremes, what is stored of them, the words. Here one program has a
block of the token, from its extremes to its words.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.triton_backend import pltriton

# The platforms of `jax.lax.platform_dependent` on which caches take it, if they are asked to
# (`triton_backend.ASKING`).
PLATFORMS = {"cuda"}
MOST = 8192  # elements of a block, at most: what a program holds in registers
ELEMENTS_PER_WARP = 256  # 8 per thread


def append_token(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    x: jax.Array,
    token: jax.Array,
    keep: jax.Array,
    *,
    encode: Callable,
    bits: int,
    block_size: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The body of one sequence, in place, with `x` as its token number `token`.

    Args:
      words: int16[tiles, heads, rows, 128], see `nqkv_jax.tiles`.
      scale, zero: scale_dtype [tiles, blocks, 128], float16 as int16; zero is of min-max only.
      x: float[heads, head_dim].
      token: i32[], below 128 * tiles.
      keep: bool[]; nothing is written if it is not set.
      encode: (f32[n], axis 0) -> codes u8[n], scale and zero [1], or None; of operations that
        Triton has. n is the next power of two of block_size.
      bits, block_size: of codes; elements, at most `MOST`.

    Returns: words, scale and zero, to the bit as XLA writes them.
    """
    arrays = [words, scale] if zero is None else [words, scale, zero]
    whole, count = pl.BlockSpec(), len(arrays)
    at = jnp.where(keep, token, -1)[None]
    found = pl.pallas_call(
        functools.partial(_kernel, encode=encode, bits=bits, size=block_size, head_dim=x.shape[1]),
        grid=(x.size // block_size,),
        in_specs=[whole] * (2 + count),
        out_specs=[whole] * count,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
        input_output_aliases={2 + i: i for i in range(count)},
        compiler_params=pltriton.CompilerParams(
            num_warps=max(1, pl.next_power_of_2(block_size) // ELEMENTS_PER_WARP)
        ),
        interpret=interpret,
        name="append_token",
    )(at, x.reshape(-1), *arrays)
    return found[0], found[1], None if zero is None else found[2]


def _kernel(at, x, *refs, encode: Callable, bits: int, size: int, head_dim: int):
    words, *scales = refs[len(refs) // 2 :]  # where the results are; the arguments are there too
    block, token = pl.program_id(0), at[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(size),), 0)
    # Beyond a block's end its last element is repeated: no extreme changes, and its word is written
    # more than once, with the same bits.
    channel = block * size + jnp.minimum(lane, size - 1)
    codes, *stored = encode(x[channel].astype(jnp.float32), 0)

    @pl.when(token >= 0)
    def _():
        tile, place = _divmod(token, tiles.TOKENS)
        head, c = _divmod(channel, head_dim)
        for plane in tiles.planes(place, bits, head_dim):
            row, column = _divmod(plane.element(c), tiles.LANES)
            ref = words.at[tile, head, row, column]
            shift = plane.shift.astype(jnp.int16)
            field = jnp.int16(plane.field)
            new = (plane.of(codes).astype(jnp.int16) & field) << shift
            ref[...] = (ref[...] & ~(field << shift)) | new
        for ref, value in zip(scales, (v for v in stored if v is not None), strict=True):
            if value.dtype == jnp.float16:
                value = jax.lax.bitcast_convert_type(value, jnp.int16)
            ref[tile, block, pl.ds(place, 1)] = value


def _divmod(a: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Of integers that are not negative."""
    n = jnp.full_like(a, n)
    return jax.lax.div(a, n), jax.lax.rem(a, n)
