"""Scalar quantization in blocks: one scale, and for min-max one zero point, per block."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import packing
from nqkv_jax.checks import is_whole
from nqkv_jax.codebooks import Codebook, Float8
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.rounding import round_to

SCALES = ("absmax", "signed_absmax", "rms", "minmax")
MOST_SELECTED = 8  # blocks of a head: of 16, selecting takes as long as indexing
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPayload:
    """One group: x ≈ codebook[unpacked codes] * scale + zero, with scale and zero per block.

    Codes are packed per head along head_dim (`nqkv_jax.packing`) even where a block spans heads,
    so that heads stay separable. `group` is 1 for blocks along the hidden axis.
    """

    codes: jax.Array  # u8[group, heads, head_dim * bits / 8]
    scale: jax.Array  # scale_dtype [group, heads * head_dim / block_size], or [heads, head_dim]
    zero: jax.Array | None = None  # like scale; min-max only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockQuantizer(Quantizer):
    """Rounds every element to the nearest level of a codebook, scaled per block.

    With s~ = stored scale (rounded to `scale_dtype`, which is what the decoder has) and z~ = stored
    zero: code = codebook.encode((x - z~) / s~), decoded as codebook.decode(code) * s~ + z~.

        absmax         s = max|x|                          z = 0
        signed_absmax  s = the element of largest |x|      z = 0
        rms            s = sqrt(mean(x^2))                 z = 0
        minmax         s = (max - min) / (2^bits - 1)      z = min

    (For `Float8`, whose largest number is not 1, the first two are divided by that.)

    The published min-max recipe takes the scale from the exact minimum, but the grid begins at the
    stored one: where blocks lie far from zero (an offset of 100 widths or more), use
    scale_dtype=float32.

    Scales and zeros beyond the range of `scale_dtype` saturate. A block whose scale is stored as 0
    (all zero, or below the smallest subnormal) decodes to 0, or to z~. A block that holds NaN or an
    infinity gets a NaN scale and decodes to NaN throughout.

    Which bits are stored depends on the values alone, not on how many tokens are encoded in one
    call: the reductions have a fixed order.

    Attributes:
      codebook: its levels must be relative to the scale chosen (see `nqkv_jax.codebooks`).
      block_size: elements per scale.
      axis: "hidden": a block is consecutive elements of one token's heads * head_dim, and may span
        heads. "tokens": a block is `block_size` consecutive tokens of one channel of one head.
      scale: "absmax", "signed_absmax", "rms" or "minmax"; "minmax" goes with `uniform` codebooks.
      scale_dtype: float16, bfloat16 or float32, of the scales and zeros. Scales below 6e-5 lose
        precision in float16, and those below 3e-8 become 0.

    Raises: ValueError for settings that do not go together.
    """

    codebook: Codebook | Float8 = dataclasses.field(metadata={"static": True})
    _: dataclasses.KW_ONLY
    block_size: int = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(default="hidden", metadata={"static": True})
    scale: str = dataclasses.field(default="absmax", metadata={"static": True})
    scale_dtype: np.dtype = dataclasses.field(default=jnp.float16, metadata={"static": True})

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", scale_dtype(self.scale_dtype))
        if not isinstance(self.codebook, Codebook | Float8):
            raise ValueError(
                "BlockQuantizer: codebook must be one of nqkv_jax.codebooks, such as "
                f"codebooks.normal_float(4); got {self.codebook!r}"
            )
        if not is_whole(self.block_size) or self.block_size < 1:
            raise ValueError(
                "BlockQuantizer: block_size must be positive, a whole number; got "
                f"{self.block_size!r}"
            )
        object.__setattr__(self, "block_size", int(self.block_size))
        if self.axis not in ("hidden", "tokens"):
            raise ValueError(f"BlockQuantizer: axis must be hidden or tokens; got {self.axis!r}")
        if self.scale not in SCALES:
            raise ValueError(f"BlockQuantizer: scale must be one of {SCALES}; got {self.scale!r}")
        if (self.scale == "minmax") != self.codebook.is_uniform:
            raise ValueError(
                'BlockQuantizer: scale="minmax" and a uniform codebook go together (its levels '
                "count steps from the minimum); "
                f"got scale={self.scale!r} with codebook {self.codebook.name!r}"
            )

    @property
    def group(self) -> int:
        return self.block_size if self.axis == "tokens" else 1

    def check(self, heads: int, head_dim: int) -> None:
        packing.packed_size(head_dim, self.codebook.bits)
        if self.axis == "hidden":
            check_hidden_blocks("BlockQuantizer", heads, head_dim, self.block_size)

    def quantize(self, x: jax.Array, context: Context) -> BlockPayload:
        """Encodes `x` [group, heads, head_dim], any float dtype, in float32."""
        check_group("BlockQuantizer", x, self.group)
        self.check(*x.shape[1:])
        codes, scale, zero = self.encode(x)
        codes = packing.pack(codes, self.codebook.bits)
        return BlockPayload(codes=codes, scale=scale, zero=zero)

    def dequantize(self, payload: BlockPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [group, heads, head_dim]."""
        bits, words = self.codebook.bits, payload.codes.shape[-1]
        codes = packing.unpack(payload.codes, bits, words * 8 // bits)
        return self.decode(codes, payload.scale, payload.zero, dtype)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Codes u8[tokens, heads, head_dim], and scales and zeros as in `BlockPayload`."""
        blocks, axis = self._to_blocks(x.astype(jnp.float32))
        codes, scale, zero = self.encode_blocks(blocks, axis)
        zero = None if zero is None else jnp.squeeze(zero, axis)
        return codes.reshape(x.shape), jnp.squeeze(scale, axis), zero

    def encode_blocks(
        self, blocks: jax.Array, axis: int
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of f32 blocks that lie along `axis`: codes u8, and scales and zeros with `axis` 1 long.

        The operations are those that kernels have too (`pallas_kernels.append_token`), except for
        scale="rms", and codebooks whose levels are searched.
        """
        low = jnp.min(blocks, axis=axis, keepdims=True)
        high = jnp.max(blocks, axis=axis, keepdims=True)
        zero = None
        if self.scale == "minmax":
            steps = np.float32(2**self.codebook.bits - 1)
            scale, zero = divide(high - low, steps), low
        elif self.scale == "signed_absmax":
            scale = jnp.where(high >= -low, high, low)
        else:
            scale = jnp.maximum(high, -low)
            if self.scale == "rms":
                scale = rms(blocks, scale, axis)
        if self.scale in ("absmax", "signed_absmax") and self.codebook.of_absmax != 1:
            scale = divide(scale, np.float32(self.codebook.of_absmax))

        # Not by the extremes: those of a kernel leave NaN out.
        finite = jnp.isfinite(blocks).astype(jnp.int32)
        finite = jnp.min(finite, axis=axis, keepdims=True) > 0
        scale = store(scale, finite, self.scale_dtype)
        if zero is not None:
            zero = store(zero, finite, self.scale_dtype)
            blocks = blocks - zero.astype(jnp.float32)
        codes = self.codebook.encode(divide_or_zero(blocks, scale.astype(jnp.float32)))
        return codes, scale, zero

    def decode(
        self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None, dtype=jnp.float32
    ) -> jax.Array:
        """The inverse of `encode`."""
        values = self.codebook.decode(codes) * self._of_elements(scale, codes.shape)
        if zero is not None:
            values = values + self._of_elements(zero, codes.shape)
        return values.astype(dtype)

    def _of_elements(self, a: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Scales or zeros in float32, of a shape that broadcasts to that of tokens."""
        a, (tokens, heads, head_dim) = a.astype(jnp.float32), shape
        if self.axis == "tokens":
            return a[None]
        count, rest = divmod(head_dim, self.block_size)
        if rest or count > MOST_SELECTED:
            return jnp.repeat(a, self.block_size, axis=1).reshape(shape)
        # Selected, not indexed by the channel, which XLA:CPU does one by one: decoding then takes
        # twice to four times as long.
        blocks = jnp.split(a.reshape(tokens, heads, count), count, axis=2)
        first = jnp.arange(0, head_dim, self.block_size)
        channel = jnp.arange(head_dim)[None, None]
        found = blocks[0]
        for n, block in enumerate(blocks[1:], start=1):
            found = jnp.where(channel < first[n], found, block)
        return found

    def _to_blocks(self, x: jax.Array) -> tuple[jax.Array, int]:
        """`x` with the elements that share a scale along one axis, and that axis."""
        if self.axis == "tokens":
            return x, 0
        return x.reshape(x.shape[0], -1, self.block_size), -1


# What the other scalar quantizers share ----------------------------------------------------------


def scale_dtype(dtype) -> np.dtype:
    """The dtype of scales, normalised; ValueError unless one of `SCALE_DTYPES`."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    # NumPy's default for None is float64, which is none of them.
    if known is None or known.name not in SCALE_DTYPES:
        got = repr(dtype) if known is None else known.name
        raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}; got {got}")
    return known


def check_group(what: str, x: jax.Array, group: int) -> None:
    """Raises ValueError unless `x` is [group, heads, head_dim] of a float dtype."""
    if x.ndim != 3 or x.shape[0] != group or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{what}.quantize: x must be floats [group, heads, head_dim] with group={group}; "
            f"got {x.dtype.name}{list(x.shape)}"
        )


def check_hidden_blocks(
    what: str, heads: int, head_dim: int, block_size: int, option: str = "block_size"
) -> None:
    """Raises ValueError, which calls the size `option`, unless blocks fill the hidden axis."""
    hidden = heads * head_dim
    if block_size < 1 or hidden % block_size:
        divisors = [n for n in range(1, hidden + 1) if hidden % n == 0 and n >= 8] or [hidden]
        nearest = max([n for n in divisors if n <= block_size], default=divisors[0])
        raise ValueError(
            f"{what}: {option} must divide heads * head_dim = {heads} * {head_dim} = {hidden}: "
            f"one of {divisors}; got {block_size}. Take {option}={nearest}"
        )


def store(scale: jax.Array, finite: jax.Array, dtype: np.dtype) -> jax.Array:
    """`scale` rounded to `dtype`: saturated where `finite`, else NaN; zero is never negative."""
    top = np.float32(jnp.finfo(dtype).max)
    finite = finite & (scale == scale)  # before the bits of a NaN are rounded
    scale = round_to(jnp.clip(scale, -top, top), dtype)
    # Which zero a minimum over zeros of both signs returns is open: the stored bits must not be.
    scale = jnp.where(scale == 0, np.float32(0), scale)
    # The clip would hide an infinity behind a large finite number.
    return jnp.where(finite, scale, np.float32(np.nan)).astype(dtype)


def rounded(x: jax.Array) -> jax.Array:
    """f32 `x` with one bit less, so that a product is rounded here in every program.

    A compiler may fuse a product with the sum that follows, in one program and not in another, and
    the stored bits would depend on it.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)


def divide(x: jax.Array, by) -> jax.Array:
    """x / by, for f32 `by` of the rank of `x` or a constant: rounded once on a CPU, and within two
    units in the last place on a GPU.

    XLA multiplies by a rounded reciprocal where it sees that the divisor is constant or broadcast.
    That moves values across thresholds, and would make the stored bits depend on how a program was
    fused. A divisor selected per element is neither.
    """
    return x / jnp.where(jnp.isnan(x), np.float32(1), by)


def divide_or_zero(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale; 0 where the scale is 0 or NaN."""
    usable = jnp.abs(scale) > 0
    return jnp.where(usable, divide(x, jnp.where(usable, scale, np.float32(1))), np.float32(0))


def pairwise_sum(x: jax.Array, axis: int) -> jax.Array:
    """The sum along `axis`, kept as 1, in an order that does not depend on the other axes.

    `jnp.sum` may add in another order for one token than for a thousand, and so store other bits.
    """
    n = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, 2 ** math.ceil(math.log2(n)) - n)
    x = jnp.pad(x, padding)
    while x.shape[axis] > 1:
        first, second = jnp.split(x, 2, axis=axis)
        x = first + second
    return x


def rms(blocks: jax.Array, absmax: jax.Array, axis: int) -> jax.Array:
    """Root mean square, by way of the largest magnitude: squares neither overflow nor underflow."""
    squares = rounded(jnp.square(divide_or_zero(blocks, absmax)))
    mean = divide(pairwise_sum(squares, axis), np.float32(blocks.shape[axis]))
    return absmax * jnp.sqrt(mean)
