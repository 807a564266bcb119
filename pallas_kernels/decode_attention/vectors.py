"""What decode attention reads of a vector-quantized cache: tiles of 128 tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import as_float32
from nqkv_jax.rotary import RotaryAngles, amplitudes

CHANNELS = 8  # of a code
ENTRIES = 256
BITS = (1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorCodes:
    """Keys or values: x = scale * table[code] + weight * mean, eight channels per code.

    With 2 bits the table holds magnitudes, and every channel has a sign. A word (r, t) of token t
    has, with 1 bit, the codes of channels [8 r, 8 r + 8) in its lower byte and of
    [head_dim / 2 + 8 r, ... + 8) in the other; with 2 bits, the code of channels [8 r, 8 r + 8) in
    its lower byte and their signs in the other, bit i for channel 8 r + i, 1 for +.

    Attributes:
      words: int16[B, tiles, Hkv, head_dim * bits / 16, 128].
      scale: [B, tiles, Hkv, 128], one per token and head: float32, bfloat16 or int16, the bits of
        float16.
      table: f32[256, 8].
      weight: like scale, and
      mean: float[B, tiles, windows, Hkv, head_dim] of equal stretches of a tile; None without.
      apart: whether scale * table[code] and weight * mean are different channels of a token, in
        this order, to meet two queries, and not added.
      angles: by how much the mean is still to be rotated, at each place in a window; None for not.
      bits: 1 or 2.
    """

    words: jax.Array
    scale: jax.Array
    table: jax.Array
    weight: jax.Array | None = None
    mean: jax.Array | None = None
    angles: RotaryAngles | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    apart: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def head_dim(self) -> int:
        """Channels that are coded."""
        return self.words.shape[3] * 16 // self.bits

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.head_dim * (1 + self.apart)

    @property
    def num_heads(self) -> int:
        return self.words.shape[2]

    @property
    def num_tiles(self) -> int:
        return self.words.shape[1]

    def check(self, what: str) -> None:
        """Raises ValueError unless the arrays fit together."""
        shape = self.words.shape
        if len(shape) != 5 or shape[4] != tiles.TOKENS or self.words.dtype != jnp.int16:
            raise ValueError(
                f"decode_attention: expected {what}.words int16[batch, tiles, heads, rows, 128]; "
                f"got {self.words.dtype} of {shape}"
            )
        if self.bits not in BITS:
            raise ValueError(f"decode_attention: {what}.bits must be 1 or 2; got {self.bits}")
        per_token = (*shape[:3], tiles.TOKENS)
        expected = dict(scale=per_token, table=(ENTRIES, CHANNELS))
        if (self.mean is None) != (self.weight is None) or (self.apart and self.mean is None):
            raise ValueError(
                f"decode_attention: {what} needs both weight and mean, or neither if not apart"
            )
        if self.mean is not None:
            windows = self.mean.shape[2] if self.mean.ndim == 5 else 1
            expected |= dict(weight=per_token)
            expected |= dict(mean=(*shape[:2], windows, shape[2], self.head_dim))
            if tiles.TOKENS % windows:
                raise ValueError(
                    f"decode_attention: {what}.mean has {windows} windows, which do not divide a "
                    f"tile of {tiles.TOKENS} tokens"
                )
        for name, size in expected.items():
            got = getattr(self, name).shape
            if got != size:
                raise ValueError(f"decode_attention: expected {what}.{name} {size}; got {got}")

    def cut(self, begin: jax.Array, size: int) -> "VectorCodes":
        """`size` tiles from `begin` i32[] on."""
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size, axis=1)
        arrays = (self.words, self.scale, self.weight, self.mean)
        words, scale, weight, mean = jax.tree.map(cut, arrays)
        return dataclasses.replace(self, words=words, scale=scale, weight=weight, mean=mean)

    def shift(self, q: jax.Array) -> jax.Array:
        """f32[B, tiles, Hkv, G, 128]: products of q [B, Hkv, G, head_dim] with weight * mean.

        The mean of a window meets a query channel by channel once; what differs from token to token
        is in one product with the cosines and sines of the window's places.
        """
        product = functools.partial(
            jnp.einsum, precision="highest", preferred_element_type=jnp.float32
        )
        q = q.astype(jnp.float32)[:, None, None]  # [B, 1, 1, Hkv, G, D]
        mean = self.mean.astype(jnp.float32)[:, :, :, :, None]  # [B, tiles, windows, Hkv, 1, D]
        places = tiles.TOKENS // mean.shape[2]
        if self.angles is None:
            shift = jnp.sum(q * mean, axis=-1, keepdims=True)
            shift = jnp.broadcast_to(shift, (*shift.shape[:-1], places))
        else:
            factor = self.angles.factor
            cosine, sine, rest = amplitudes(q, mean, self.angles.cos.shape[-1])
            cos, sin = (a[:, 0] * factor for a in (self.angles.cos, self.angles.sin))
            shift = product("bnwhgd,td->bnwhgt", cosine, cos)
            shift += product("bnwhgd,td->bnwhgt", sine, sin)
            shift += rest
        shift = jnp.moveaxis(shift, 2, 4)  # [B, tiles, Hkv, G, windows, places]
        shift = shift.reshape(*shift.shape[:4], tiles.TOKENS)
        return shift * as_float32(self.weight)[:, :, :, None]


def pack(codes: jax.Array, signs: jax.Array | None) -> jax.Array:
    """int16[heads, rows, 128], the words of u8[heads, head_dim / 8, 128] codes, and signs."""
    if signs is None:
        low, high = jnp.split(codes, 2, axis=1)
    else:
        low, high = codes, signs
    words = low.astype(jnp.uint16) | (high.astype(jnp.uint16) << jnp.uint16(8))
    return jax.lax.bitcast_convert_type(words, jnp.int16)


def unpack(words: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
    """u8[..., head_dim / 8, 128] codes, and signs or None, of int16[..., rows, 128] words."""
    words = jax.lax.bitcast_convert_type(words, jnp.uint16)
    low, high = words.astype(jnp.uint8), (words >> jnp.uint16(8)).astype(jnp.uint8)
    return (low, high) if bits == 2 else (jnp.concatenate([low, high], axis=-2), None)
