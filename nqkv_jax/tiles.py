"""Codes of 128 tokens in 16-bit words: the layout that fused kernels read on every platform.

Of one head, code (token t, channel d) of a tile is in word (t % R, d), in its field t // R. A word
has 16 / b fields of b bits, the first in the lowest bits, so R = 8 b. Neighbouring channels are in
neighbouring words: words are loaded in whole vectors, and what a shift and a mask leave of them are
tokens [field * R, (field + 1) * R), all channels, in order.

3-bit codes are a 2-bit tile (R = 16) of their low bits, followed by 8 rows of their high bits: word
(r, d) of these has the high bits of the codes in words (r, d), in its lower byte, and (r + 8, d).
Four fields of low bits are a byte; their high bits are every other one of a byte (`high_bit`), so
that one shift brings all four above their low bits.

The words [R, head_dim] are stored as rows of 128: row by row if head_dim < 128, and in columns of
128 channels, one after the other, if head_dim is a multiple of 128. That is the shape which TPUs
load without padding; on other platforms it is a free reshape.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax import packing

TOKENS = 128
LANES = 128
BITS = (2, 3, 4, 8)


def num_rows(head_dim: int, bits: int) -> int:
    """Rows of 128 words that a tile of one head takes."""
    return head_dim * bits // 16


def check(head_dim: int, bits: int) -> None:
    """Raises ValueError if there is no tile of this shape."""
    if bits not in BITS:
        raise ValueError(f"tiles: expected bits to be one of {BITS}; got {bits}")
    if head_dim % 16 or (head_dim > LANES and head_dim % LANES):
        raise ValueError(
            f"tiles: expected head_dim to be a multiple of 16, above 128 one of 128; got {head_dim}"
        )


def high_bit(field: int | jax.Array) -> int | jax.Array:
    """Of 3 bits, which bit of a byte is that of a field of the low bits."""
    return 2 * (field & 3) + (field >> 2)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """int16[heads, rows, 128] from the codes u8[128, heads, head_dim] of one tile.

    Raises: ValueError if there is no such tile.
    """
    tokens, _, head_dim = codes.shape
    if tokens != TOKENS:
        raise ValueError(f"tiles: a tile has {TOKENS} tokens; got codes {codes.shape}")
    check(head_dim, bits)
    codes = jnp.moveaxis(codes, 0, 1)  # [heads, tokens, head_dim]
    if bits == 3:
        low, high = codes & jnp.uint8(3), codes >> jnp.uint8(2)
        words = [_words(low, 2), _words(_in_bytes(high), 1)]
    else:
        words = [_words(codes, bits)]
    rows = jnp.concatenate([_to_rows(w) for w in words], axis=1)
    return jax.lax.bitcast_convert_type(rows, jnp.int16)


def unpack(words: jax.Array, bits: int, head_dim: int) -> jax.Array:
    """u8[128, heads, head_dim]: the codes in the words int16[heads, rows, 128] of one tile."""
    words = jax.lax.bitcast_convert_type(words, jnp.uint16)
    codes_of = lambda rows, bits: packing.unpack(_from_rows(rows, head_dim), bits, TOKENS, axis=1)
    if bits == 3:
        low, high = jnp.split(words, [num_rows(head_dim, 2)], axis=1)
        high = _in_fields(codes_of(high, 1))
        codes = codes_of(low, 2) | (high << jnp.uint8(2))
    else:
        codes = codes_of(words, bits)
    return jnp.moveaxis(codes, 1, 0)


def write_token(
    words: jax.Array, codes: jax.Array, token: jax.Array, bits: int, keep: jax.Array
) -> jax.Array:
    """The tiles `words` int16[tiles, heads, rows, 128] of one sequence, in which the token i32[]
    has the codes u8[heads, head_dim], if `keep` bool[]. Of each word only its bits are written."""
    tile, place = divmod(token, TOKENS)
    head_dim = codes.shape[1]
    width = min(head_dim, LANES)
    # Rows of 128 words that have those of one row of a plane.
    span = 1 if LANES % width == 0 else 2
    last, zero = words.shape[2] - span, jnp.zeros_like(tile)

    lane = jnp.arange(span * LANES)
    for plane in planes(place, bits, head_dim):
        part, shift = plane.of(codes).astype(jnp.int16), plane.shift.astype(jnp.int16)
        for column, new in enumerate(jnp.split(part, head_dim // width, axis=1)):
            first = plane.element(jnp.int32(column * width))
            stored = jnp.minimum(first // LANES, last)
            channel = lane + (stored * LANES - first)
            if span == 1:
                new = jnp.tile(new, (1, LANES // width))
            else:
                new = new[:, jnp.clip(channel, 0, width - 1)]
            mask = jnp.int16(plane.field) << shift
            mask = jnp.where(keep & (channel >= 0) & (channel < width), mask, 0)
            window = lambda a: a.astype(jnp.int16).reshape(1, -1, span, LANES)
            at = jnp.stack([tile, zero, stored, zero])
            words = update(words, at, window(new << shift), window(mask))
    return words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plane:
    """Where words have one token's low bits, or of 3 bits the high one; see `planes`."""

    bits: int
    drop: int  # bits of a code below these
    begin: int  # words of a head before the plane
    rows: int  # of head_dim words each
    head_dim: int
    row: jax.Array  # i32[], the token's
    shift: jax.Array  # i32[], of its bits in each word of the row

    @property
    def field(self) -> int:
        return 2**self.bits - 1

    def of(self, codes: jax.Array) -> jax.Array:
        """The bits of `codes` that the plane has, and above them others of theirs."""
        return codes >> jnp.asarray(self.drop, codes.dtype) if self.drop else codes

    def element(self, channel: jax.Array) -> jax.Array:
        """i32[...], the numbers of the words of channels i32[...] among those of a head."""
        width = min(self.head_dim, LANES)
        column = jax.lax.div(channel, jnp.full_like(channel, width))
        return self.begin + (column * (self.rows - 1) + self.row) * width + channel


def planes(place: jax.Array, bits: int, head_dim: int) -> list[Plane]:
    """Of the token at place i32[] of a tile."""
    div = lambda a, n: jax.lax.div(a, jnp.int32(n))
    low = 2 if bits == 3 else bits
    rows = 8 * low
    field = div(place, rows)
    row = place - field * rows
    plane = lambda **kwargs: Plane(head_dim=head_dim, **kwargs)
    found = [plane(bits=low, drop=0, begin=0, rows=rows, row=row, shift=field * low)]
    if bits == 3:
        half = div(row, 8)
        found.append(plane(
            bits=1, drop=low, begin=rows * head_dim, rows=8, row=row - half * 8,
            shift=half * 8 + high_bit(field),
        ))  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of a sequence, of which those that are fresh are to be written, and the
    tiles that have them; see `span`."""

    first: jax.Array  # i32[], of the tokens
    tile: jax.Array  # i32[], the first of the tiles
    fresh: jax.Array  # bool[tiles, 128]

    def spread(self, a: jax.Array, unit: int = 1) -> jax.Array:
        """[tiles, 128 / unit, ...]: what `a` [size / unit, ...] has of each `unit` of the tokens,
        in its place in the tiles; elsewhere 0."""
        size, per_tile = a.shape[0], TOKENS // unit
        room = len(self.fresh) * per_tile
        # Not indexed by the token: on a CPU that takes several times as long.
        padding = [(room, max(room - size, 0)), *[(0, 0)] * (a.ndim - 1)]
        a = jax.lax.optimization_barrier(jnp.pad(a, padding))
        ahead = (self.tile * TOKENS - self.first) // unit
        a = jax.lax.dynamic_slice_in_dim(a, room + ahead, room)
        return a.reshape(-1, per_tile, *a.shape[1:])


def span(first: jax.Array, last: jax.Array, size: int, *, step: int, num_tiles: int) -> Span:
    """Of the tokens first + [0, size), those below `last`, both i32[], are fresh.

    `first` and `size` are multiples of `step`, a divisor of 128; the sequence has `num_tiles`.
    """
    count = min((size + 2 * TOKENS - 1 - step) // TOKENS, num_tiles)
    tile = jnp.clip(first // TOKENS, 0, num_tiles - count)
    token = (tile * TOKENS + jnp.arange(count * TOKENS)).reshape(count, TOKENS)
    fresh = (token >= first) & (token < jnp.minimum(first + size, last))
    return Span(first=first, tile=tile, fresh=fresh)


@jax.custom_batching.custom_vmap
def update(array: jax.Array, at: jax.Array, new: jax.Array, mask: jax.Array) -> jax.Array:
    """`array` with the bits of `new` under `mask`, from `at` i32[axes] on, in place.

    `mask` has a shape that broadcasts to that of `new`, and integers of its width; 0 leaves all as
    it is.
    """
    # Read and written in one fusion, the whole array would be copied.
    old = jax.lax.optimization_barrier(jax.lax.dynamic_slice(array, at, new.shape))
    bits = lambda a: jax.lax.bitcast_convert_type(a, mask.dtype)
    merged = (bits(old) & ~mask) | (bits(new) & mask)
    merged = jax.lax.bitcast_convert_type(merged, array.dtype)
    return jax.lax.dynamic_update_slice(array, merged, at)


@update.def_vmap
def _update_batch(size, batched, *arguments):
    # Batched, reading becomes a gather, for which a TPU would bring the whole array into another
    # layout. On a GPU a loop takes a launch for each round.
    arguments = [
        a if b else jnp.broadcast_to(a, (size, *a.shape))
        for a, b in zip(arguments, batched, strict=True)
    ]

    def in_turn(array, at, new, mask):
        def one(i, array):
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1)
            start = jnp.concatenate([jnp.asarray(i, at.dtype)[None], cut(at)[0]])
            return update(array, start, cut(new), cut(mask))

        return jax.lax.fori_loop(0, size, one, array)

    together = jax.vmap(update.fun)
    gpus = dict(cuda=together, rocm=together)
    return jax.lax.platform_dependent(*arguments, **gpus, default=in_turn), True


def put(array: jax.Array, at: jax.Array, new: jax.Array, fresh: jax.Array) -> jax.Array:
    """Like `update`, of whole elements: those of `new` that are `fresh` bool[...]."""
    mask = jnp.where(fresh, -1, 0).astype(f"int{8 * array.dtype.itemsize}")
    return update(array, at, new, mask)


def _words(codes: jax.Array, bits: int) -> jax.Array:
    return packing.pack(codes, bits, jnp.uint16, axis=1)


def _in_bytes(bits: jax.Array) -> jax.Array:
    """Tokens [heads, 128, ...] of fields, in the order in which words have their high bits."""
    fields = bits.reshape(bits.shape[0], 2, 4, 2, 8, -1)  # byte of low bits, field, half, row
    return jnp.moveaxis(fields, (3, 2, 1), (1, 2, 3)).reshape(bits.shape)


def _in_fields(bits: jax.Array) -> jax.Array:
    """The inverse of `_in_bytes`."""
    fields = bits.reshape(bits.shape[0], 2, 4, 2, 8, -1)  # half, field, byte of low bits, row
    return jnp.moveaxis(fields, (1, 2, 3), (3, 2, 1)).reshape(bits.shape)


def _to_rows(words: jax.Array) -> jax.Array:
    heads, rows, head_dim = words.shape
    if head_dim > LANES:
        words = jnp.swapaxes(words.reshape(heads, rows, -1, LANES), 1, 2)
    return words.reshape(heads, -1, LANES)


def _from_rows(words: jax.Array, head_dim: int) -> jax.Array:
    heads = words.shape[0]
    if head_dim <= LANES:
        return words.reshape(heads, -1, head_dim)
    columns = words.reshape(heads, head_dim // LANES, -1, LANES)
    return jnp.swapaxes(columns, 1, 2).reshape(heads, -1, head_dim)
