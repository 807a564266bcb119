"""Cases of decode attention over codes of eight channels; what they mean, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention import VectorCodes
from nqkv_jax.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class VectorCase:
    name: str
    bits: int
    heads: int = 2
    group: int = 1
    head_dim: int = 128
    windows: int = 2  # of a tile; 0 for no means
    rotary: int = 0  # channels of the means of keys that are rotated
    soft_cap: float | None = None
    window: int | None = None

    def __str__(self):
        return self.name


VECTOR_CASES = (
    VectorCase("vector1", 1, group=3, rotary=128),
    VectorCase("vector1-decoded", 1, group=8, windows=1),
    VectorCase("vector2", 2, rotary=128),
    VectorCase("vector2-partial-rotary", 2, group=4, rotary=32),
    VectorCase("vector2-no-means", 2, group=2, windows=0, soft_cap=5.0),
    VectorCase("vector1-d64", 1, heads=3, group=3, head_dim=64, rotary=64),
    VectorCase("vector2-d64-window", 2, heads=3, head_dim=64, windows=1, rotary=64, window=150),
)


def rotary_of(case: VectorCase) -> Rotary:
    return Rotary(inverse_frequencies=jnp.asarray(0.3 ** np.arange(case.rotary // 2), jnp.float32))


def side(case: VectorCase, batch: int, num_tiles: int, rng, keys: bool) -> VectorCodes:
    shape = (batch, num_tiles, case.heads)
    rows = case.head_dim * case.bits // 16
    words = rng.integers(-(2**15), 2**15, (*shape, rows, tiles.TOKENS)).astype(np.int16)
    half = lambda a: jnp.asarray(a.astype(np.float16).view(np.int16))
    table = rng.normal(size=(256, 8))
    parts = {}
    if case.windows:
        mean = rng.normal(size=(batch, num_tiles, case.windows, case.heads, case.head_dim))
        weight = rng.uniform(0.5, 1.5, (*shape, tiles.TOKENS))
        parts = dict(mean=jnp.asarray(mean, jnp.float32), weight=half(weight), apart=keys)
        if keys and case.rotary:
            places = jnp.arange(tiles.TOKENS // case.windows)
            parts["angles"] = jax.jit(rotary_of(case).at)(places)
    return VectorCodes(
        words=jnp.asarray(words),
        scale=half(rng.uniform(0.5, 1.5, (*shape, tiles.TOKENS))),
        table=jnp.asarray(np.abs(table) if case.bits == 2 else table, jnp.float32),
        bits=case.bits,
        **parts,
    )


def vector_arguments(case: VectorCase, lengths, num_tiles=4, dtype=jnp.float32, seed=0):
    """(q, key, value, lengths, first) of a ragged batch."""
    rng = np.random.default_rng(seed)
    key = side(case, len(lengths), num_tiles, rng, keys=True)
    value = side(case, len(lengths), num_tiles, rng, keys=False)
    shape = (len(lengths), case.heads, case.group, key.width)
    q = jnp.asarray(rng.normal(size=shape) * case.head_dim**-0.5, dtype)
    lengths = jnp.asarray(lengths, jnp.int32)
    first = None if case.window is None else jnp.maximum(lengths - case.window, 0)
    return q, key, value, lengths, first


def vector_dense(codes: VectorCodes) -> np.ndarray:
    """f64[B, tokens, Hkv, width], with the layout read off its description."""
    words = np.asarray(codes.words).view(np.uint16)
    batch, num_tiles, heads, _, tokens = words.shape
    head_dim, table = codes.head_dim, np.asarray(codes.table, np.float64)
    x = np.empty((batch, num_tiles, heads, tokens, head_dim))
    for d in range(head_dim):
        r, i = divmod(d, 8)
        if codes.bits == 1:
            late = d >= head_dim // 2
            word = words[:, :, :, r - late * head_dim // 16]
            x[..., d] = table[word >> 8 * late & 255, i]
        else:
            word = words[:, :, :, r]
            x[..., d] = table[word & 255, i] * np.where(word >> 8 + i & 1, 1, -1)
    floats = lambda a: np.asarray(a).view(np.float16).astype(np.float64)
    x = x * floats(codes.scale)[..., None]
    if codes.mean is not None:
        windows = codes.mean.shape[2]
        mean = np.moveaxis(np.asarray(codes.mean, np.float64), 2, 3)
        mean = np.repeat(mean, tokens // windows, axis=3)
        if codes.angles is not None:
            angle = lambda a: np.tile(np.asarray(a, np.float64)[:, 0], (windows, 1))
            cos, sin = angle(codes.angles.cos), angle(codes.angles.sin)
            half = cos.shape[-1]
            a, b = mean[..., :half].copy(), mean[..., half : 2 * half].copy()
            mean[..., :half] = a * cos - b * sin
            mean[..., half : 2 * half] = b * cos + a * sin
        mean = mean * floats(codes.weight)[..., None]
        x = np.concatenate([x, mean], axis=-1) if codes.apart else x + mean
    return np.moveaxis(x, 2, 3).reshape(batch, num_tiles * tokens, heads, -1)
