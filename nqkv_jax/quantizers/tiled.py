"""Blocks in tiles of 128 tokens, the layout that fused kernels read, filled little by little."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels import append_token, triton_backend
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes
from nqkv_jax.quantizers.base import Context, Payload, Quantizer
from nqkv_jax.quantizers.block import BlockQuantizer, check_group
from nqkv_jax.quantizers.hqq import HQQQuantizer
from nqkv_jax.quantizers.nsn import NSNQuantizer
from nqkv_jax.quantizers.squat import QueryAware
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

    inner: BlockQuantizer | HQQQuantizer = dataclasses.field(metadata={"static": True})

    @property
    def group(self) -> int:
        return TOKENS

    @property
    def step(self) -> int:
        return self.inner.group

    def check(self, heads: int, head_dim: int) -> None:
        self.inner.check(heads, head_dim)
        tiles.check(head_dim, self.inner.codebook.bits)

    def quantize(self, x: jax.Array, context: Context) -> TiledPayload:
        check_group("TiledQuantizer", x, self.group)
        codes, scale, zero = self._encode(x)
        words = tiles.pack(codes, self.inner.codebook.bits)
        zero = None if zero is None else self._store(zero)
        return TiledPayload(words=words, scale=self._store(scale), zero=zero)

    def splice(
        self, body: TiledPayload, x: jax.Array, first: jax.Array, last: jax.Array, context: Context
    ) -> TiledPayload:
        if x.shape[0] == 1:
            return self._append_token(body, x, first, first < last, context.implementation)
        bits, step = self.inner.codebook.bits, self.step
        codes, scale, zero = self._encode(x)
        num_tiles = body.words.shape[0]
        span = tiles.span(first, last, x.shape[0], step=step, num_tiles=num_tiles)
        pack = jax.vmap(lambda codes: tiles.pack(codes, bits))
        mask = jnp.where(span.fresh, 2**bits - 1, 0).astype(jnp.uint8)[..., None, None]
        mask = pack(jnp.broadcast_to(mask, (*span.fresh.shape, 1, x.shape[2])))  # of all heads
        at = jnp.stack([span.tile, *[jnp.zeros_like(first)] * 3])
        words = tiles.update(body.words, at, pack(span.spread(codes)), mask)
        fresh = span.fresh[:, None]
        if self._per_channel:  # [tiles, heads * groups, 1]
            fresh = jnp.tile(span.fresh[:, ::step, None], (1, x.shape[1], 1))
        stored = lambda a: jax.vmap(self._store)(span.spread(a, step))
        put = lambda old, a: tiles.put(old, at[:3], stored(a), fresh)
        zero = None if zero is None else put(body.zero, zero)
        return TiledPayload(words=words, scale=put(body.scale, scale), zero=zero)

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
            at = jnp.stack([tile, jnp.zeros_like(tile), place])
            put = lambda old, a: tiles.put(old, at, self._store(a)[None], keep[None, None, None])
            zero = None if zero is None else put(body.zero, zero)
            return TiledPayload(words=words, scale=put(body.scale, scale), zero=zero)

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

    def round_trip(self, x: jax.Array, context: Context) -> jax.Array:
        codes, scale, zero = self._encode(x)
        return self._decode(codes, scale, zero)

    def dequantize(self, payload: TiledPayload, context: Context, dtype=jnp.float32) -> jax.Array:
        bits = self.inner.codebook.bits
        head_dim = payload.words.shape[1] * 16 // bits
        codes = tiles.unpack(payload.words, bits, head_dim)
        load = functools.partial(self._load, heads=codes.shape[1])
        zero = None if payload.zero is None else load(payload.zero)
        return self._decode(codes, load(payload.scale), zero, dtype)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes:
        return TiledCodes(
            words=body.words, scale=body.scale, zero=body.zero, codebook=self.inner.codebook,
            per_channel=self._per_channel,
        )  # fmt: skip

    @property
    def kernel_appends(self) -> bool:
        """Whether `append_token` can encode a token: see `BlockQuantizer.encode_blocks`."""
        return (
            triton_backend.missing() is None
            and isinstance(self.inner, BlockQuantizer)
            and not self._per_channel
            and self.inner.scale != "rms"
            and not self.inner.codebook.is_searched
            and self.inner.block_size <= append_token.MOST
        )

    @property
    def _per_channel(self) -> bool:
        return self.inner.axis == "tokens"

    def _encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Like `BlockQuantizer.encode`, of several groups of tokens: scales of channels are
        [groups, heads, head_dim]."""
        encode = jax.vmap(self.inner.encode) if self._per_channel else self.inner.encode
        codes, scale, zero = encode(self._apart(x))
        return codes.reshape(x.shape), scale, zero

    def _decode(self, codes, scale, zero, dtype=jnp.float32) -> jax.Array:
        """The inverse of `_encode`."""
        decode = functools.partial(self.inner.decode, dtype=dtype)
        decode = jax.vmap(decode) if self._per_channel else decode
        return decode(self._apart(codes), scale, zero).reshape(codes.shape)

    def _apart(self, x: jax.Array) -> jax.Array:
        """Of tokens [..., heads, head_dim], those that are encoded together along an axis of their
        own."""
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


def in_tiles(quantizer: Quantizer, tokens: int, heads: int, head_dim: int) -> Quantizer:
    """`quantizer` in tiles, if it can be for chunks of `tokens`; else as it is.

    Tiles take the same bits and decode to the same values, and kernels can read them.
    """
    if isinstance(quantizer, Transformed | QueryAware):
        inner = in_tiles(quantizer.inner, tokens, heads, head_dim)
        return dataclasses.replace(quantizer, inner=inner)
    if isinstance(quantizer, NSNQuantizer):
        fits = TOKENS % quantizer.window == 0 and head_dim >= 2 * LENGTH
        return TiledNSN(quantizer) if fits and not tokens % quantizer.window else quantizer
    if not isinstance(quantizer, BlockQuantizer | HQQQuantizer):
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
