"""Codebooks of CommVQ's keys: expectation maximisation, level by level, with falling temperature.

At a temperature T a vector r belongs to centre (a, b) with the weight

    softmax over (a, b) of -||r - c_a - i c_b||^2 / T

and the codewords minimise the weighted squared error. Every codeword k is both an a and a b, so
that its equation couples it to all others:

    (n_k. + n_.k) c_k + i sum_l (n_kl - n_lk) c_l = sum_r (w_k. - i w_.k) r

with w the weights of one vector and n their sums over all vectors, [64, 64]. It is one Hermitian
system for all channels of a head. No step at a fixed temperature raises the free energy
-T sum_r log sum_ab exp(-d^2 / T).

Source: Li et al. (2025), CommVQ, arXiv 2506.18879, section 4 and appendix; there the system is in
real numbers, [128, 128] per pair of channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.quantizers.commvq import CODEWORDS, centre_norms, encode_keys, times_i

_BLOCK = 128  # vectors whose weights are held at once


def default_levels(bits: int, head_dim: int) -> int:
    """As many levels of 12 bits per head as stay within `bits` per number.

    The paper has head_dim 128, where it takes 11 and 21: 1.03 and 1.97 bits.
    """
    return 11 if (bits, head_dim) == (1, 128) else bits * head_dim // 12


def em_step(
    codebook: jax.Array, x: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step of one head and level.

    Args:
      codebook: f32[64, head_dim].
      x: f32[vectors, head_dim], vectors a multiple of 128.
      temperature: f32[], squared units of x.

    Returns: the next codebook, and the mean squared distance from `x` to its nearest centre before.
    """
    table = centre_norms(codebook)

    def block(sums, near):  # 2 <r, c_a> and 2 <r, i c_b>, [128, 64] each
        # -d^2 without ||r||^2, which neither weights nor the nearest depend on.
        score = near[0][:, :, None] + near[1][:, None, :] - table[None]
        best = jnp.max(score, axis=(1, 2))
        weights = jnp.exp((score - best[:, None, None]) / temperature)
        weights = weights / jnp.sum(weights, axis=(1, 2), keepdims=True)
        sums = jax.tree.map(jnp.add, sums, (jnp.sum(weights, axis=0), jnp.sum(best)))
        return sums, (jnp.sum(weights, axis=2), jnp.sum(weights, axis=1))

    # Products of all vectors at once: XLA:CPU has no fast ones for a block.
    near = (2 * x @ codebook.T, 2 * x @ times_i(codebook).T)
    blocks = jax.tree.map(lambda a: a.reshape(-1, _BLOCK, CODEWORDS), near)
    zero = jnp.zeros((CODEWORDS, CODEWORDS)), jnp.zeros(())
    (counts, best), weights = jax.lax.scan(block, zero, blocks)
    as_a, as_b = (w.reshape(-1, CODEWORDS) for w in weights)
    moment = as_a.T @ x - as_b.T @ times_i(x)
    error = jnp.sum(jnp.square(x)) - best
    return maximise(codebook, counts, moment), error / x.shape[0]


def maximise(codebook: jax.Array, counts: jax.Array, moment: jax.Array) -> jax.Array:
    """The codewords f32[64, head_dim] of least weighted squared error.

    Args:
      codebook: the last, which stays where no vector belongs.
      counts: f32[64, 64], n.
      moment: f32[64, head_dim], sum_r (w_k. - i w_.k) r.
    """
    diagonal = (jnp.sum(counts, axis=0) + jnp.sum(counts, axis=1))[:, None]
    apart = counts - counts.T
    # From the last codebook on, no iteration raises the error: codewords without vectors stay.
    return jax.scipy.sparse.linalg.cg(
        lambda c: diagonal * c + apart @ times_i(c), moment, codebook, tol=1e-6, maxiter=100,
        M=lambda c: c / jnp.where(diagonal > 0, diagonal, 1),
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("steps",))
def fit_level(
    x: jax.Array, key: jax.Array, high: jax.Array, *, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One level of all heads, with the temperature from `high` to `high` / 100.

    Args:  x: f32[heads, vectors, head_dim], what is left of the keys.  key: of the start.
    Returns: the codebook f16[heads, 64, head_dim] of least error that was met, what it leaves of
      `x`, and errors f32[heads, steps + 1], one per step and that of the result.
    """
    temperatures = high * 10.0 ** jnp.linspace(0, -2, steps)

    def head(x, key):
        start = jax.random.choice(key, x, (CODEWORDS,), replace=False)

        def step(carry, temperature):
            codebook, best, least = carry
            new, error = em_step(codebook, x, temperature)
            better = error < least
            best = jnp.where(better, codebook, best)
            return (new, best, jnp.minimum(error, least)), error

        carry = (start, start, jnp.asarray(jnp.inf, jnp.float32))
        (last, best, least), errors = jax.lax.scan(step, carry, temperatures)
        # The last codebook has not been tried yet.
        error = em_step(last, x, temperatures[-1])[1]
        best = jnp.where(error < least, last, best)
        return best.astype(jnp.float16), jnp.append(errors, jnp.minimum(error, least))

    codebook, errors = jax.lax.map(lambda a: head(*a), (x, jax.random.split(key, x.shape[0])))
    a, b = encode_keys(jnp.swapaxes(x, 0, 1), codebook[None])[:, :, 0]  # [vectors, heads]
    pick = lambda i: jax.vmap(lambda c, i: c[i], (0, 1))(codebook.astype(jnp.float32), i)
    return codebook, x - (pick(a) + times_i(pick(b))), errors


def fit_keys(
    x: np.ndarray, levels: int, *, steps: int, temperature: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The codebooks of a layer's keys.

    Args:
      x: f32[tokens, heads, head_dim], before RoPE.
      levels: how many.
      steps: of expectation maximisation, per level.
      temperature: the first one, for tokens of length 1; levels 0 to 3 have it, the next four a
        tenth of it, and so on.
      seed: of the starts.

    Returns: f16[levels, heads, 64, head_dim], and the error f64[levels + 1] that is left after so
      many levels, relative to the energy of all tokens scaled to length 1.
    """
    norm = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=(1, 2), keepdims=True))
    x = (x / np.where(norm > 0, norm, 1)).astype(np.float32)
    left = jnp.asarray(x[: len(x) // _BLOCK * _BLOCK].transpose(1, 0, 2))
    energy = float(jnp.sum(jnp.square(left)))
    codebooks, errors = [], [1.0]
    for level in range(levels):
        key = jax.random.fold_in(jax.random.key(seed), level)
        high = np.float32(temperature * 0.1 ** (level // 4))
        codebook, left, _ = fit_level(left, key, high, steps=steps)
        codebooks.append(np.asarray(codebook))
        errors.append(float(jnp.sum(jnp.square(left))) / energy)
    return np.stack(codebooks), np.asarray(errors)
