"""Rounding in float32 that no compiler takes out, and with operations that kernels have too."""

import jax
import jax.numpy as jnp
import numpy as np


def nearest_integer(x: jax.Array) -> jax.Array:
    """i32 of f32 `x` below 2^21, half to even; of NaN any.

    The sum is where floats are the integers, whose lowest bits are those of the result.
    """
    origin = np.float32(1.5 * 2**23)
    bits = jax.lax.bitcast_convert_type(x + origin, jnp.int32)
    return bits - origin.view(np.int32)


def round_to(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """f32 `x`, in the range of `dtype`, rounded to a value of `dtype`, half to even.

    XLA may drop a cast to fewer bits and back (xla_allow_excess_precision), and then the encoder
    would divide by a scale that the decoder does not have. An explicit rounding stays.
    """
    info = jnp.finfo(dtype)
    drop = 23 - info.nmant
    if not drop:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Half of what is dropped, or one less where that would round an even number up.
    half = ((bits >> np.int32(drop)) & np.int32(1)) + np.int32(2 ** (drop - 1) - 1)
    bits = (bits + half) & np.int32(-(2**drop))
    nearest = jax.lax.bitcast_convert_type(bits, jnp.float32)
    if info.nexp == 8:
        return nearest
    # Subnormals are on a fixed grid; powers of two multiply exactly.
    grid = np.float32(2.0 ** (info.minexp - info.nmant))
    subnormal = nearest_integer(x * (1 / grid)).astype(jnp.float32) * grid
    return jnp.where(jnp.abs(x) < np.float32(2.0**info.minexp), subnormal, nearest)
