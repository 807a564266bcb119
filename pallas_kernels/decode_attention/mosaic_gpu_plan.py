"""How the GPU kernel cuts its work: what is static about a call."""

import dataclasses

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import Levels

ROWS = 64  # of a tensor core's operand
STAGES = 2  # units on their way from memory
UNITS_PER_SPLIT = 2  # at least, as every split costs a merge
MULTIPROCESSORS = 132  # of an H100
SHARED_MEMORY = 228 * 2**10  # bytes of each, 1 KiB of which is reserved for every program
ALIGNMENT = 6 * 2**10  # what barriers and gaps between buffers take, at most


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

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a program takes."""
        words = 2 * STAGES * self.planes * self.columns * ROWS * self.width * 2
        scales = STAGES * self.arrays * tiles.TOKENS * self.tiles * 2
        queries = self.group * self.head_dim * (4 if self.channels else 2)
        if self.channels:
            scales += STAGES * self.tiles * self.head_dim * 2
            queries += self.tiles * self.group * self.head_dim * 2
        shift = self.waves * STAGES * self.fields * ROWS * self.group * 4
        weights = self.per_part * self.group * ROWS * 2
        output = (self.head_dim + 3) * self.group * 4  # with its sums, and those of the queries
        return words + scales + queries + shift + weights + output + ALIGNMENT

    @property
    def programs(self) -> int:
        """That run on a multiprocessor at a time, as far as its memory goes; 0 if none fits."""
        return SHARED_MEMORY // (self.shared_bytes + 2**10)

    def rows(self, column: int) -> tuple[int, int]:
        """Where the words of a column begin among the rows of a tile: low bits, and high bits."""
        high = self.field // 2  # rows of words with the high bits
        return column * self.field, self.columns * self.field + column * high


def low_bits(bits: int) -> int:
    return 2 if bits == 3 else bits


def make_plan(
    group: int, key: TiledCodes, value: TiledCodes, soft_cap: float | None, interpret
) -> Plan:
    """For `group` query heads per KV head."""
    head_dim, num_tiles = key.head_dim, min(key.num_tiles, value.num_tiles)
    plan = Plan(
        head_dim=head_dim,
        group=-(-group // 8) * 8,
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
    # As many programs as run at a time.
    fill = -(-MULTIPROCESSORS * max(1, plan.programs) // (key.words.shape[0] * key.num_heads))
    units = -(-num_tiles // plan.tiles)
    return dataclasses.replace(plan, splits=max(1, min(fill, units // UNITS_PER_SPLIT)))
