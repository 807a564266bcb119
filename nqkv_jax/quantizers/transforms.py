"""Maps applied before coding: rotations, and channel means and scales taken from the sequence.

All are affine, so attention need not undo them on every cached token: on keys they move to the
query, on values to the output, whose weights sum to 1 (`fold_queries`, `unfold_output`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import hadamard
from nqkv_jax.pallas_kernels.decode_attention import TiledCodes, VectorCodes
from nqkv_jax.quantizers.base import Context, Payload, Quantizer, State, Wrapper
from nqkv_jax.quantizers.block import (
    divide,
    pairwise_sum,
    rounded,
)

Params = Any  # a pytree of arrays: what a transform learnt from a sequence; () for fixed transforms


class Transform:
    """An invertible affine map of one token's [heads, head_dim], with parameters per sequence.

    Subclasses are frozen dataclasses, registered as pytrees. The defaults are those of a linear
    map that is fixed; all arrays are float32.
    """

    def check(self, heads: int, head_dim: int) -> None:
        """Raises ValueError, saying what would be valid, if this shape cannot be transformed."""

    def init(self, heads: int, head_dim: int) -> Params:
        """The parameters before anything was seen: those of the identity."""
        return ()

    def fit(self, x: jax.Array) -> Params:
        """The parameters for `x` [tokens, heads, head_dim]."""
        return ()

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """The map, on `x` [..., heads, head_dim]."""
        raise NotImplementedError

    def invert(self, params: Params, y: jax.Array) -> jax.Array:
        """Its inverse."""
        raise NotImplementedError

    def fold_query(self, params: Params, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(q', shift) such that <q, x> = <q', apply(x)> + shift: [..., heads], or None for 0."""
        raise NotImplementedError

    def unfold_output(self, params: Params, out: jax.Array) -> jax.Array:
        """Turns sum_t w_t apply(x_t) into sum_t w_t x_t, for weights that sum to 1."""
        # An affine map commutes with a weighted mean, and so does its inverse.
        return self.invert(params, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard(Transform):
    """The normalised Hadamard transform along head_dim.

    Made of sums and differences in a fixed order, so that a token is transformed to the same bits
    however many come with it. `nqkv_jax/hadamard.py` says which sizes there are.

    Attributes:
      seed: for random signs ahead of the transform (a randomised Hadamard); None for none.
      size: channels that are transformed together; None for head_dim. A part of head_dim makes a
        block-diagonal map. A multiple of it mixes heads: such a map moves neither to a query nor to
        the output, which belong to one head each, and is for keys stored before RoPE, which are
        decoded before they meet a query.
    """

    seed: int | None = dataclasses.field(default=None, metadata={"static": True})
    size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def check(self, heads: int, head_dim: int) -> None:
        size = head_dim if self.size is None else self.size
        if hadamard.core_size(size) is None:
            raise ValueError(
                f"Hadamard: size (by default head_dim) must be one of a known Hadamard matrix; got "
                f"{size}. Give a size that divides head_dim, such as "
                f"{hadamard.largest_hadamard(head_dim)}, or use Rotation(seed=0), which takes any "
                "head_dim"
            )
        if heads * head_dim % size or (size % head_dim and head_dim % size):
            raise ValueError(
                f"Hadamard: size must divide head_dim = {head_dim}, or be head_dim times a divisor "
                f"of the {heads} KV heads; got {size}"
            )

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        rows = self._rows(x)
        signs = self._signs(rows)
        return rounded(_hadamard(rows if signs is None else rows * signs).reshape(x.shape))

    def invert(self, params: Params, y: jax.Array) -> jax.Array:
        rows = self._rows(y)
        signs, x = self._signs(rows), _hadamard(rows, inverse=True)
        return (x if signs is None else x * signs).reshape(y.shape)

    def fold_query(self, params: Params, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        self._check_foldable(q)
        return self.apply(params, q), None

    def unfold_output(self, params: Params, out: jax.Array) -> jax.Array:
        self._check_foldable(out)
        return super().unfold_output(params, out)

    def _check_foldable(self, x: jax.Array) -> None:
        if self.size is not None and self.size > x.shape[-1]:
            raise ValueError(
                f"Hadamard: size={self.size} mixes KV heads of {x.shape[-1]}, whose queries and "
                "attention weights differ; use it for keys before RoPE (Unrotated)"
            )

    def _rows(self, x: jax.Array) -> jax.Array:
        """`x` [..., heads, head_dim] with what is transformed together along the last axis."""
        return x if self.size is None else x.reshape(*x.shape[:-2], -1, self.size)

    def _signs(self, x: jax.Array) -> np.ndarray | None:
        if self.seed is None:
            return None
        signs = np.random.default_rng(self.seed).integers(0, 2, x.shape[-1]) * 2 - 1
        return _like_rank(signs.astype(np.float32), x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation(Transform):
    """A random orthogonal matrix along head_dim (any), the same for every head.

    A matrix product adds in an order that depends on the number of tokens in a call: the stored
    bits may differ in ties between one token at a time and many. `Hadamard` has no such limit.

    Attributes:
      seed: of the Gaussian matrix whose orthogonal factor this is.
    """

    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        return _matmul(x, _orthogonal(self.seed, x.shape[-1]))

    def invert(self, params: Params, y: jax.Array) -> jax.Array:
        return _matmul(y, _orthogonal(self.seed, y.shape[-1]).T)

    def fold_query(self, params: Params, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return self.apply(params, q), None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centre(Transform):
    """Subtracts the mean of each channel over the first tokens of the sequence.

    A constant added to every key shifts all scores of a query alike and cancels in the softmax; the
    mean of values is added once to the output. The parameters are the means, f32[heads, head_dim].
    """

    def init(self, heads: int, head_dim: int) -> Params:
        return jnp.zeros((heads, head_dim), jnp.float32)

    def fit(self, x: jax.Array) -> Params:
        return _mean(x)[0]

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        return x - _like_rank(params, x)

    def invert(self, params: Params, y: jax.Array) -> jax.Array:
        return y + _like_rank(params, y)

    def fold_query(self, params: Params, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return q, jnp.sum(q * _like_rank(params, q), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standardise(Transform):
    """Subtracts the mean of each channel over the first tokens, and divides by the deviation.

    The parameters are (mean, deviation), f32[heads, head_dim] each; the deviation of a channel that
    is constant, up to rounding, is taken as 1.
    """

    def init(self, heads: int, head_dim: int) -> Params:
        return jnp.zeros((heads, head_dim), jnp.float32), jnp.ones((heads, head_dim), jnp.float32)

    def fit(self, x: jax.Array) -> Params:
        mean = _mean(x)
        # In units of the largest deviation, so that no square overflows or underflows.
        largest = jnp.max(jnp.abs(x - mean), axis=0, keepdims=True)
        # The mean of equal numbers may be off by roundings: what is left is no deviation.
        constant = largest <= np.float32(1e-6) * jnp.max(jnp.abs(x), axis=0, keepdims=True)
        unit = jnp.where(constant, np.float32(1), largest)
        squares = rounded(jnp.square(divide(x - mean, unit)))
        deviation = unit * jnp.sqrt(_mean(squares))
        return mean[0], jnp.where(constant, np.float32(1), deviation)[0]

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        mean, deviation = (_like_rank(p, x) for p in params)
        return divide(x - mean, deviation)

    def invert(self, params: Params, y: jax.Array) -> jax.Array:
        mean, deviation = (_like_rank(p, y) for p in params)
        return y * deviation + mean

    def fold_query(self, params: Params, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        mean, deviation = (_like_rank(p, q) for p in params)
        return q * deviation, jnp.sum(q * mean, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformedState:
    """State of `Transformed`: no leaves where nothing depends on the sequence."""

    params: tuple  # of each transform
    fitted: jax.Array | None  # bool[]; None if no transform has parameters
    inner: State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transformed(Wrapper):
    """Encodes with `inner` what `transforms`, in their order, make of the tokens.

    Transforms with parameters (means, deviations) are fitted, each to what the ones before it
    return, on the first tokens that the quantizer observes, and then stay: the state belongs to a
    sequence.
    """

    inner: Quantizer
    transforms: tuple[Transform, ...]

    def check(self, heads: int, head_dim: int) -> None:
        for transform in self.transforms:
            transform.check(heads, head_dim)
        super().check(heads, head_dim)

    def init_state(self, heads: int, head_dim: int) -> TransformedState:
        params = tuple(t.init(heads, head_dim) for t in self.transforms)
        fitted = jnp.zeros((), jnp.bool_) if jax.tree.leaves(params) else None
        inner = self.inner.init_state(heads, head_dim)
        return TransformedState(params=params, fitted=fitted, inner=inner)

    def observe(self, x: jax.Array, context: Context) -> TransformedState:
        state = self._state(context, x)
        x, params = x.astype(jnp.float32), []
        for transform, old in zip(self.transforms, state.params, strict=True):
            if jax.tree.leaves(old):
                keep = functools.partial(jnp.where, state.fitted)
                old = jax.tree.map(keep, old, transform.fit(x))
            params.append(old)
            x = transform.apply(old, x)
        inner = self.inner.observe(x, dataclasses.replace(context, state=state.inner))
        fitted = None if state.fitted is None else jnp.ones((), jnp.bool_)
        return TransformedState(params=tuple(params), fitted=fitted, inner=inner)

    def observe_query(self, q: jax.Array, context: Context) -> TransformedState:
        state = self._state(context, q[:, 0])
        heads_last = jnp.moveaxis(q, 1, 0).astype(jnp.float32)  # [query heads, heads, head_dim]
        for transform, params in zip(self.transforms, state.params, strict=True):
            heads_last, _ = transform.fold_query(params, heads_last)
        inner = dataclasses.replace(context, state=state.inner)
        inner = self.inner.observe_query(jnp.moveaxis(heads_last, 0, 1), inner)
        return dataclasses.replace(state, inner=inner)

    def quantize(self, x: jax.Array, context: Context) -> Payload:
        x, inner = self._transformed(x, context)
        return self.inner.quantize(x, inner)

    @property
    def step(self) -> int:
        return self.inner.step

    def splice(
        self, body: Payload, x: jax.Array, first: jax.Array, last: jax.Array, context: Context
    ) -> Payload:
        x, inner = self._transformed(x, context)
        return self.inner.splice(body, x, first, last, inner)

    def dequantize(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        inner = dataclasses.replace(context, state=self._inner_state(context))
        x = self.inner.dequantize(payload, inner, jnp.float32)
        return self._invert(x, context).astype(dtype)

    def fold_queries(self, q: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        state, shift, dtype = self._state(context, q), None, q.dtype
        q = q.astype(jnp.float32)
        for transform, params in zip(self.transforms, state.params, strict=True):
            q, more = transform.fold_query(params, q)
            shift = _add(shift, more)
        q, more = self.inner.fold_queries(q, dataclasses.replace(context, state=state.inner))
        return q.astype(dtype), _add(shift, more)

    def dequantize_folded(self, payload: Payload, context: Context, dtype=jnp.float32) -> jax.Array:
        inner = dataclasses.replace(context, state=self._inner_state(context))
        return self.inner.dequantize_folded(payload, inner, dtype)

    def waves(self, context: Context, dtype=jnp.float32) -> jax.Array | None:
        return self.inner.waves(context, dtype)

    def tiled_codes(self, body: Payload, context: Context) -> TiledCodes | VectorCodes | None:
        return self.inner.tiled_codes(body, context)

    def unfold_output(self, out: jax.Array, context: Context) -> jax.Array:
        inner = dataclasses.replace(context, state=self._inner_state(context))
        unfolded = self.inner.unfold_output(out.astype(jnp.float32), inner)
        for transform, params in self._reversed(context, out):
            unfolded = transform.unfold_output(params, unfolded)
        return unfolded.astype(out.dtype)

    def _transformed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """What the inner quantizer is given."""
        state = self._state(context, x)
        x = x.astype(jnp.float32)
        for transform, params in zip(self.transforms, state.params, strict=True):
            x = transform.apply(params, x)
        return x, dataclasses.replace(context, state=state.inner)

    def _invert(self, x: jax.Array, context: Context) -> jax.Array:
        for transform, params in self._reversed(context, x):
            x = transform.invert(params, x)
        return x

    def _reversed(self, context: Context, x: jax.Array):
        params = self._state(context, x).params
        return reversed(list(zip(self.transforms, params, strict=True)))

    def _state(self, context: Context, x: jax.Array) -> TransformedState:
        """The state in `context`, which may be () where there is nothing to keep."""
        if isinstance(context.state, TransformedState):
            return context.state
        state = self.init_state(*x.shape[-2:])
        if jax.tree.leaves(state):
            raise ValueError(
                "Transformed: context.state must be what init_state and observe return, because a "
                f"transform depends on the sequence; got {type(context.state).__name__}"
            )
        return state

    def _inner_state(self, context: Context) -> State:
        return context.state.inner if isinstance(context.state, TransformedState) else ()


def _add(shift: jax.Array | None, more: jax.Array | None) -> jax.Array | None:
    """The sum, None being 0."""
    if shift is None or more is None:
        return more if shift is None else shift
    return shift + more


def _like_rank(p, x: jax.Array):
    """`p` with leading axes of 1, to broadcast against `x` explicitly."""
    return p.reshape((1,) * (x.ndim - p.ndim) + p.shape)


def _mean(x: jax.Array) -> jax.Array:
    """Mean over the tokens, [1, heads, head_dim], in a fixed order of summation."""
    return divide(pairwise_sum(x, 0), np.float32(x.shape[0]))


def _hadamard(x: jax.Array, *, inverse: bool = False) -> jax.Array:
    """H x / sqrt(n) along the last axis, for H Sylvester's matrix times a core; or H^T x."""
    shape, n = x.shape, x.shape[-1]
    half = order = hadamard.core_size(n)
    if order > 1:
        core = hadamard.core(order).T if inverse else hadamard.core(order)
        rows = x.reshape(*shape[:-1], n // order, order)
        columns = zip(jnp.split(rows, order, axis=-1), core.T, strict=True)
        x = functools.reduce(jnp.add, [part * _like_rank(signs, rows) for part, signs in columns])
    while half < n:
        first, second = jnp.split(x.reshape(*shape[:-1], n // (2 * half), 2, half), 2, axis=-2)
        x = jnp.concatenate([first + second, first - second], axis=-2)
        half *= 2
    return x.reshape(shape) * np.float32(n**-0.5)


@functools.lru_cache
def _orthogonal(seed: int, n: int) -> np.ndarray:
    """f32[n, n], orthogonal, uniformly distributed (Mezzadri, 2007)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _matmul(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """x @ matrix in full float32, also on hardware whose default is less."""
    return jnp.matmul(x, jnp.asarray(matrix), precision=jax.lax.Precision.HIGHEST)
