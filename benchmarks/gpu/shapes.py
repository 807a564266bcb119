"""Caches of many shapes and formats, with random contents."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from nqkv_jax import codebooks, tiles
from nqkv_jax.pallas_kernels.decode_attention import TiledCodes, Waves
from nqkv_jax.rotary import Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return (
            f"b{self.batch}-t{self.context}-h{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        )

    @property
    def elements(self) -> int:
        """Of one side of the cache."""
        return self.batch * self.context * self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What a cache holds.

    Attributes:
      codebook: of keys and values; None for bfloat16.
      zero: whether tokens have one beside their scale.
      key_codebook: of keys, if they have one of their own, scales of channels instead, and waves.
      shared: as `kivi` has it, channels of a value that share a scale, and tokens of a channel of
        keys; None for all channels of a head and token, on both sides.
    """

    codebook: codebooks.Codebook | None = None
    zero: bool = False
    key_codebook: codebooks.Codebook | None = None
    shared: int | None = None

    @property
    def bits(self) -> int:
        return 16 if self.codebook is None else self.codebook.bits

    @property
    def name(self) -> str:
        if self.codebook is None:
            return "bf16"
        keys = "" if self.key_codebook is None else f"{self.key_codebook.name}/"
        shared = f" of {self.shared}" if self.shared else ""
        return keys + self.codebook.name + "+zero" * self.zero + shared

    def blocks(self, shape: Shape) -> int:
        """Of a head, that have scales."""
        return shape.head_dim // self.shared if self.shared else 1

    def nbytes(self, shape: Shape) -> int:
        """Of keys and values, with their scales."""
        # Per token and head. As many for channels: a head has as many as a tile has tokens.
        scales = 0 if self.codebook is None else 2 * (1 + self.zero) * self.blocks(shape)
        tokens = shape.batch * shape.context * shape.num_kv_heads
        return 2 * (shape.elements * self.bits // 8 + tokens * scales)


def formats() -> list[Format]:
    """Those with codes; of each width the first is also run in plain XLA."""
    # What `nqkv-plus` has.
    plus = lambda bits, values: Format(
        codebook=values, key_codebook=codebooks.centred_integers(bits)
    )
    return [
        Format(codebook=codebooks.cubic_normal(4, 128)),
        Format(codebook=codebooks.integer(4)),
        plus(4, codebooks.cubic_normal(4, 128)),
        Format(codebook=codebooks.normal_float(4)),
        Format(codebook=codebooks.uniform(4), zero=True),
        Format(codebook=codebooks.lloyd_max_normal(2)),
        plus(2, codebooks.uniform_normal(2)),
        Format(codebook=codebooks.uniform(2), zero=True),
        Format(codebook=codebooks.uniform(2), zero=True, shared=32),
        Format(codebook=codebooks.cubic_normal(3, 128)),
        Format(codebook=codebooks.integer(8)),
        Format(codebook=codebooks.Float8()),
        Format(codebook=codebooks.stepped_normal(4, 64)),  # looked up in a table
    ]


TINY = (Shape(batch=2, context=256, num_heads=4, num_kv_heads=2),)


def shapes() -> list[Shape]:
    """Llama-3-8B's heads, and as many KV heads; the most telling first."""
    grid = [
        Shape(batch=batch, context=context, num_heads=32, num_kv_heads=heads)
        for batch in (1, 8, 32)
        for context in (2048, 8192, 32768, 131072)
        for heads in (8, 32)
    ]
    middle = lambda s: abs(math.log2(s.batch / 8)) + abs(math.log2(s.context / 32768))
    return sorted(grid, key=lambda s: middle(s) + math.log2(s.num_kv_heads / 8))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def bfloat16_caches(
    key, shape: Shape, copies: int, tokens_last: bool
) -> list[tuple[jax.Array, jax.Array]]:
    """(k, v) of [B, T, Hkv, D], or [B, Hkv, D, T]."""
    size = (shape.context, shape.num_kv_heads, shape.head_dim)
    size = (*size[1:], size[0]) if tokens_last else size
    # One sequence at a time, as the random bits would take as much again.
    one = lambda key: jax.random.normal(key, size, jnp.bfloat16)
    draw = lambda key: jax.lax.map(one, jax.random.split(key, shape.batch))
    return [tuple(map(draw, pair)) for pair in jax.random.split(key, (copies, 2))]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def coded_caches(key, shape: Shape, form: Format, copies: int) -> list[tuple[dict, dict]]:
    """Words, scales and zeros that any format of this width, and as many scales, can take."""
    place = (shape.context // tiles.TOKENS, shape.num_kv_heads)
    rows = tiles.num_rows(shape.head_dim, form.bits)

    def sequence(key):
        words, scale, zero = jax.random.split(key, 3)
        size = (place[0], place[1] * form.blocks(shape), tiles.TOKENS)
        half = lambda a: jax.lax.bitcast_convert_type(a.astype(jnp.float16), jnp.int16)
        words = jax.random.bits(words, (*place, rows, tiles.LANES), jnp.uint16)
        return dict(
            words=jax.lax.bitcast_convert_type(words, jnp.int16),
            scale=half(jax.random.uniform(scale, size, minval=0.5, maxval=1.0)),
            zero=half(jax.random.uniform(zero, size, minval=-1.0, maxval=0.0)),
        )

    side = lambda key: jax.lax.map(sequence, jax.random.split(key, shape.batch))
    return [tuple(map(side, pair)) for pair in jax.random.split(key, (copies, 2))]


def sides(cache: tuple[dict, dict], form: Format) -> tuple[TiledCodes, TiledCodes]:
    """Keys and values of one of `coded_caches`, read as a format.

    The scales of a head's tokens are taken for those of its channels, where channels have them:
    with head_dim 128 there are as many.
    """
    key, value = (given if form.zero else given | dict(zero=None) for given in cache)
    channels = form.key_codebook is not None or form.shared is not None
    waves = None
    if form.key_codebook is not None:
        half, num_tiles = key["scale"].shape[-1] // 2, key["words"].shape[1]
        rotary = Rotary(inverse_frequencies=1e4 ** -(jnp.arange(half) / half))
        starts = rotary.at(tiles.TOKENS * jnp.arange(num_tiles))
        waves = Waves(starts=starts, places=rotary.at(jnp.arange(tiles.TOKENS)))
    key = TiledCodes(
        **key, waves=waves, codebook=form.key_codebook or form.codebook, per_channel=channels
    )
    return key, TiledCodes(**value, codebook=form.codebook)
