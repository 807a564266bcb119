"""Makes the codebooks of vectors that come with the package: k-means, then gradients.

Source: Son et al. (2025), NSNQuant, arXiv 2505.18231: k-means on normal samples, fine-tuned on a
  cosine objective, whose settings are not published.
"""

import dataclasses
import functools
import importlib.metadata
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from nqkv_jax.calibration import artifact
from nqkv_jax.vector_codebooks import BITS, LENGTH, STEPS, WORDS, nearest

KIND = "codebook 1"
HEAD_DIM = 128  # of the tokens that the objective is about
_SLICE = 2**14  # vectors whose distances are in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a codebook is made.

    Attributes:
      seed: of all samples.
      samples, iterations: vectors N(0, I) of k-means, and its rounds.
      steps, batch: of Adam, and its tokens of 128 numbers, drawn anew in each.
      learning_rate: in the beginning; it falls to 0 along a cosine.
    """

    seed: int = 42
    samples: int = 2**18
    iterations: int = 50
    steps: int = 2000
    batch: int = 2048
    learning_rate: float = 1e-2

    def __post_init__(self):
        if self.samples < WORDS or self.samples % min(self.samples, _SLICE):
            raise ValueError(
                f"codebook: samples must be at least {WORDS}, and a multiple of {_SLICE} if there "
                f"are more than that; got {self.samples}"
            )
        if self.iterations < 1 or self.steps < 0 or self.batch < 1:
            raise ValueError(
                "codebook: expected iterations >= 1, steps >= 0 and batch >= 1; got "
                f"{self.iterations}, {self.steps} and {self.batch}"
            )
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"codebook: learning_rate must be positive; got {self.learning_rate}")


def write(
    path: str | os.PathLike, settings: Settings = Settings(), progress: bool | None = None
) -> dict[str, Any]:
    """Makes both codebooks and writes them, with the recipe; returns the metadata.

    The file holds words1 and words2, i8[256, 8] in steps of 1 / 32; the metadata has settings,
    versions, and the token cosine of both on fresh samples.
    """
    arrays, cosines = {}, {}
    for bits in BITS:
        words = train(bits, settings, progress=progress)
        arrays[f"words{bits}"] = np.round(words * STEPS).astype(np.int8)
        cosines[str(bits)] = round(cosine(words, bits, seed=settings.seed + 1), 5)
    metadata = dict(
        settings=dataclasses.asdict(settings), cosine=cosines, step=1 / STEPS,
        versions={name: importlib.metadata.version(name) for name in ("jax", "optax")},
    )  # fmt: skip
    artifact.save(path, KIND, arrays, metadata)
    return metadata


def train(bits: int, settings: Settings = Settings(), progress: bool | None = None) -> np.ndarray:
    """f32[256, 8], multiples of 1 / 32: see `nqkv_jax.vector_codebooks.normal`."""
    of_samples, of_steps = jax.random.split(jax.random.key(settings.seed))
    x = _draw(of_samples, (settings.samples, LENGTH), bits)
    words, iterations = x[:WORDS], settings.iterations
    disable = None if progress is None else not progress
    with tqdm.tqdm(total=iterations + settings.steps, desc=f"{bits} bits", disable=disable) as bar:
        for _ in range(iterations):
            words = _lloyd(x, words)
            bar.update()
        optimizer = optax.adam(
            optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1))
        )
        state = optimizer.init(words)
        # optax multiplies whole numbers of steps by fractions.
        with jax.numpy_dtype_promotion("standard"):
            for key in jax.random.split(of_steps, settings.steps):
                tokens = _draw(key, (settings.batch, HEAD_DIM // LENGTH, LENGTH), bits)
                words, state = _descend(words, state, tokens, optimizer)
                bar.update()
    top = np.iinfo(np.int8).max
    return np.clip(np.round(np.asarray(words) * STEPS), -top, top).astype(np.float32) / STEPS


def cosine(words: np.ndarray, bits: int, *, seed: int = 0, tokens: int = 2**14) -> float:
    """The mean cosine between tokens of 128 independent normal numbers and their words."""
    shape = (tokens, HEAD_DIM // LENGTH, LENGTH)
    x = _draw(jax.random.key(seed), shape, bits)
    # Samples of norms beyond that of tokens are rare, and only coded a little less exactly.
    code = jax.jit(lambda x: nearest(x, words, norm=HEAD_DIM**0.5))(x)
    return float(jnp.mean(_cosines(x, jnp.asarray(words)[code])))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], bits: int) -> jax.Array:
    """What is coded: normal numbers, or their magnitudes, as signs are stored apart."""
    x = jax.random.normal(key, shape)
    return x if bits == 1 else jnp.abs(x)


def _assign(x: jax.Array, words: jax.Array) -> jax.Array:
    """i32[n], the nearest words of x [n, 8]; not rounded, as `words` are not in steps yet."""
    half_squares = jnp.sum(jnp.square(words), axis=-1)[None] / 2
    return jnp.argmax(x @ words.T - half_squares, axis=-1)


@jax.jit
def _lloyd(x: jax.Array, words: jax.Array) -> jax.Array:
    """Every word at the mean of the samples nearest to it; one that has none stays."""

    def sums(x):
        code = _assign(x, words)
        return (
            jax.ops.segment_sum(x, code, WORDS),
            jax.ops.segment_sum(jnp.ones(len(x), jnp.float32), code, WORDS),
        )

    slices = x.reshape(-1, min(len(x), _SLICE), LENGTH)
    total, count = (jnp.sum(a, axis=0) for a in jax.lax.map(sums, slices))
    return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], words)


def _cosines(x: jax.Array, decoded: jax.Array) -> jax.Array:
    """f32[tokens] of [tokens, sub-vectors, 8]."""
    inner = lambda a, b: jnp.sum(a * b, axis=(1, 2))
    return inner(x, decoded) / jnp.sqrt(inner(x, x) * inner(decoded, decoded))


@functools.partial(jax.jit, static_argnums=3)
def _descend(words, state, tokens, optimizer):
    """One step of Adam. The cosine is what is left of an error once scales are adjusted; the mean
    squared error keeps the words' own scale, on which the nearest word depends."""
    code = _assign(tokens.reshape(-1, LENGTH), words).reshape(tokens.shape[:-1])

    def loss(words):
        decoded = words[code]
        return jnp.mean(jnp.square(tokens - decoded)) - jnp.mean(_cosines(tokens, decoded))

    updates, state = optimizer.update(jax.grad(loss)(words), state)
    return optax.apply_updates(words, updates), state
