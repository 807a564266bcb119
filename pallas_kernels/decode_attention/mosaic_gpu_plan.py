"""How the GPU kernel cuts its work: what is static about a call."""

import dataclasses

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import Levels

ROWS = 64  # of a tensor core's operand


@dataclasses.dataclass(frozen=True)
class Plan:
    head_dim: int
    group: int  # padded to the 8 columns of a tensor core
    num_tiles: int
    splits: int
    key: Levels
    value: Levels
    key_block: int  # heads that share a scale
    value_block: int
    key_zero: bool
    value_zero: bool
    channels: bool  # have the scales of keys, not tokens
    waves: bool  # add to scores
    soft_cap: float | None
    interpret: bool

    @property
    def bits(self) -> int:
        return self.key.codebook.bits

    @property
    def fields(self) -> int:
        return 16 // self.bits

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def field(self) -> int:
        """Tokens per field of a tile."""
        return 8 * self.bits

    @property
    def width(self) -> int:
        """Channels of a column: a tile's words are stored in columns of 128 channels."""
        return min(self.head_dim, tiles.LANES)

    @property
    def columns(self) -> int:
        return self.head_dim // self.width

    @property
    def tiles(self) -> int:
        """Of a unit."""
        return ROWS // self.field

    @property
    def key_arrays(self) -> int:
        """Scales and zeros of the tokens of keys."""
        return (not self.channels) + self.key_zero

    @property
    def arrays(self) -> int:
        """Those of both sides."""
        return self.key_arrays + 1 + self.value_zero
