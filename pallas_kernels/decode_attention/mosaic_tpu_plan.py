"""How the TPU kernel cuts its work: what is static about a call."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_levels import Levels

# A step costs a few hundred cycles whatever it does, so it should be long; its words are in VMEM
# twice (16 MB on the smallest chips), as the next step's are fetched meanwhile.
TILES_PER_STEP = 8
STEP_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Side:
    """What is static about keys or values."""

    codes: TiledCodes  # its arrays are not touched
    levels: Levels

    @property
    def blocks(self) -> int:
        return self.codes.blocks_per_head

    @property
    def num_arrays(self) -> int:
        """Scale, and zero if there is one."""
        return 1 + (self.codes.zero is not None)


@dataclasses.dataclass(frozen=True)
class Plan:
    head_dim: int
    group: int  # query heads per KV head, padded to whole registers
    step: int  # tiles
    key: Side
    value: Side
    soft_cap: float | None

    @property
    def fold(self) -> int:
        """Tokens in a row of 128 lanes, and tiles in a unit."""
        return max(1, tiles.LANES // self.head_dim)

    @property
    def lanes(self) -> int:
        return max(tiles.LANES, self.head_dim)

    @property
    def units(self) -> int:
        return self.step // self.fold

    @property
    def rows(self) -> int:
        """Rows of scores: places in a row of words, times queries."""
        return self.fold * self.group

    def scratch(self, side: Side) -> tuple[int, ...]:
        """The shape of a step's scales, as they meet scores, or queries."""
        if side.codes.per_channel:
            return self.step, side.codes.scale.shape[2], self.lanes
        return self.fold, self.units, side.codes.scale.shape[2], tiles.LANES

    def token(self, row: int) -> jax.Array:
        """i32[1, 128]: the token, in its unit, of each lane of scores in a row of one place."""
        return self.fold * jax.lax.broadcasted_iota(jnp.int32, (1, tiles.LANES), 1) + row

    def of_own_group(self, parts: list[jax.Array]) -> jax.Array:
        """[rows, 128] of parts for each group of a unit, whose tokens are in lanes side by side."""
        lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
        found = parts[0]
        for n, part in enumerate(parts[1:], start=1):
            found = jnp.where(lane >= n * (tiles.LANES // len(parts)), part, found)
        return found


def make_plan(q: jax.Array, key: TiledCodes, value: TiledCodes, soft_cap: float | None) -> Plan:
    dtype = jnp.dtype(jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32)
    units = _has_bfloat16_units()
    sides = [
        Side(_shapes(s), Levels(s.codebook, dtype, Levels.can_pair(s, dtype, units)))
        for s in (key, value)
    ]
    fold = max(1, tiles.LANES // key.head_dim)
    per_tile = sum(math.prod(side.words.shape[2:]) * 2 for side in (key, value))
    num_tiles = min(key.num_tiles, value.num_tiles)
    step = max(1, min(TILES_PER_STEP, STEP_BYTES // per_tile, num_tiles) // fold) * fold
    return Plan(key.head_dim, -(-q.shape[2] // 8) * 8, step, *sides, soft_cap)


def _shapes(codes: TiledCodes) -> TiledCodes:
    """Without arrays: what a kernel may close over."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), codes)


def _has_bfloat16_units() -> bool:
    try:
        return pltpu.get_tpu_info().generation >= 6
    except ValueError:  # traced without a TPU: what runs on all of them
        return False
