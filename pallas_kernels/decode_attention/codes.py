"""What decode attention reads: one side of a cache in tiles of 128 tokens."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nqkv_jax import tiles
from nqkv_jax.codebooks import Codebook
from nqkv_jax.rotary import RotaryAngles

# What kernels need at least: tokens that share the scales of channels, and on GPUs channels that
# share the scale of a token.
SHARING = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Waves:
    """Channels of keys that are not stored, cosines and then sines of the angles of a token.

    A mean that RoPE turns is a combination of them, whose factors are channels of the query. (So is
    the `factor` of angles, of which only cosines and sines count here.)

    Attributes:
      starts: angles [tiles, 1, R / 2] of the first token of each tile.
      places: angles [128, 1, R / 2] of the tokens of a tile, against its first.
    """

    starts: RotaryAngles
    places: RotaryAngles

    @property
    def width(self) -> int:
        """R, channels of a token."""
        return 2 * self.places.cos.shape[-1]

    def shift(self, q: jax.Array) -> jax.Array:
        """f32[B, tiles, Hkv, G, 128]: what they add to scores, of q [B, Hkv, G, R].

        By the addition theorems it is a product with the cosines and sines of one tile.
        """
        product = functools.partial(
            jnp.einsum, "bnhgd,td->bnhgt", precision="highest", preferred_element_type=jnp.float32
        )
        cosine, sine = jnp.split(q.astype(jnp.float32)[:, None], 2, axis=-1)  # [B, 1, Hkv, G, R/2]
        cos, sin = (a[None, :, :, None] for a in (self.starts.cos, self.starts.sin))
        shift = product(cosine * cos + sine * sin, self.places.cos[:, 0])
        return shift + product(sine * cos - cosine * sin, self.places.sin[:, 0])

    def of_tiles(self, first: jax.Array, count: int) -> "Waves":
        """Those of tiles first i32[] + [0, count)."""
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=0)
        return dataclasses.replace(self, starts=jax.tree.map(cut, self.starts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledCodes:
    """Keys or values: x = levels[code] * scale + zero, with a scale per block of each token.

    Attributes:
      words: int16[B, tiles, Hkv, rows, 128], codes in the layout of `nqkv_jax.tiles`.
      scale: [B, tiles, blocks, 128]: of each block of a token's Hkv * head_dim elements. A block
        is one or several heads, or a part of one. float32, bfloat16, or int16: the bits of
        float16, which is not a dtype of TPU kernels.
      zero: like scale; None for 0.
      waves: of keys, channels beside the head_dim of codes; None without.
      codebook: the levels.
      per_channel: scale and zero are [B, tiles, Hkv * groups, head_dim] instead: of each channel of
        a head, for 128 / groups tokens.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    waves: Waves | None = None
    codebook: Codebook = dataclasses.field(metadata={"static": True})
    per_channel: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def head_dim(self) -> int:
        return self.words.shape[3] * 16 // self.codebook.bits

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.head_dim + (self.waves.width if self.waves else 0)

    @property
    def num_heads(self) -> int:
        return self.words.shape[2]

    @property
    def num_tiles(self) -> int:
        return self.words.shape[1]

    @property
    def groups(self) -> int:
        """Of a tile's tokens, that have scales of channels for themselves."""
        return self.scale.shape[2] // self.num_heads if self.per_channel else 1

    @property
    def block_size(self) -> int:
        """Elements of a token that share a scale; `head_dim` if channels have their own."""
        if self.per_channel:
            return self.head_dim
        return self.num_heads * self.head_dim // self.scale.shape[2]

    @property
    def blocks_per_head(self) -> int:
        """1 where a block is whole heads."""
        return max(1, self.head_dim // self.block_size)

    def block_of(self, head):
        """The first block of a head, int or i32[]."""
        if self.blocks_per_head > 1:
            return head * self.blocks_per_head
        heads = self.block_size // self.head_dim
        return head // heads if isinstance(head, int) else jax.lax.div(head, jnp.int32(heads))

    def check(self, what: str) -> None:
        """Raises ValueError unless the arrays fit together."""
        if self.words.ndim != 5 or self.words.shape[4] != tiles.LANES:
            raise ValueError(
                f"decode_attention: expected {what}.words [batch, tiles, heads, rows, 128]; got "
                f"{self.words.shape}"
            )
        if self.words.dtype != jnp.int16:
            raise ValueError(
                f"decode_attention: expected {what}.words of int16; got {self.words.dtype}"
            )
        tiles.check(self.head_dim, self.codebook.bits)
        hidden, batch = self.num_heads * self.head_dim, self.words.shape[:2]
        for name, a in (("scale", self.scale), ("zero", self.zero)):
            if a is None:
                continue
            rows = a.shape[2] if a.ndim == 4 else 0
            groups = rows // self.num_heads
            of_channels = a.shape == (*batch, self.num_heads * groups, self.head_dim)
            if self.per_channel and not (of_channels and groups and tiles.TOKENS % groups == 0):
                raise ValueError(
                    f"decode_attention: expected {what}.{name} of channels [{batch[0]}, "
                    f"{batch[1]}, {self.num_heads} heads * groups of 128 tokens, {self.head_dim}]; "
                    f"got {a.shape}"
                )
            of_tokens = a.ndim == 4 and a.shape[:2] == batch and a.shape[3] == tiles.TOKENS
            if not self.per_channel and not of_tokens:
                raise ValueError(
                    f"decode_attention: expected {what}.{name} [{batch[0]}, {batch[1]}, blocks, "
                    f"128]; got {a.shape}"
                )
            if a.dtype not in (jnp.int16, jnp.bfloat16, jnp.float32):
                raise ValueError(
                    f"decode_attention: expected {what}.{name} of int16 (the bits of float16), "
                    f"bfloat16 or float32; got {a.dtype}"
                )
            if not self.per_channel and hidden % a.shape[2]:
                raise ValueError(
                    f"decode_attention: the {a.shape[2]} blocks of {what}.{name} do not divide "
                    f"{self.num_heads} heads of {self.head_dim}"
                )
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(
                f"decode_attention: expected {what}.zero like {what}.scale, {self.scale.shape}; "
                f"got {self.zero.shape}"
            )
        if self.waves is not None:
            got = self.waves.starts.cos.shape, self.waves.places.cos.shape
            expected = (self.num_tiles, 1, got[1][-1]), (tiles.TOKENS, 1, got[1][-1])
            if got != expected:
                raise ValueError(
                    f"decode_attention: expected {what}.waves with angles {expected[0]} of tiles "
                    f"and {expected[1]} of places; got {got[0]} and {got[1]}"
                )
        if self.block_size % self.head_dim and self.head_dim % self.block_size:
            raise ValueError(
                "decode_attention: expected blocks of whole heads, or of equal parts of one; got "
                f"{what} blocks of {self.block_size} and head_dim {self.head_dim}"
            )

    def decode(self, first: jax.Array, count: int = 1) -> jax.Array:
        """f32[B, count * 128, Hkv, head_dim]: tiles first i32[] + [0, count)."""

        def cut(a):
            """[B * count, ...]"""
            return jax.lax.dynamic_slice_in_dim(a, first, count, axis=1).reshape(-1, *a.shape[2:])

        unpack = lambda words: tiles.unpack(words, self.codebook.bits, self.head_dim)
        x = self.codebook.decode(jax.vmap(unpack)(cut(self.words)))
        x = self._scaled(x, lambda a: as_float32(cut(a)))
        return x.reshape(self.words.shape[0], -1, *x.shape[2:])

    def _scaled(self, x: jax.Array, cut: Callable) -> jax.Array:
        """Of levels x [n, 128, Hkv, head_dim]; `cut` brings scales and zeros of the n tiles."""
        if self.per_channel:
            # [n, Hkv, groups, 1, head_dim], for x of which groups are apart
            split = (x.shape[0], self.groups, -1, *x.shape[2:])
            per_group = lambda a: jnp.swapaxes(
                cut(a).reshape(x.shape[0], x.shape[2], self.groups, x.shape[3]), 1, 2
            )[:, :, None]
            parts = x.reshape(split) * per_group(self.scale)
            parts = parts if self.zero is None else parts + per_group(self.zero)
            return parts.reshape(x.shape)
        blocks = x.reshape(*x.shape[:2], -1, self.block_size)
        per_token = lambda a: jnp.swapaxes(cut(a), 1, 2)[..., None]
        blocks = blocks * per_token(self.scale)
        if self.zero is not None:
            blocks = blocks + per_token(self.zero)
        return blocks.reshape(x.shape)


def as_float32(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.int16:
        x = jax.lax.bitcast_convert_type(x, jnp.float16)
    return x.astype(jnp.float32)
