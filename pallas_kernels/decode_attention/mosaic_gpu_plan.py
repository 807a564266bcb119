"""How the GPU kernel cuts its work: what is static about a call."""

import dataclasses
import math
from typing import NamedTuple

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_levels import Levels
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_machine import Machine, machine
from nqkv_jax.pallas_kernels.decode_attention.splits import number_of_splits

ROWS = 64  # of a tensor core's operand
WARPS = 4  # of a program, each of which has 16 of them
THREADS = 32 * WARPS
ALIGNMENT = 2**10  # of a buffer
COPY_ALIGNMENT = 128  # of where a copy goes to
QUERY_HEADS = 16  # of a program at most: for more, most kinds spill registers
FEW_QUERY_HEADS = 8  # for kinds that spill with more


@dataclasses.dataclass(frozen=True)
class Side:
    """Keys or values."""

    levels: Levels
    num_tiles: int  # of a sequence
    pieces: int  # of the rows of words, if the other side has fewer bits: see `Plan.field`
    heads: int  # that share a scale
    blocks: int  # of a head that have their own
    zero: bool
    channels: bool  # have the scales, not tokens
    groups: int  # of a tile's tokens, whose channels have their own

    @property
    def bits(self) -> int:
        return self.levels.codebook.bits

    @property
    def high(self) -> bool:
        """Whether a third bit is in words of its own."""
        return self.bits == 3

    @property
    def arrays(self) -> int:
        """Scales, and zeros if there are some."""
        return 1 + self.zero

    @property
    def token_arrays(self) -> int:
        return 0 if self.channels else self.arrays

    @property
    def channel_arrays(self) -> int:
        return self.arrays if self.channels else 0

    @property
    def parts_off_centre(self) -> bool:
        """Whether parts of a head have middles of their own."""
        return self.off_centre and self.blocks > 1

    @property
    def shifted(self) -> bool:
        """Whether channels add to scores what does not depend on the codes."""
        return self.channels and self.off_centre

    @property
    def off_centre(self) -> bool:
        """Whether the middle of the levels is not 0."""
        return self.zero or self.levels.ratio != 0


class Operand(NamedTuple):
    """Channels of values that are rows of an operand together."""

    column: int
    first: int  # channel of the column
    count: int
    block: int  # of the first
    blocks: int  # that have some of them


@dataclasses.dataclass(frozen=True)
class Plan:
    head_dim: int
    chunks: int  # of the query heads of a KV head, for each of which there is a program
    group: int  # query heads of a chunk, padded to the 8 columns of a tensor core
    num_tiles: int
    splits: int
    stages: int  # units that have room
    key: Side
    value: Side
    wave_rows: int  # of cosines, and of sines, that add to scores; 0 for none
    soft_cap: float | None
    machine: Machine
    interpret: bool

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.key, self.value

    @property
    def bulk_copies(self) -> bool:
        return self.interpret or self.machine.bulk_copies

    @property
    def narrow_bits(self) -> int:
        return min(side.levels.low_bits for side in self.sides)

    @property
    def field(self) -> int:
        """Tokens per field of a tile, of the side with fewer bits.

        Fields of the other are longer, and cut into pieces: its field k, of which piece h, are the
        same tokens as field k * pieces + h.
        """
        return 8 * self.narrow_bits

    @property
    def fields(self) -> int:
        return tiles.TOKENS // self.field

    @property
    def fitting(self) -> int:
        """Fields that fit into the registers at a time, with as much beside them: those of a byte,
        or fewer. One demand beyond what any case has is met, each further one halves them; where
        scales of channels are for few tokens, few fields have the same queries."""
        many, wide = self.group > 8, self.head_dim > tiles.LANES
        zeros = any(side.zero and not side.high for side in self.sides)
        small = any(side.parts_off_centre and side.blocks > 2 for side in self.sides)
        tables = any(side.levels.table for side in self.sides)
        # Some are demands only where registers are few.
        demands = (
            any(side.blocks > 1 or side.shifted for side in self.sides)
            + (self.wave_rows > 0)
            + many
            + wide
            + (any(side.high for side in self.sides) and (many or wide))
            + (any(side.parts_off_centre for side in self.sides) and (many or wide))
            + 2 * (any(side.levels.long for side in self.sides) and wide)
            + (self.key.pieces != self.value.pieces and (wide or small or (many and tables)))
            + (many and (self.head_dim % ROWS > 0 or (zeros and not wide)))
            # Where threads copy, addresses take registers.
            + (not self.bulk_copies and many and wide)
        )
        most = 4 >> (1 + wide if self.scaled_by_part else 0)
        return max(1, min(8 // self.narrow_bits, most, 4 >> max(0, demands - 1)))

    @property
    def per_part(self) -> int:
        """Fields that are decoded at a time, always all pieces of a field."""
        return max(self.fitting, *(side.pieces for side in self.sides))

    @property
    def needs_totals(self) -> bool:
        """Whether something is added to all levels of a token's keys, which meets the sum of a
        query: the middle of the levels, or what codes are counted from."""
        return self.key.levels.even or (not self.key.channels and self.key.off_centre)

    @property
    def parts(self) -> int:
        return self.fields // self.per_part

    @property
    def stored_width(self) -> int:
        """Channels of a column of a tile's words in memory."""
        return min(self.head_dim, tiles.LANES)

    def low_rows(self, side: Side) -> int:
        """Of a head's words of a tile in memory, before those with third bits."""
        return self.head_dim // self.stored_width * self.field * side.pieces

    def stored_rows(self, side: Side) -> int:
        """Of a head's words of a tile in memory."""
        return self.low_rows(side) * (2 + side.high) // 2

    def width(self, side: Side) -> int:
        """Channels of a column here: no more than share a scale, or of values than are rows of an
        operand."""
        size = self.block_size(side)
        if side is self.value and size < ROWS:
            return self.stored_width
        return min(self.stored_width, size)

    def lanes(self, side: Side) -> int:
        """Channels side by side in shared memory, in up to 128 bytes, which are swizzled."""
        return math.gcd(self.width(side), ROWS)

    @property
    def query_lanes(self) -> int:
        """Likewise of queries, in up to 64 bytes."""
        return min(self.lanes(self.key), 32)

    @property
    def operands(self) -> list[Operand]:
        """Whole columns; or if they are no multiple of 64, or blocks are less, 64 rows each. The
        last ones of a column may overlap."""
        width, size = self.width(self.value), self.block_size(self.value)
        whole = width % ROWS == 0 and size >= ROWS
        count = width if whole else ROWS
        starts = [0] if whole else self.squares(width)
        return [
            Operand(column, first, count, (column * width + first) // size, max(1, count // size))
            for column in range(self.columns(self.value))
            for first in starts
        ]

    def squares(self, channels: int) -> list[int]:
        """The first channels of 64 each that cover all; the last ones may overlap."""
        return [min(first, channels - ROWS) for first in range(0, channels, ROWS)]

    def columns(self, side: Side) -> int:
        return self.head_dim // self.width(side)

    def block_size(self, side: Side) -> int:
        """Channels of a head that share a scale."""
        return self.head_dim // side.blocks

    @property
    def tiles(self) -> int:
        """Of a unit."""
        return ROWS // self.field

    @property
    def halves(self) -> int:
        """Half tiles of a unit."""
        return self.tiles * tiles.TOKENS // ROWS

    @property
    def starts_shape(self) -> tuple[int, int, int]:
        """Of cosines and sines of where half tiles start."""
        return self.halves, 2, self.wave_rows

    @property
    def turned_shape(self) -> tuple[int, int]:
        """Of cosines and sines of queries, turned to where each half tile starts."""
        return self.halves * self.group, 2 * self.wave_rows

    @property
    def wave_shape(self) -> tuple[int, int, int]:
        """Of what they add to the scores of each field."""
        return self.fields, ROWS, self.group

    def word_shape(self, side: Side) -> tuple[int, ...]:
        """Of a unit."""
        return side.pieces, self.columns(side), self.tiles, self.field, self.width(side)

    def high_shape(self, side: Side) -> tuple[int, ...]:
        """Of the words with the third bits, each of which has those of two rows."""
        return self.columns(side), self.tiles, self.field // 2, self.width(side)

    def scale_shape(self, side: Side) -> tuple[int, ...]:
        """Of a unit's tokens."""
        return self.tiles, side.blocks, tiles.TOKENS

    @property
    def channel_shape(self) -> tuple[int, int, int]:
        """Of a unit's scales of channels: those of each tile, and more where the next unit's would
        not begin at a multiple of what copies go to."""
        groups = self.key.groups
        even = COPY_ALIGNMENT // math.gcd(COPY_ALIGNMENT, 2 * groups * self.head_dim)
        return -(-self.tiles // even) * even, groups, self.head_dim

    @property
    def group_tokens(self) -> int:
        """That share the scales of channels."""
        return tiles.TOKENS // self.key.groups

    @property
    def segments(self) -> int:
        """Of the 64 rows of a field, with scales of channels for themselves."""
        return ROWS // min(self.field, self.group_tokens)

    @property
    def key_shares(self) -> int:
        """Of the 64 rows of a field, with columns of queries for themselves."""
        return self.segments if self.key.channels else 1

    @property
    def fields_of_set(self) -> int:
        """Fields whose segments have the same scales of channels."""
        return max(1, self.group_tokens // self.field)

    @property
    def sets(self) -> int:
        """Of scales of channels, in a part."""
        return max(1, self.per_part // self.fields_of_set)

    @property
    def scaled_by_part(self) -> bool:
        """Whether queries meet the scales of channels part by part, not once for a unit."""
        return self.key.groups > 1

    @property
    def scaled_shape(self) -> tuple[int, int, int]:
        """Of queries with scales of channels."""
        return self.sets, self.segments * self.group, self.head_dim

    @property
    def shift_shape(self) -> tuple[int, int, int]:
        """Of what these add whatever the codes are, in parts that sum to it."""
        return self.sets, self.segments * self.group, ROWS

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the fields of a part, for each block of values."""
        return self.per_part, self.value.blocks * self.group, ROWS

    @property
    def exchange_shape(self) -> tuple[int, int, int]:
        """Of sums and maxima over the rows that warps have, in two places."""
        return 2, WARPS, self.group

    @property
    def arriving(self) -> list[int]:
        """Bytes of codes and scales that are copied for a unit, buffer by buffer."""
        buffers = [2 * math.prod(self.channel_shape)] * self.key.channel_arrays
        for side in self.sides:
            buffers.append(2 * math.prod(self.word_shape(side)))
            buffers += [2 * math.prod(self.high_shape(side))] * side.high
            buffers += [2 * math.prod(self.scale_shape(side))] * side.token_arrays
        return buffers

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a program takes."""
        buffers = [self.stages * size for size in self.arriving]
        buffers += [2 * self.group * self.head_dim, 4 * math.prod(self.exchange_shape)]
        aligned = lambda *sizes: sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        turned = 0
        if self.wave_rows:
            buffers.append(4 * self.stages * math.prod(self.starts_shape))
            buffers.append(4 * math.prod(self.wave_shape))
            turned = aligned(2 * math.prod(self.turned_shape))
        scaled = aligned(
            2 * math.prod(self.scaled_shape) * self.key.channels,
            2 * math.prod(self.shift_shape) * self.key.shifted,
        )
        weights = aligned(2 * math.prod(self.weight_shape))
        in_turn = (turned, scaled, weights) if self.scaled_by_part else (turned, scaled + weights)
        barriers = 8 * (1 + self.stages) * self.bulk_copies
        return aligned(*buffers) + max(in_turn) + barriers

    @property
    def programs(self) -> int:
        """That run on a multiprocessor at a time, as far as its memory goes; 0 if none fits."""
        return self.machine.shared_memory // (self.shared_bytes + 2**10)

    @property
    def slots(self) -> int:
        """Programs that run at a time, as far as registers go, too: no more than compilers were
        found to leave room for."""
        small = self.head_dim <= ROWS and self.group <= 8 and not self.wave_rows
        small = small and not any(side.high for side in self.sides)
        small = small and not (self.key.pieces != self.value.pieces and self.key.parts_off_centre)
        many = self.narrow_bits == 2 or any(side.levels.table for side in self.sides)
        if self.machine.capability[0] != 9:  # where compilers take more for long polynomials
            many = many or any(side.levels.polynomial is None for side in self.sides)
        if self.group > 8 or self.key.pieces != self.value.pieces:
            many = many or any(side.zero for side in self.sides)
        room = 2 if (many and not small) or self.head_dim > tiles.LANES else 3
        return self.machine.multiprocessors * max(1, min(self.programs, room))


def make_plan(
    group: int, key: TiledCodes, value: TiledCodes, soft_cap: float | None, interpret
) -> Plan:
    """For `group` query heads per KV head."""
    head_dim, num_tiles = key.head_dim, min(key.num_tiles, value.num_tiles)
    widths = [Levels(codes.codebook).low_bits for codes in (key, value)]
    narrow = min(widths)

    def side(codes: TiledCodes) -> Side:
        levels = Levels(codes.codebook)
        return Side(
            levels=levels,
            num_tiles=codes.num_tiles,
            pieces=levels.low_bits // narrow,
            heads=max(1, codes.block_size // head_dim),
            blocks=codes.blocks_per_head,
            zero=codes.zero is not None,
            channels=codes.per_channel,
            groups=codes.groups,
        )

    sides = side(key), side(value)
    # Where a field at a time would not fit.
    wide = head_dim > tiles.LANES
    few = any(side.parts_off_centre for side in sides) and (wide or max(widths) > narrow)
    few = few or (wide and any(side.blocks > 4 for side in sides))
    few = few or (wide and key.waves is not None and narrow == 2)
    chunks = -(-group // (FEW_QUERY_HEADS if few else QUERY_HEADS))
    plan = Plan(
        head_dim=head_dim,
        chunks=chunks,
        group=-(-group // (8 * chunks)) * 8,
        num_tiles=num_tiles,
        splits=1,
        stages=2,  # one is decoded while the next one is on its way
        key=sides[0],
        value=sides[1],
        wave_rows=0 if key.waves is None else -(-key.waves.width // (2 * ROWS)) * ROWS,
        soft_cap=soft_cap,
        machine=machine(),
        interpret=interpret is not None,
    )
    # Two programs that wait in turn, for memory and for products, should do more than one that does
    # not wait for memory (not measured). What fits with one stage only has that.
    single = dataclasses.replace(plan, stages=1)
    if plan.programs < max(1, min(2, single.programs)):
        plan = single
    splits = number_of_splits(
        heads=key.words.shape[0] * key.num_heads * chunks,
        units=-(-num_tiles // plan.tiles),
        slots=plan.slots,
    )
    return dataclasses.replace(plan, splits=splits)
