"""Cases of decode attention over packed codes, and the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from vector_attention_cases import VECTOR_CASES, VectorCase, vector_arguments, vector_dense

from nqkv_jax import codebooks, tiles
from nqkv_jax.pallas_kernels.decode_attention import (
    TiledCodes,
    VectorCodes,
    Waves,
    decode_attention,
)
from nqkv_jax.rotary import Rotary

LENGTHS = (0, 1, 200, 384)  # of a ragged batch


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    codebook: codebooks.Codebook
    heads: int = 2
    group: int = 1
    head_dim: int = 128
    block: float = 1.0  # heads that share a scale, or the part of one that has its own
    zero: bool = False
    value_codebook: codebooks.Codebook | None = None
    soft_cap: float | None = None
    window: int | None = None
    key_channels: bool = False  # scales of the keys' channels, not of their tokens
    key_tokens: int = tiles.TOKENS  # that share those
    waves: int = 0  # channels of keys that are cosines and sines

    def __str__(self):
        return self.name

    @property
    def bits(self) -> int:
        """Of keys."""
        return self.codebook.bits


def cubic(bits):
    return codebooks.cubic_normal(bits, 128)


# What `nqkv-plus` has.
digits, EVEN = codebooks.centred_integers, codebooks.uniform_normal(2)


def uneven(bits):
    """Levels that no polynomial gives."""
    levels = np.sort(np.random.default_rng(0).uniform(-3, 5, 2**bits))
    return codebooks.Codebook(bits=bits, levels=tuple(levels.tolist()), name=f"uneven{bits}")


def _cases():
    yield Case("cubic4", cubic(4))
    yield Case("cubic4-signed", codebooks.cubic_normal(4, 128, signed=True), group=4)
    yield Case("stepped4", codebooks.stepped_normal(4, 128), group=4)
    yield Case("stepped4-d64", codebooks.stepped_normal(4, 64), heads=3, head_dim=64)
    yield Case("uniform4-minmax", codebooks.uniform(4), group=4, zero=True)
    yield Case("integer4", codebooks.integer(4), group=4)
    yield Case("integer8", codebooks.integer(8), group=8)
    yield Case("nf4-across-heads", codebooks.normal_float(4), block=2.0)
    yield Case("nf2", codebooks.normal_float(2), group=4)
    yield Case("nf3-d64", codebooks.normal_float(3), head_dim=64)
    yield Case("lloyd4", codebooks.lloyd_max_normal(4), group=4)
    yield Case("block4-signed", codebooks.block_normal(4, 256, signed=True), group=4)
    yield Case("lloyd2", codebooks.lloyd_max_normal(2), group=16)
    yield Case("uniform2-minmax-parts", codebooks.uniform(2), block=0.5, zero=True)
    yield Case("cubic4-parts", cubic(4), block=0.5, group=4)
    yield Case("cubic4-d256-parts", cubic(4), head_dim=256, block=0.25)
    yield Case("cubic3", cubic(3), group=4)
    yield Case("uniform3-minmax", codebooks.uniform(3), group=4, zero=True)
    yield Case("uniform3-minmax-g16", codebooks.uniform(3), group=16, zero=True)
    yield Case("nf4-d64", codebooks.normal_float(4), head_dim=64, heads=3, block=3.0, group=3)
    yield Case("cubic4-d64", cubic(4), head_dim=64, heads=3, group=3)
    yield Case("uniform2-d64", codebooks.uniform(2), head_dim=64, group=4, zero=True)
    yield Case("cubic3-d64-parts", cubic(3), head_dim=64, block=0.5)
    yield Case("float8", codebooks.Float8(), group=4)
    yield Case("float8-e5m2-d64", codebooks.Float8("e5m2"), head_dim=64, heads=3, group=3)
    yield Case("float8-parts-g16", codebooks.Float8(), group=16, block=0.5)
    yield Case("float8-d256", codebooks.Float8(), head_dim=256, group=4, block=2.0)
    yield Case("float8-keys-values4", codebooks.Float8(), value_codebook=cubic(4), group=4)
    yield Case("float8-channels-d64", codebooks.Float8(), head_dim=64, key_channels=True)
    yield Case("integer8-d64", codebooks.integer(8), head_dim=64)
    yield Case("cubic4-d256", cubic(4), head_dim=256, group=4)
    yield Case("uniform4-d256", codebooks.uniform(4), head_dim=256, group=4, zero=True)
    yield Case("cubic3-d256", cubic(3), head_dim=256)
    yield Case("uniform2-d256-g16", codebooks.uniform(2), head_dim=256, group=16)
    yield Case("cubic4-d80", cubic(4), head_dim=80, group=1)
    yield Case("cubic4-d96", cubic(4), head_dim=96, group=4)
    yield Case(
        "plus4-d80", digits(4), value_codebook=cubic(4), heads=3, head_dim=80, group=4,
        key_channels=True, waves=32,
    )  # fmt: skip
    yield Case(
        "uniform2-minmax-d96", codebooks.uniform(2), heads=2, head_dim=96, block=2.0, zero=True
    )
    yield Case("keys4-values2", cubic(4), value_codebook=codebooks.uniform(2), group=8)
    yield Case(
        "keys4-values2-minmax-parts", codebooks.uniform(4), value_codebook=codebooks.uniform(2),
        group=4, zero=True, block=0.5,
    )  # fmt: skip
    yield Case("keys8-values4", codebooks.integer(8), value_codebook=cubic(4), group=4)
    yield Case("keys3-values4-d64", cubic(3), value_codebook=cubic(4), head_dim=64, group=4)
    yield Case("keys2-values4-d64", codebooks.uniform(2), value_codebook=cubic(4), head_dim=64)
    yield Case("plus4", digits(4), value_codebook=cubic(4), group=4, key_channels=True, waves=128)
    yield Case("plus3", digits(3), value_codebook=cubic(3), group=4, key_channels=True, waves=128)
    yield Case("plus2", digits(2), value_codebook=EVEN, group=4, key_channels=True, waves=128)
    yield Case(
        "plus2-d64", digits(2), value_codebook=EVEN, heads=3, head_dim=64, group=3,
        key_channels=True, waves=48,
    )  # fmt: skip
    yield Case(  # more query heads than a program has
        "plus2-g20", digits(2), value_codebook=EVEN, group=20, key_channels=True, waves=128,
    )  # fmt: skip
    yield Case("waves-soft-cap", cubic(4), key_channels=True, waves=64, soft_cap=5.0)
    yield Case("channels2-minmax", codebooks.uniform(2), group=4, zero=True, key_channels=True)
    yield Case("channels3-d64", cubic(3), head_dim=64, heads=3, group=3, key_channels=True)
    yield Case("channels4-d256", cubic(4), head_dim=256, key_channels=True, soft_cap=5.0)
    kivi = dict(zero=True, key_channels=True, key_tokens=32)
    yield Case("kivi2", codebooks.uniform(2), group=4, block=1 / 4, **kivi)
    yield Case("kivi3", codebooks.uniform(3), group=4, block=1 / 4, **kivi)
    yield Case("kivi4", codebooks.uniform(4), group=4, block=1 / 4, **kivi)
    yield Case("kivi4-d64", codebooks.uniform(4), heads=3, head_dim=64, block=1 / 2, **kivi)
    yield Case("kivi2-d96", codebooks.uniform(2), group=3, head_dim=96, block=1 / 3, **kivi)
    yield Case("kivi8", codebooks.uniform(8), block=1 / 4, window=150, **kivi)
    yield Case("kivi2-d256", codebooks.uniform(2), group=4, head_dim=256, block=1 / 4, **kivi)
    yield Case(
        "kivi-keys2-values4-d64", codebooks.uniform(2), value_codebook=codebooks.uniform(4),
        head_dim=64, block=1 / 2, **kivi,
    )  # fmt: skip
    yield Case("cubic4-parts-of-32", cubic(4), block=1 / 4, group=4)
    yield Case("uneven4", uneven(4), group=4)
    yield Case("uneven4-d256-parts", uneven(4), head_dim=256, block=1 / 4, group=2)
    yield Case("uneven3", uneven(3), group=4)
    yield Case("uneven4-values2-g16", uneven(4), value_codebook=codebooks.uniform(2), group=16)
    # Where registers are fewest.
    yield Case("nf3-d256", codebooks.normal_float(3), head_dim=256, group=4)
    yield Case("nf4-d256-parts", codebooks.normal_float(4), head_dim=256, block=1 / 4, group=2)
    yield Case("kivi2-g16", codebooks.uniform(2), group=16, block=1 / 4, **kivi)
    yield Case("kivi4-d256-g16", codebooks.uniform(4), group=16, head_dim=256, block=1 / 8, **kivi)
    many = dict(zero=True, group=16)
    yield Case("uniform2-minmax-d80-g16", codebooks.uniform(2), head_dim=80, **many)
    yield Case(
        "uniform3-minmax-d256-parts-g16", codebooks.uniform(3), head_dim=256, block=1 / 4, **many
    )
    yield Case(
        "keys8-values4-minmax-parts-g16", codebooks.uniform(8), block=1 / 4,
        value_codebook=codebooks.uniform(4), **many,
    )  # fmt: skip
    yield Case(
        "keys4-values2-minmax-parts-of-32", codebooks.uniform(4), group=4, zero=True, block=1 / 4,
        value_codebook=codebooks.uniform(2),
    )  # fmt: skip
    yield Case("soft-cap", cubic(4), soft_cap=5.0)
    yield Case("window", cubic(4), window=150, group=2)


CASES = {case.name: case for case in (*_cases(), *VECTOR_CASES)}
TPU_CASES = {name: case for name, case in CASES.items() if case.head_dim in (64, 128, 256)}


def codes(
    case: Case, codebook, batch: int, num_tiles: int, rng, per_channel: bool = False
) -> TiledCodes:
    shape = (batch, num_tiles, tiles.TOKENS, case.heads, case.head_dim)
    levels = np.asarray(codebook.levels)
    finite = np.flatnonzero(np.isfinite(levels))
    values = jnp.asarray(rng.choice(finite, shape), jnp.uint8)
    words = jax.vmap(jax.vmap(lambda c: tiles.pack(c, codebook.bits)))(values)
    blocks = round(case.heads / case.block)
    spread = np.ptp(levels[finite])
    per_token = lambda a: jnp.asarray(a.astype(np.float16).view(np.int16))
    size = (batch, num_tiles, blocks, tiles.TOKENS)
    if per_channel:
        groups = tiles.TOKENS // case.key_tokens
        size = (batch, num_tiles, case.heads * groups, case.head_dim)
    scale = per_token(rng.uniform(2.0, 6.0, size) / spread)
    zero = per_token(rng.normal(-2.0, 0.5, size)) if case.zero else None
    return TiledCodes(
        words=words, scale=scale, zero=zero, codebook=codebook, per_channel=per_channel
    )


def arguments(
    case: Case | VectorCase, lengths, num_tiles: int = 4, dtype=jnp.float32, seed: int = 0
):
    """(q, key, value, lengths, first) of a ragged batch."""
    if isinstance(case, VectorCase):
        return vector_arguments(case, lengths, num_tiles, dtype, seed)
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    shape = (batch, case.heads, case.group, case.head_dim + case.waves)
    q = jnp.asarray(rng.normal(size=shape) * case.head_dim**-0.5, dtype)
    key = codes(case, case.codebook, batch, num_tiles, rng, case.key_channels)
    if case.waves:
        rotary = Rotary(inverse_frequencies=jnp.asarray(0.8 ** np.arange(case.waves // 2)))
        starts = rotary.at(4 + tiles.TOKENS * jnp.arange(num_tiles))
        waves = Waves(starts=starts, places=rotary.at(jnp.arange(tiles.TOKENS)))
        key = dataclasses.replace(key, waves=waves)
    value = codes(case, case.value_codebook or case.codebook, batch, num_tiles, rng)
    lengths = jnp.asarray(lengths, jnp.int32)
    first = None if case.window is None else jnp.maximum(lengths - case.window, 0)
    return q, key, value, lengths, first


def dense(side: TiledCodes | VectorCodes) -> np.ndarray:
    """f64[B, tokens, Hkv, width], with the layout read off its description, bit by bit."""
    if isinstance(side, VectorCodes):
        return vector_dense(side)
    if side.waves is not None:
        coded = dense(dataclasses.replace(side, waves=None))
        starts, places = (
            np.asarray(a.cos, np.float64)[:, 0] + 1j * np.asarray(a.sin, np.float64)[:, 0]
            for a in (side.waves.starts, side.waves.places)
        )
        turned = (starts[:, None] * places).reshape(1, coded.shape[1], 1, -1)
        waves = np.concatenate([turned.real, turned.imag], axis=-1)
        waves = np.broadcast_to(waves, (*coded.shape[:3], waves.shape[-1]))
        return np.concatenate([coded, waves], axis=-1)
    bits, head_dim = side.codebook.bits, side.head_dim
    words = np.asarray(side.words).view(np.uint16)
    batch, num_tiles, heads = words.shape[:3]
    low_bits = 2 if bits == 3 else bits
    low_rows = head_dim * low_bits // 16

    def word(rows, r, d, size):
        """Words (r, d) of words [size, head_dim], stored in rows of 128."""
        if head_dim <= 128:
            at = r * head_dim + d
            return rows[..., at // 128, at % 128]
        return rows[..., d // 128 * size + r, d % 128]

    size = 8 * low_bits
    t, d = np.arange(128)[:, None], np.arange(head_dim)[None]
    k, r = t // size, t % size
    code = word(words[..., :low_rows, :], r, d, size) >> (k * low_bits) & (2**low_bits - 1)
    if bits == 3:
        high = word(words[..., low_rows:, :], r % 8, d, 8)
        at = 8 * (r // 8) + 2 * (k % 4) + k // 4
        code = code | (high >> at & 1) << 2
    out = np.moveaxis(np.asarray(side.codebook.levels)[code], 2, 3)
    floats = lambda a: np.asarray(a).view(np.float16).astype(np.float64)
    if side.per_channel:
        group = np.arange(128) // (128 * heads // side.scale.shape[2])

        def of_tokens(a):
            a = floats(a).reshape(batch, num_tiles, heads, -1, head_dim)
            return np.moveaxis(a[:, :, :, group], 3, 2)

        out = out * of_tokens(side.scale)
        out = out if side.zero is None else out + of_tokens(side.zero)
        return out.reshape(batch, num_tiles * 128, heads, head_dim)
    blocks = out.reshape(batch, num_tiles, 128, -1, side.block_size)
    per_token = lambda a: np.moveaxis(floats(a), 2, 3)[..., None]
    blocks = blocks * per_token(side.scale)
    if side.zero is not None:
        blocks = blocks + per_token(side.zero)
    return blocks.reshape(batch, num_tiles * 128, heads, head_dim)


def oracle(q, key, value, lengths, first, soft_cap):
    """The output f64[B, Hkv, G, D] and the log of the sum of exponentials f64[B, Hkv, G]."""
    q, k, v = np.asarray(q, np.float64), dense(key), dense(value)
    out, total = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    for b, n in enumerate(np.asarray(lengths)):
        start = 0 if first is None else int(first[b])
        if n <= start:
            continue
        scores = np.einsum("hgd,thd->hgt", q[b], k[b, start:n])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total[b] = np.log(weights.sum(-1)) + top[..., 0]
        weights /= weights.sum(-1, keepdims=True)
        out[b] = np.einsum("hgt,thd->hgd", weights, v[b, start:n])
    return out, total


def check(case, dtype, tolerance, num_tiles=3, lengths=LENGTHS, **options):
    """Compares one implementation with the oracle, on a ragged batch."""
    q, key, value, lengths, first = arguments(case, lengths, num_tiles=num_tiles, dtype=dtype)
    run = functools.partial(decode_attention, soft_cap=case.soft_cap, **options)
    numerator, denominator, maximum = jax.jit(run)(q, key, value, lengths, first=first)
    expected, total = oracle(q, key, value, lengths, first, case.soft_cap)
    seen = np.asarray(denominator) > 0
    np.testing.assert_array_equal(seen, np.isfinite(total))
    np.testing.assert_array_equal(seen, np.isfinite(np.asarray(maximum)))
    out = np.asarray(numerator) / np.where(seen, np.asarray(denominator), 1)[..., None]
    largest = np.abs(dense(value)).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * largest)
    log_sum = np.log(np.where(seen, denominator, 1)) + np.where(seen, maximum, -np.inf)
    largest = np.abs(total[np.isfinite(total)]).max()
    np.testing.assert_allclose(log_sum, total, rtol=0, atol=tolerance * largest)
