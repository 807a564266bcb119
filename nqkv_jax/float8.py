"""8-bit floating-point numbers as levels of a block."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.rounding import round_to

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@dataclasses.dataclass(frozen=True)
class Float8:
    """The finite numbers of a format: in the place of a `Codebook`, for scale="absmax".

    Codes are the bytes of the format. The scale of a block is max|x| / (largest number), so that
    nothing overflows, and follows the data: with a scale of 1, as engines without calibration use,
    small activations underflow (e4m3 of sigma = 1e-3 loses a third of the energy).

    Attributes:
      format: "e4m3" (largest 448; JAX's float8_e4m3fn) or "e5m2" (57344, half the precision).

    Raises: ValueError for another format.
    Source: Micikevicius et al. (2022), FP8 formats for deep learning, arXiv:2209.05433, table 1.
    """

    format: str = "e4m3"
    bits: ClassVar[int] = 8
    coefficients: ClassVar[None] = None  # no polynomial
    is_even: ClassVar[bool] = False
    is_uniform: ClassVar[bool] = False
    is_searched: ClassVar[bool] = False

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(
                f"Float8: format must be one of {', '.join(FORMATS)}; got {self.format!r}"
            )

    @property
    def name(self) -> str:
        return self.format

    @property
    def of_absmax(self) -> float:
        """The largest number: what the largest magnitude of a block becomes."""
        return float(self._info.max)

    @property
    def levels(self) -> tuple[float, ...]:
        """The numbers of the bytes 0 .. 255; NaN and infinities where the format has them, which
        `encode` never returns."""
        numbers = np.arange(256, dtype=np.uint8).view(FORMATS[self.format])
        return tuple(numbers.astype(np.float64).tolist())

    @property
    def mantissa_bits(self) -> int:
        return self._info.nmant

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return 1 - self._info.minexp

    # Both formats are float16 with fewer bits of mantissa, e4m3 also with another bias.

    @property
    def dropped_bits(self) -> int:
        """Of a float16, below those of a byte."""
        return 10 - self.mantissa_bits

    @property
    def float16_unit(self) -> float:
        """A number, over the float16 that has its bits."""
        return 2.0 ** (15 - self.bias)

    @property
    def _info(self):
        return jnp.finfo(FORMATS[self.format])

    def encode(self, y: jax.Array) -> jax.Array:
        """The bytes (uint8, shape of `y`) of the numbers nearest to `y` f32[...], half to even.

        Values beyond the largest number take that: a cast would make NaN of them (e4m3), or
        infinity (e5m2). Zero is never negative. NaN takes an arbitrary code: callers keep it
        visible.
        """
        top = np.float32(self.of_absmax)
        y = round_to(jnp.clip(y, -top, top), FORMATS[self.format])
        half = (y * np.float32(1 / self.float16_unit)).astype(jnp.float16)
        half = jax.lax.bitcast_convert_type(half, jnp.int16).astype(jnp.int32)
        sign, magnitude = half >> np.int32(8), half >> np.int32(self.dropped_bits)
        return ((sign & np.int32(0x80)) | (magnitude & np.int32(0x7F))).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """The numbers of `codes` (uint8), in float32 and then rounded to `dtype`.

        On XLA:CPU a cast takes about twice as long as moving the bits.
        """
        bits = codes.astype(jnp.uint16)
        sign = (bits & np.uint16(0x80)) << np.uint16(8)
        magnitude = (bits & np.uint16(0x7F)) << np.uint16(self.dropped_bits)
        half = jax.lax.bitcast_convert_type(sign | magnitude, jnp.float16)
        return (half.astype(jnp.float32) * np.float32(self.float16_unit)).astype(dtype)
