"""Encoder and codebook of CommVQ's values, trained together.

Bits are drawn by hard Gumbel-softmax: one of four takes part in the sum, and the gradient is that
of the softmax. The loss is the squared error of the values and, if wanted, that of the attention's
output, with the attention of full precision.

Training starts from what is known to be good: every two bits encode the principal components of the
values, one component as four levels or two as two, most bits where there is most variance. A GELU
layer can hold that exactly, as gelu(y) - gelu(-y) = y. From random weights a few hundred steps end
far above the error of that start.

Source: Li et al. (2025), CommVQ, arXiv 2506.18879, section 3 and the training script of its code:
Adam with rate 1e-3, beta2 0.95, weight decay 0.1, Gumbel temperature 1, both errors in the loss; it
starts at random and takes 100,000 steps and more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nqkv_jax.quantizers.commvq import BITS_OF_CHOICE, CommVQValues, Encoder

_WIDEST = 4096  # of the encoder's inner layer
# Levels of least error of one and two bits on N(0, 1); two bits in equal steps, as sums are.
_STEP = {1: 1.5958, 2: 0.9957}
_SHARPNESS = 16.0  # of the first logits, over the squared step: noise rarely moves a clear choice


def train_values(
    x: np.ndarray,
    bits: int,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    attention: float = 0.0,
    scores: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[CommVQValues, np.ndarray]:
    """Trains the quantizer of one layer's values.

    Args:
      x: [tokens, heads, head_dim], any float dtype.
      bits: 1 or 2, so many per number.
      steps, batch: of training, and tokens of each.
      learning_rate: at first; it falls to 0 along a cosine.
      weight_decay: of all weights but biases.
      seed: of batches and noise.
      attention: weight of the attention output's error, for which every step takes one window.
      scores: for that, of every window of `x` in order: queries [windows, S, query heads, head_dim]
        and keys [windows, S, heads, head_dim] whose products are the scores.

    Returns: the quantizer, weights as float16, and the loss f32[steps], relative to the energy.
    """
    tokens, heads, head_dim = x.shape
    rows = x.reshape(tokens, -1).astype(np.float32)
    scale = np.mean(np.abs(rows), axis=0)
    scale = np.maximum(scale, 1e-6 * np.max(scale, initial=1e-30))
    windows = None
    if attention:
        windows = (
            *map(jnp.asarray, scores),
            jnp.asarray(x.reshape(len(scores[0]), -1, *x.shape[1:])),
        )
    rows = rows / scale
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    if not len(rows):
        raise ValueError("train_values: expected values of which some are not 0; got none")
    params = start(rows, scale, bits * rows.shape[1])
    params, losses = _train(
        params, jnp.asarray(rows), jnp.asarray(scale), windows, jax.random.key(seed), steps=steps,
        batch=min(batch, len(rows)), learning_rate=learning_rate, weight_decay=weight_decay,
        attention=attention,
    )  # fmt: skip
    half = lambda a: jnp.asarray(a, jnp.float16)
    encoder = jax.tree.map(half, params["encoder"])
    codebook = half(params["codebook"]).reshape(-1, heads, head_dim)
    quantizer = CommVQValues(
        codebook=codebook, scale=jnp.asarray(scale.reshape(heads, head_dim)), encoder=encoder
    )
    return quantizer, np.asarray(losses)


def start(rows: np.ndarray, scale: np.ndarray, size: int) -> dict[str, Any]:
    """Scalar quantization of the principal components, as encoder and codebook of N = `size`.

    Args:  rows: f32[tokens, d], values over `scale` f32[d].
    """
    d = rows.shape[1]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    # As the encoder sees them: without the mean over channels, of length sqrt(d).
    seen = unit - unit.mean(axis=1, keepdims=True)
    seen = (seen / np.sqrt(np.mean(seen**2, axis=1, keepdims=True))).astype(np.float64)
    shrink = np.mean(np.linalg.norm(unit - unit.mean(axis=1, keepdims=True), axis=1)) / np.sqrt(d)
    mean = seen.mean(axis=0)
    # Components of what the loss measures, which has the scale in it.
    variances, basis = np.linalg.eigh(np.cov(((seen - mean) * scale).T))
    variances, basis = np.maximum(variances[::-1], 0), basis[:, ::-1]
    widths = _allocate(variances, size - 2)
    deviation = np.sqrt(variances)
    # y = (seen - mean) * scale @ basis; back: y @ basis.T / scale.
    forward, back = scale[:, None] * basis, (basis / scale[:, None]).T

    inner_width = min(_WIDEST, 2 * size)
    inner, inner_bias = np.zeros((d, inner_width)), np.zeros(inner_width)
    outer, outer_bias = np.zeros((inner_width, 2 * size)), np.zeros(2 * size)
    codebook = np.zeros((size, d))
    used = [j for j in range(d) if widths[j]][: inner_width // 2]
    place = {j: i for i, j in enumerate(used)}
    for j, i in place.items():
        gain = 1 / max(deviation[j], 1e-3 * deviation[0], 1e-12)  # to variance 1, in float16 too
        for column, sign in ((2 * i, 1), (2 * i + 1, -1)):
            inner[:, column] = sign * gain * forward[:, j]
            inner_bias[column] = -sign * gain * mean @ forward[:, j]

    def add_logit(row, j, slope):
        outer[2 * place[j], row] += slope
        outer[2 * place[j] + 1, row] -= slope

    # The first two bits are always (1, 0): the sum is of zeros and ones, and needs an offset.
    outer_bias[0] = 8.0
    offset = shrink * mean + np.mean(unit.mean(axis=1))
    pairs = [(j, j) for j in used if widths[j] == 2]
    ones = [j for j in used if widths[j] == 1]
    pairs += list(zip(ones[::2], ones[1::2], strict=False))
    for group, (j, k) in enumerate(pairs, start=1):
        if j == k:
            step = _STEP[2]
            levels = {0: step, 1: 2 * step, 2: 3 * step, 3: 0.0}  # of the four choices
            for choice, level in levels.items():
                level = level - 1.5 * step
                add_logit(4 * group + choice, j, _SHARPNESS / step**2 * level)
                outer_bias[4 * group + choice] -= _SHARPNESS / step**2 * level**2 / 2
            vectors = [step * deviation[j] * back[j], 2 * step * deviation[j] * back[j]]
            offset = offset - shrink * 1.5 * step * deviation[j] * back[j]
        else:
            step = _STEP[1]
            for choice, bits in enumerate(BITS_OF_CHOICE):
                for bit, component in zip(bits, (j, k), strict=True):
                    add_logit(4 * group + choice, component, _SHARPNESS / step * (bit - 0.5))
            vectors = [step * deviation[c] * back[c] for c in (j, k)]
            offset = offset - shrink * sum(vectors) / 2
        codebook[2 * group : 2 * group + 2] = shrink * np.stack(vectors)
    codebook[0] = offset
    rng = np.random.default_rng(0)
    idle = ~codebook.any(axis=1)
    codebook[idle] = rng.standard_normal((idle.sum(), d)) * 0.01 / np.sqrt(d)
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    # What has no part in the start is small noise, so that it can learn.
    noise = lambda a: np.where(a == 0, rng.standard_normal(a.shape) * 0.1 / np.sqrt(len(a)), a)
    encoder = Encoder(inner=f32(noise(inner)), inner_bias=f32(inner_bias),
                      outer=f32(noise(outer)), outer_bias=f32(outer_bias))  # fmt: skip
    return dict(encoder=encoder, codebook=f32(codebook))


def _allocate(variances: np.ndarray, bits: int) -> np.ndarray:
    """0, 1 or 2 bits for every component, `bits` in all, the most useful first."""
    error = np.array([1.0, 0.3634, 0.1188])  # of N(0, 1)
    gains = np.concatenate([np.outer(variances, -np.diff(error))])
    widths = np.zeros(len(variances), np.int64)
    for flat in np.argsort(-gains, axis=None, kind="stable")[:bits]:
        widths[flat // 2] += 1
    return widths


def decode(bits: jax.Array, length: jax.Array, codebook: jax.Array) -> jax.Array:
    """Values over scale: f32[tokens, d] of bits f32[tokens, N] and lengths f32[tokens, 1]."""
    made = bits @ codebook
    return made * length / jnp.sqrt(jnp.sum(jnp.square(made), axis=-1, keepdims=True) + 1e-12)


def attend(x: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Causal attention f32[S, heads, group, head_dim] over x f32[S, heads, head_dim].

    Args:  queries: [S, query heads, head_dim].  keys: [S, heads, head_dim].
    """
    size, heads, head_dim = x.shape
    f32 = lambda a: a.astype(jnp.float32)
    queries = f32(queries).reshape(size, heads, -1, head_dim)
    scores = jnp.einsum("thgd,shd->hgts", queries, f32(keys))
    weights = jax.nn.softmax(jnp.where(jnp.tri(size, dtype=bool), scores, -jnp.inf), axis=-1)
    return jnp.einsum("hgts,shd->thgd", weights, x)


@functools.partial(
    jax.jit,
    static_argnames=("steps", "batch", "learning_rate", "weight_decay", "attention"),
    donate_argnums=0,
)
def _train(
    params, rows, scale, windows, key, *, steps, batch, learning_rate, weight_decay, attention
):
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adamw(
        schedule, b2=0.95, weight_decay=weight_decay,
        mask=lambda tree: jax.tree.map(lambda a: a.ndim > 1, tree),
    )  # fmt: skip
    energy = jnp.mean(jnp.sum(jnp.square(rows * scale[None]), axis=-1))

    def errors(params, x, key):
        """Of rows x [tokens, d], without their scale."""
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        logits = params["encoder"](x / jnp.maximum(length, 1e-12))
        soft = jax.nn.softmax(logits + jax.random.gumbel(key, logits.shape), axis=-1)
        hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), 4)
        choice = soft + jax.lax.stop_gradient(hard - soft)
        bits = (choice @ jnp.asarray(BITS_OF_CHOICE)).reshape(len(x), -1)
        return (decode(bits, length, params["codebook"]) - x) * scale[None]

    def output_error(params, key):
        """Of the attention over one window, relative to the energy of its output."""
        pick, noise = jax.random.split(key)
        cut = lambda a: a[jax.random.randint(pick, (), 0, len(a))]
        queries, keys, x = map(cut, windows)
        x = x.astype(jnp.float32)
        error = errors(params, x.reshape(len(x), -1) / scale[None], noise).reshape(x.shape)
        energy = lambda x: jnp.sum(jnp.square(attend(x, queries, keys)))
        return energy(error) / energy(x)

    def loss(params, x, key):
        total = jnp.mean(jnp.sum(jnp.square(errors(params, x, key)), axis=-1)) / energy
        if attention:
            total = total + attention * output_error(params, jax.random.fold_in(key, 1))
        return total

    def step(carry, key):
        params, state = carry
        pick, noise = jax.random.split(key)
        x = rows[jax.random.randint(pick, (batch,), 0, len(rows))]
        value, gradient = jax.value_and_grad(loss)(params, x, noise)
        # optax counts in whole numbers and multiplies them with others.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return (params, state), value

    carry = (params, optimizer.init(params))
    (params, _), losses = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params, losses
