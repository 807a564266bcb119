"""Windows of vector codes in tiles of 128 tokens, the layout that fused kernels read."""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention import vectors
from nqkv_jax.pallas_kernels.decode_attention.vectors import VectorCodes
from nqkv_jax.quantizers.base import Context, Payload, Quantizer
from nqkv_jax.quantizers.block import check_group
from nqkv_jax.quantizers.nsn import FourBits, NSNKeys, NSNPayload, NSNQuantizer
from nqkv_jax.rotary import RotaryAngles
from nqkv_jax.vector_codebooks import normal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledNSNPayload:
    """One tile: what the `NSNPayload` of each window holds, bit for bit, in another order."""

    words: jax.Array  # int16[heads, rows, 128]: see `VectorCodes`
    scale: jax.Array  # int16[heads, 128], the bits of float16
    norms: FourBits | None  # [windows, heads, ...]
    mean: FourBits  # [windows, heads, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledNSN(Quantizer):
    """Encodes the windows among 128 tokens with `inner`, each by itself."""

    inner: NSNQuantizer = dataclasses.field(metadata={"static": True})

    @property
    def rotates(self) -> bool:
        return self.inner.rotates

    @property
    def group(self) -> int:
        return tiles.TOKENS

    @property
    def step(self) -> int:
        return self.inner.window

    @property
    def _windows(self) -> int:
        return tiles.TOKENS // self.inner.window

    def check(self, heads: int, head_dim: int) -> None:
        self.inner.check(heads, head_dim)

    def quantize(self, x: jax.Array, context: Context) -> TiledNSNPayload:
        check_group("TiledNSN", x, self.group)
        return self._in_line(self._map(self.inner.quantize, self._split(x), context))

    def splice(
        self, body: TiledNSNPayload, x: jax.Array, first: jax.Array, last: jax.Array,
        context: Context,
    ) -> TiledNSNPayload:  # fmt: skip
        step = self.step
        span = tiles.span(first, last, x.shape[0], step=step, num_tiles=body.words.shape[0])
        payload = self._map(self.inner.quantize, self._split(x), context)
        payload = jax.tree.map(lambda a: span.spread(a, step), payload)

        def put(old, new, fresh):
            at = jnp.stack([span.tile, *[jnp.zeros_like(first)] * (old.ndim - 1)])
            return tiles.put(old, at, new, fresh)

        new = jax.vmap(self._in_line)(payload)
        windows = span.fresh[:, ::step]
        of_windows = lambda a: jnp.expand_dims(windows, range(2, a.ndim))
        of_tokens = lambda a: jnp.expand_dims(span.fresh, range(1, a.ndim - 1))
        fresh = jax.tree.map(of_windows, new)
        fresh = dataclasses.replace(fresh, words=of_tokens(new.words), scale=of_tokens(new.scale))
        return jax.tree.map(put, body, new, fresh)

    def dequantize(self, payload: TiledNSNPayload, context: Context, dtype=jnp.float32):
        decode = lambda payload, context: self.inner.dequantize(payload, context, dtype)
        return self._join(self._map(decode, self._windows_of(payload), context))

    def dequantize_folded(self, payload: TiledNSNPayload, context: Context, dtype=jnp.float32):
        decode = lambda payload, context: self.inner.dequantize_folded(payload, context, dtype)
        return self._join(self._map(decode, self._windows_of(payload), context))

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        return self.inner.fold_queries(q, context)

    def tiled_codes(self, body: Payload, context: Context) -> VectorCodes:
        """Norms and means as numbers: what is read of them beside the codes is little."""
        apart = isinstance(self.inner, NSNKeys)
        scale = jax.lax.bitcast_convert_type(body.scale, jnp.float16).astype(jnp.float32)
        weight = jnp.ones_like(scale)
        if body.norms is not None:
            norms = body.norms.decode()  # [B, tiles, windows, heads, window]
            weight = jnp.moveaxis(norms, 2, 3).reshape(scale.shape)
        mean = body.mean.decode()
        mean = mean.reshape(*mean.shape[:4], -1)
        angles = None
        if apart and context.rotary is not None:
            # To where a window begins, without the factor, which comes with the places in it.
            begin = context.rotary.at(context.positions[:: self.inner.window])
            begin = dataclasses.replace(begin, factor=1.0)
            windows = mean.reshape(mean.shape[0], -1, *mean.shape[3:])
            mean = jax.vmap(begin)(windows).reshape(mean.shape)
            angles = context.rotary.at(jnp.arange(self.inner.window))
        return VectorCodes(
            words=body.words,
            scale=scale * weight,
            table=jnp.asarray(normal(self.inner.bits)),
            weight=weight,
            mean=mean,
            angles=angles,
            bits=self.inner.bits,
            apart=apart,
        )

    def _windows_of(self, payload: TiledNSNPayload) -> NSNPayload:
        """The payloads of the windows, leaves [windows, ...]."""
        codes, signs = vectors.unpack(payload.words, self.inner.bits)
        scale = jax.lax.bitcast_convert_type(payload.scale, jnp.float16)
        apart = lambda a: None if a is None else jnp.stack(jnp.split(a, self._windows, axis=-1))
        return NSNPayload(
            codes=apart(codes),
            signs=apart(signs),
            scale=apart(scale),
            norms=payload.norms,
            mean=payload.mean,
        )

    def _in_line(self, payload: NSNPayload) -> TiledNSNPayload:
        """Of the windows of a tile, leaves [windows, ...]."""
        in_line = lambda a: None if a is None else jnp.concatenate(list(a), axis=-1)
        return TiledNSNPayload(
            words=vectors.pack(in_line(payload.codes), in_line(payload.signs)),
            scale=jax.lax.bitcast_convert_type(in_line(payload.scale), jnp.int16),
            norms=payload.norms,
            mean=payload.mean,
        )

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.inner.window, *x.shape[1:])

    def _join(self, x: jax.Array) -> jax.Array:
        return x.reshape(tiles.TOKENS, *x.shape[2:])

    def _map(self, function, payload, context: Context):
        """function(payload, context) of every window."""
        of_tokens = context.positions, None
        if isinstance(context.rotary, RotaryAngles):
            of_tokens = context.positions, context.rotary

        def one(payload, of_tokens):
            positions, angles = of_tokens
            rotary = context.rotary if angles is None else angles
            return function(
                payload, dataclasses.replace(context, positions=positions, rotary=rotary)
            )

        return jax.vmap(one)(payload, jax.tree.map(self._split, of_tokens))
