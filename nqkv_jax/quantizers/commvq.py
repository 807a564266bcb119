"""CommVQ: keys as sums of codewords that commute with RoPE, values as sums of learned vectors.

A token of d = heads * head_dim numbers is coded as a whole.

Keys, before RoPE, with p = ||k|| over all heads. RoPE turns the channels j and j + head_dim / 2 of
a head together: one complex number. Level by level a head takes an ordered pair (a, b) of its 64
codewords, which stands for

    centre(a, b) = c_a + i c_b,        k ≈ p * sum over levels of centre(a, b)

so 12 bits name one of 4096 centres. A turn is a product with e^(i angle), and commutes with both
operations: decoded keys may be turned, or codewords.

Values, with p = ||v / scale||. An encoder, two layers wide, picks one of four for every two bits of
s in {0, 1}^N; a token is the sum of the rows of C [N, d] whose bits are set, brought to length p:

    v ≈ scale * w * (s C),        w = p / ||s C||

Of what attention needs only sum_t a_t w_t s_t depends on the tokens; C comes in once per step.

Source: Li et al. (2025), CommVQ, arXiv 2506.18879, sections 3 and 4. Its released code stores 16
bits for the 12 of a key, p where this stores w (both 16 bits), and draws noise when it encodes
values; here the encoder takes the largest logit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import packing
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import (
    check_group,
    divide,
    divide_or_zero,
    pairwise_sum,
    rounded,
    store,
)
from nqkv_jax.rotary import Rotary

CODEWORDS = 64  # per level and head
_INDEX_BITS = 6
_F16 = np.dtype(np.float16)


# Keys --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommVQKeyPayload:
    """The codes and the norms of a group of tokens."""

    codes: jax.Array  # u8[group * levels * heads * 3 / 2], packed indices a and b
    norm: jax.Array  # f16[group], p


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CommVQKeys(Quantizer):
    """Residual codebooks of complex codewords, for keys before RoPE: see the module.

    Wrap it in `Unrotated`, which turns what is decoded. A key of length 0 decodes to 0, one that is
    not finite to NaN.

    Attributes:
      codebook: f16[levels, heads, 64, head_dim]; the real parts are in the first half of the
        channels, the imaginary parts in the second.
    """

    codebook: jax.Array

    @property
    def group(self) -> int:
        """Two tokens share their last byte where one would fill half of it."""
        levels, heads = self.codebook.shape[:2]
        return 1 + levels * heads % 2

    def check(self, heads: int, head_dim: int) -> None:
        shape = self.codebook.shape
        if len(shape) != 4 or shape[1:] != (heads, CODEWORDS, head_dim) or head_dim % 2:
            raise ValueError(
                f"CommVQKeys: codebook must be [levels, heads, {CODEWORDS}, head_dim] with "
                f"{heads} heads and head_dim {head_dim}, an even number; got {shape}"
            )

    def quantize(self, x: jax.Array, context: Context) -> CommVQKeyPayload:
        """Encodes `x` [group, heads, head_dim], any float dtype, in float32."""
        check_group("CommVQKeys", x, self.group)
        x = x.astype(jnp.float32)
        norm = jax.vmap(_norm)(x)
        unit = divide_or_zero(x, jnp.broadcast_to(norm.astype(jnp.float32)[:, None, None], x.shape))
        codes = jnp.where(norm[:, None, None, None] > 0, encode_keys(unit, self.codebook), 0)
        packed = packing.pack(codes.astype(jnp.uint8).ravel(), _INDEX_BITS)
        return CommVQKeyPayload(codes=packed, norm=norm)

    def dequantize(
        self, payload: CommVQKeyPayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """Decodes, summing levels in float32: [group, heads, head_dim]."""
        norm = payload.norm.astype(jnp.float32)[:, None, None]
        return (norm * _look_up(self.codebook, *self._indices(payload))).astype(dtype)

    def scores_by_lookup(
        self, q: jax.Array, payload: CommVQKeyPayload, context: Context
    ) -> jax.Array:
        """<q, key turned to its position>, of products of the query with codewords alone.

        No key is decoded: P_c = conj(q) c is computed once per query and codeword, and a token
        looks up P_a and P_b of every level. What is left per token is the turn by its own angles.
        The cache does not use it: a look-up has as many numbers as a codeword, and every query head
        has its own, while all of a group share a decoded key.

        Args:    q: [heads, head_dim], turned already.  context: positions of the tokens; its
                   `rotary`, if any, must turn all channels.
        Returns: f32[group, heads].
        Raises:  ValueError if only some channels are turned: pairs would be others.
        """
        half = self.codebook.shape[-1] // 2
        conjugate = jnp.concatenate([q[:, :half], -q[:, half:]], -1).astype(jnp.float32)
        products = _times(conjugate[None, :, None], self.codebook.astype(jnp.float32))
        summed = _look_up(products, *self._indices(payload))
        real, imaginary = jnp.split(summed, 2, axis=-1)  # [group, heads, half]
        if context.rotary is not None:
            angles = context.rotary
            angles = angles.at(context.positions) if isinstance(angles, Rotary) else angles
            if angles.cos.shape[-1] != half:
                raise ValueError(
                    f"CommVQKeys: scores_by_lookup needs RoPE on all {2 * half} channels; got "
                    f"{2 * angles.cos.shape[-1]}. Decode and turn instead"
                )
            real = angles.factor * (angles.cos * real - angles.sin * imaginary)
        return payload.norm.astype(jnp.float32)[:, None] * jnp.sum(real, axis=-1)

    def _indices(self, payload: CommVQKeyPayload) -> tuple[jax.Array, jax.Array]:
        """a and b, i32[group, levels, heads] each."""
        levels, heads = self.codebook.shape[:2]
        shape = (2, payload.norm.shape[0], levels, heads)
        codes = packing.unpack(payload.codes, _INDEX_BITS, int(np.prod(shape)))
        a, b = codes.astype(jnp.int32).reshape(shape)
        return a, b


def times_i(x: jax.Array) -> jax.Array:
    """i x, for complex numbers as halves of the last axis: real parts, then imaginary parts."""
    real, imaginary = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-imaginary, real], axis=-1)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y, likewise."""
    (a, b), (c, d) = jnp.split(x, 2, axis=-1), jnp.split(y, 2, axis=-1)
    return jnp.concatenate([a * c - b * d, a * d + b * c], axis=-1)


def centre_norms(codebook: jax.Array) -> jax.Array:
    """||c_a + i c_b||^2, f32[..., 64, 64], of codewords f32[..., 64, head_dim]."""
    norms = jnp.sum(jnp.square(codebook), axis=-1)
    crossed = _product(codebook, jnp.swapaxes(times_i(codebook), -1, -2))
    return norms[..., :, None] + norms[..., None, :] + 2 * crossed


def encode_keys(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """The pairs (a, b) of every level, greedily: i32[2, tokens, levels, heads].

    ||r - c_a - i c_b||^2 is ||r||^2 - 2 <r, c_a> - 2 <r, i c_b> + ||c_a + i c_b||^2: 128 products
    with the token and a table, in place of 4096 distances.

    Args:  x: f32[tokens, heads, head_dim].  codebook: [levels, heads, 64, head_dim].
    """

    def level(residual, codebook):  # [heads, tokens, head_dim], [heads, 64, head_dim]
        codebook = codebook.astype(jnp.float32)
        transposed = lambda c: jnp.swapaxes(c, -1, -2)
        from_a = 2 * _product(residual, transposed(codebook))
        from_b = 2 * _product(residual, transposed(times_i(codebook)))
        table = centre_norms(codebook)[:, None]  # [heads, 1, 64, 64]
        best = jnp.min(table - from_b[:, :, None, :], axis=-1) - from_a
        a = jnp.argmin(best, axis=-1)  # [heads, tokens]
        row = jnp.take_along_axis(jnp.squeeze(table, 1), a[:, :, None], axis=1)
        b = jnp.argmin(row - from_b, axis=-1)
        pick = lambda c, i: jnp.take_along_axis(c, i[:, :, None], axis=1)
        centre = pick(codebook, a) + times_i(pick(codebook, b))
        return residual - centre, jnp.stack([a, b])

    codes = jax.lax.scan(level, jnp.swapaxes(x, 0, 1), codebook)[1]  # [levels, 2, heads, tokens]
    return codes.transpose(1, 3, 0, 2).astype(jnp.int32)


def _look_up(table: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """sum over levels of row a + i row b: f32[group, heads, n].

    Args:  table: [levels, heads, 64, n], complex numbers as halves.
           a, b: i32[group, levels, heads].
    """

    def level(sums, at):
        rows, *indices = at
        pick = lambda i: jnp.take_along_axis(rows[None], i[:, :, None, None], axis=2)[:, :, 0]
        return [s + pick(i).astype(jnp.float32) for s, i in zip(sums, indices, strict=True)], None

    # One level after the other: its rows fit into a fast cache, those of all levels do not.
    zero = jnp.zeros((len(a), table.shape[1], table.shape[-1]), jnp.float32)
    by_level = (table, jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1))
    (first, second), _ = jax.lax.scan(level, [zero, zero], by_level)
    return first + times_i(second)


# Values ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommVQValuePayload:
    """One token."""

    codes: jax.Array  # u8[N / 8], the bits s, packed
    weight: jax.Array  # f16[1], w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """What chooses bits: logits = gelu(LayerNorm(x) @ inner + inner_bias) @ outer + outer_bias.

    The layer norm's own gain and offset are part of `inner`.

    Attributes:
      inner: [d, width].  inner_bias: [width].
      outer: [width, 2 N].  outer_bias: [2 N]; four logits for every two bits.
    """

    inner: jax.Array
    inner_bias: jax.Array
    outer: jax.Array
    outer_bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[..., N / 2, 4] of x f32[..., d]."""
        row = lambda a: jnp.expand_dims(a.astype(jnp.float32), range(x.ndim - 1))
        matrix = lambda a: a.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + 1e-12)
        x = _product(x, matrix(self.inner)) + row(self.inner_bias)
        x = _product(jax.nn.gelu(x, approximate=False), matrix(self.outer)) + row(self.outer_bias)
        return x.reshape(*x.shape[:-1], -1, 4)


# Of the four choices, in the order of the logits.
BITS_OF_CHOICE = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommVQValues(Quantizer):
    """Binary sums of learned vectors, for values: see the module.

    A value of length 0 decodes to 0, one that is not finite to NaN.

    Attributes:
      codebook: f16[N, heads, head_dim], C.
      scale: f32[heads, head_dim], > 0.
      encoder: of tokens divided by scale and length.
    """

    codebook: jax.Array
    scale: jax.Array
    encoder: Encoder

    def check(self, heads: int, head_dim: int) -> None:
        size, *shape = self.codebook.shape
        if tuple(shape) != (heads, head_dim) or self.scale.shape != (heads, head_dim) or size % 8:
            raise ValueError(
                "CommVQValues: codebook must be [N, heads, head_dim] and scale [heads, head_dim] "
                f"with {heads} heads, head_dim {head_dim} and N a multiple of 8; got "
                f"{self.codebook.shape} and {self.scale.shape}"
            )
        d = heads * head_dim
        found = self.encoder.inner.shape[:1], self.encoder.outer.shape[1:]
        if found != ((d,), (2 * size,)):
            raise ValueError(
                f"CommVQValues: the encoder must map {d} numbers to {2 * size} logits; got "
                f"inner {self.encoder.inner.shape}, outer {self.encoder.outer.shape}"
            )

    def quantize(self, x: jax.Array, context: Context) -> CommVQValuePayload:
        """Encodes `x` [1, heads, head_dim], any float dtype, in float32."""
        check_group("CommVQValues", x, 1)
        x = divide(x[0].astype(jnp.float32), self.scale)
        length = _length(x)
        unit = divide_or_zero(x, jnp.broadcast_to(length, x.shape)).ravel()
        bits = bits_of(jnp.argmax(self.encoder(unit), axis=-1))
        made = _length(self._sum(bits.astype(jnp.float32)))
        weight = store(divide_or_zero(length, made), jnp.all(jnp.isfinite(x)), _F16)
        return CommVQValuePayload(codes=packing.pack(bits, 1), weight=weight[None])

    def dequantize(
        self, payload: CommVQValuePayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """Decodes in float32 and rounds once to `dtype`: [1, heads, head_dim]."""
        made = self._sum(self.dequantize_folded(payload, context)[:, 0])
        return (self.scale[None] * made).astype(dtype)

    def dequantize_folded(
        self, payload: CommVQValuePayload, context: Context, dtype=jnp.float32
    ) -> jax.Array:
        """w s, [1, 1, N]: the heads share it."""
        bits = packing.unpack(payload.codes, 1, self.codebook.shape[0]).astype(jnp.float32)
        return (payload.weight.astype(jnp.float32) * bits)[None, None].astype(dtype)

    def unfold_output(self, out: jax.Array, context: Context) -> jax.Array:
        """[..., heads, head_dim] of sums of weighted bits [..., heads, N]."""
        made = jnp.einsum(
            "...hn,nhd->...hd", out, self.codebook.astype(out.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return made * jnp.expand_dims(self.scale.astype(out.dtype), range(out.ndim - 2))

    def _sum(self, weights: jax.Array) -> jax.Array:
        """weights @ C, f32[..., heads, head_dim], of f32[..., N]."""
        size, *shape = self.codebook.shape
        flat = self.codebook.reshape(size, -1).astype(jnp.float32)
        return _product(weights, flat).reshape(*weights.shape[:-1], *shape)


def bits_of(choices: jax.Array) -> jax.Array:
    """u8[2 n], s, of choices among four [n]."""
    first, second = (choices == 0) | (choices == 2), (choices == 1) | (choices == 2)
    return jnp.stack([first, second], axis=-1).ravel().astype(jnp.uint8)


# Both --------------------------------------------------------------------------------------------


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in full float32, also on hardware whose default is less."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _length(x: jax.Array) -> jax.Array:
    """||x||, f32[], by way of the largest magnitude: squares neither overflow nor underflow."""
    top = jnp.max(jnp.abs(x))
    squares = rounded(jnp.square(divide_or_zero(x, jnp.broadcast_to(top, x.shape))))
    return top * jnp.sqrt(pairwise_sum(squares.ravel(), 0)[0])


def _norm(x: jax.Array) -> jax.Array:
    """||x|| as it is stored: f16[], NaN if some number is not finite."""
    return store(_length(x), jnp.all(jnp.isfinite(x)), _F16)
