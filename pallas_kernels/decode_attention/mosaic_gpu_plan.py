"""How the GPU kernel cuts its work: what is static about a call."""

import dataclasses

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import Levels

ROWS = 64  # of a tensor core's operand
STAGES = 2  # units on their way from memory
UNITS_PER_SPLIT = 2  # at least, as every split costs a merge
MULTIPROCESSORS = 132  # of an H100
SHARED_MEMORY = 227  # KiB of each


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
    def low_bits(self) -> int:
        """Of a code, in its word; the third of 3 bits is in a plane of its own."""
        return low_bits(self.bits)

    @property
    def planes(self) -> int:
        return 1 + (self.bits == 3)

    @property
    def field(self) -> int:
        """Tokens per field of a tile."""
        return 8 * self.low_bits

    @property
    def fields(self) -> int:
        return tiles.TOKENS // self.field

    @property
    def per_part(self) -> int:
        """Fields that are decoded at a time: those of a byte, or fewer if they would not fit into
        the registers, with as much beside them."""
        if self.bits == 3:
            return 2 if self.group == 8 else 1
        polynomials = all(side.codebook.coefficients for side in (self.key, self.value))
        return min(8 // self.bits, 4 if self.group == 8 and polynomials else 2)

    @property
    def parts(self) -> int:
        return self.fields // self.per_part

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

    def rows(self, column: int) -> tuple[int, int]:
        """Where the words of a column begin among the rows of a tile: low bits, and high bits."""
        high = self.field // 2  # rows of words with the high bits
        return column * self.field, self.columns * self.field + column * high


def low_bits(bits: int) -> int:
    return 2 if bits == 3 else bits


def make_plan(q, key: TiledCodes, value: TiledCodes, soft_cap: float | None, interpret) -> Plan:
    """`q` [batch, Hkv, G, width] is not touched."""
    (batch, heads, group, _), head_dim = q.shape, key.head_dim
    padded = -(-group // 8) * 8
    num_tiles = min(key.num_tiles, value.num_tiles)
    plan = Plan(
        head_dim=head_dim,
        group=padded,
        num_tiles=num_tiles,
        splits=1,
        key=Levels(key.codebook),
        value=Levels(value.codebook),
        key_block=key.block_size // head_dim,
        value_block=value.block_size // head_dim,
        key_zero=key.zero is not None,
        value_zero=value.zero is not None,
        channels=key.per_channel,
        waves=key.waves is not None,
        soft_cap=soft_cap,
        interpret=interpret is not None,
    )
    # As many programs as run at a time: what is on its way takes 64 KiB of each for every plane
    # and column, and four bytes per token and query of what waves add.
    way = 64 * plan.columns * plan.planes
    way += plan.waves * STAGES * ROWS * plan.fields * padded * 4 // 1024
    programs = MULTIPROCESSORS * max(1, SHARED_MEMORY // way)
    units = -(-num_tiles // plan.tiles)
    fill = -(-programs // (batch * heads))
    return dataclasses.replace(plan, splits=max(1, min(fill, units // UNITS_PER_SPLIT)))
