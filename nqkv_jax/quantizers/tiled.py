"""Blocks of 128 tokens in the layout that fused kernels read, filled at once or token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels import append_token, triton_backend
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.quantizers.base import Context, Payload, Quantizer
from nqkv_jax.quantizers.block import BlockQuantizer, check_group
from nqkv_jax.quantizers.nsn import NSNQuantizer
from nqkv_jax.quantizers.tiled_vectors import TiledNSN
from nqkv_jax.quantizers.transforms import Transformed
from nqkv_jax.tiles import TOKENS
from nqkv_jax.vector_codebooks import LENGTH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledPayload:
    """One tile: what `BlockPayload` holds of 128 tokens, bit for bit, in another order."""

    words: jax.Array  # int16[heads, rows, 128]: see `nqkv_jax.tiles`
    # scale_dtype [blocks, 128], or [heads * groups, head_dim] of channels, which have one for each
    # group of tokens; for float16 its bits, as int16
    scale: jax.Array
    zero: jax.Array | None = None  # like scale; min-max only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledQuantizer(Quantizer):
    """Encodes 128 tokens with `inner`: each by itself, or in groups with a block per channel."""

    inner: BlockQuantizer = dataclasses.field(metadata={"static": True})

    @property
    def group(self) -> int:
        return TOKENS

    @property
    def step(self) -> int:
        return TOKENS if self._per_channel else 1

    def check(self, heads: int, head_dim: int) -> None:
        self.inner.check(heads, head_dim)
        tiles.check(head_dim, self.inner.codebook.bits)

    def quantize(self, x: jax.Array, context: Context) -> TiledPayload:
        check_group("TiledQuantizer", x, self.group)
        encode = jax.vmap(self.inner.encode) if self._per_channel else self.inner.encode
        codes, scale, zero = encode(self._apart(x))
        words = tiles.pack(codes.reshape(x.shape), self.inner.codebook.bits)
        zero = None if zero is None else self._store(zero)
        return TiledPayload(words=words, scale=self._store(scale), zero=zero)

    def splice(
        self, body: TiledPayload, x: jax.Array, first: jax.Array, last: jax.Array, context: Context
    ) -> TiledPayload:
        if x.shape[0] == 1:
            return self._append_token(body, x, first, first < last, context.implementation)
        bits, size = self.inner.codebook.bits, x.shape[0]
        codes, scale, zero = self.inner.encode(x)
        # In all tiles that have some of the tokens.
        num_tiles, start = body.words.shape[0], jnp.zeros_like(first)
        count = min((size + TOKENS - 2) // TOKENS + 1, num_tiles)
        begin, room = jnp.clip(first // TOKENS, 0, num_tiles - count), count * TOKENS
        token = (begin * TOKENS + jnp.arange(room)).reshape(count, TOKENS)
        fresh = (token >= first) & (token < jnp.minimum(first + size, last))
        pack = jax.vmap(lambda codes: tiles.pack(codes, bits))

        def in_place(a):
            """[count, 128, ...], of tokens [size, ...]."""
            # Not indexed by the token: on a CPU that takes several times as long.
            padding = [(room, max(room - size, 0)), *[(0, 0)] * (a.ndim - 1)]
            a = jax.lax.optimization_barrier(jnp.pad(a, padding))
            a = jax.lax.dynamic_slice_in_dim(a, room + begin * TOKENS - first, room)
            return a.reshape(count, TOKENS, *a.shape[1:])

        mask = jnp.where(fresh, 2**bits - 1, 0).astype(jnp.uint8)[..., None, None]
        mask = pack(jnp.broadcast_to(mask, (count, TOKENS, 1, x.shape[2])))  # of all heads
        at = jnp.stack([begin, start, start, start])
        words = tiles.update(body.words, at, pack(in_place(codes)), mask)
        stored = lambda a: jnp.swapaxes(in_place(self._store(a).T), 1, 2)
        put = functools.partial(_put, tile=begin, place=start, fresh=fresh[:, None])
        zero = None if zero is None else put(body.zero, stored(zero))
        return TiledPayload(words=words, scale=put(body.scale, stored(scale)), zero=zero)

    def _append_token(
        self, body: TiledPayload, x: jax.Array, token: jax.Array, keep: jax.Array,
        implementation: str,
    ) -> TiledPayload:  # fmt: skip
        """`body` with x [1, heads, head_dim] in the place of `token`, if `keep`."""

        def by_xla(body, x, token, keep):
            codes, scale, zero = self.inner.encode(x)
            # In the words of its row, and not of a tile.
            words = tiles.write_token(body.words, codes[0], token, self.inner.codebook.bits, keep)
            tile, place = divmod(token, TOKENS)
            put = functools.partial(_put, tile=tile, place=place, fresh=keep[None, None, None])
            stored = lambda a: self._store(a)[None]
            zero = None if zero is None else put(body.zero, stored(zero))
            return TiledPayload(words=words, scale=put(body.scale, stored(scale)), zero=zero)

        def by_kernel(body, x, token, keep):
            words, scale, zero = append_token.append_token(
                body.words, body.scale, body.zero, x[0], token, keep,
                encode=self.inner.encode_blocks, bits=self.inner.codebook.bits,
                block_size=self.inner.block_size,
            )  # fmt: skip
            return TiledPayload(words=words, scale=scale, zero=zero)

        asked = self.kernel_appends and implementation in triton_backend.ASKING
        platforms = append_token.PLATFORMS if asked else ()
        by_platform = dict.fromkeys(platforms, by_kernel)
        arguments = (body, x, token, keep)
        if not by_platform:
            return by_xla(*arguments)
        return jax.lax.platform_dependent(*arguments, **by_platform, default=by_xla)

    def dequantize(self, payload: TiledPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        bits = self.inner.codebook.bits
        head_dim = payload.words.shape[1] * 16 // bits
        codes = tiles.unpack(payload.words, bits, head_dim)
        load = functools.partial(self._load, heads=codes.shape[1])
        zero = None if payload.zero is None else load(payload.zero)
        decode = functools.partial(self.inner.decode, dtype=dtype)
        decode = jax.vmap(decode) if self._per_channel else decode
        return decode(self._apart(codes), load(payload.scale), zero).reshape(codes.shape)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes:
        return TiledCodes(
            words=body.words, scale=body.scale, zero=body.zero, codebook=self.inner.codebook,
            per_channel=self._per_channel,
        )  # fmt: skip

    @property
    def kernel_appends(self) -> bool:
        """Whether `append_token` can encode a token: see `BlockQuantizer.encode_blocks`."""
        codebook = self.inner.codebook
        return (
            triton_backend.missing() is None
            and not self._per_channel
            and self.inner.scale != "rms"
            and (codebook.bits <= 4 or codebook.is_even)
            and self.inner.block_size <= append_token.MOST
        )

    @property
    def _per_channel(self) -> bool:
        return self.inner.axis == "tokens"

    def _apart(self, x: jax.Array) -> jax.Array:
        """Of tokens [128, ...], those that are encoded together along an axis of their own."""
        return x.reshape(-1, self.inner.group, *x.shape[1:]) if self._per_channel else x

    def _store(self, scale: jax.Array) -> jax.Array:
        if self._per_channel:  # [groups, heads, head_dim]
            scale = jnp.swapaxes(scale, 0, 1).reshape(-1, scale.shape[2])
        else:
            scale = scale.T
        if scale.dtype == jnp.float16:
            scale = jax.lax.bitcast_convert_type(scale, jnp.int16)
        return scale

    def _load(self, scale: jax.Array, heads: int) -> jax.Array:
        if scale.dtype == jnp.int16:
            scale = jax.lax.bitcast_convert_type(scale, jnp.float16)
        if self._per_channel:
            return jnp.swapaxes(scale.reshape(heads, -1, scale.shape[1]), 0, 1)
        return scale.T


def _put(
    old: jax.Array, new: jax.Array, *, tile: jax.Array, place: jax.Array, fresh: jax.Array
) -> jax.Array:
    """Scales `old` [tiles, blocks, 128], with those of `new`, from a tile and a place on, that are
    `fresh`."""
    mask = jnp.where(fresh, -1, 0).astype(f"int{8 * old.dtype.itemsize}")
    return tiles.update(old, jnp.stack([tile, jnp.zeros_like(tile), place]), new, mask)


def in_tiles(quantizer: Quantizer, tokens: int, heads: int, head_dim: int) -> Quantizer:
    """`quantizer` in tiles, if it can be for chunks of `tokens`; else as it is.

    Tiles take the same bits and decode to the same values, and kernels can read them.
    """
    if isinstance(quantizer, Transformed):
        inner = in_tiles(quantizer.inner, tokens, heads, head_dim)
        return dataclasses.replace(quantizer, inner=inner)
    if isinstance(quantizer, NSNQuantizer) and not tokens % TOKENS:
        fits = TOKENS % quantizer.window == 0 and head_dim >= 2 * LENGTH
        return TiledNSN(quantizer) if fits else quantizer
    if type(quantizer) is not BlockQuantizer:
        return quantizer
    whole = quantizer.block_size % head_dim == 0 or head_dim % quantizer.block_size == 0
    if quantizer.axis == "tokens":
        whole = TOKENS % quantizer.block_size == 0
    try:
        tiles.check(head_dim, quantizer.codebook.bits)
    except ValueError:
        return quantizer
    tiled = TiledQuantizer(quantizer)
    return tiled if whole and not tokens % tiled.step else quantizer
