"""Quantize any pytree of keys and values: for arrays that are already there, outside a cache."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from nqkv_jax.quantizers.base import Context, Payload, Quantizer, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """An array [..., tokens, heads, head_dim] as its quantizer stored it.

    Leading axes can be sliced, mapped (`vmap`) and scanned over like those of an array, except
    where the quantizer itself has calibrated arrays, which have no such axes.

    Attributes:
      payload: leaves [..., groups, *leaf], `leaf` being the shape for one group of tokens.
      state: per sequence, leaves [..., *leaf]; without leaves for most quantizers.
      quantizer: what made the payload.
      sequence_shape: (tokens, heads, head_dim).
      dtype: of the original, and of what `dequantize` returns.
    """

    payload: Payload
    state: State
    quantizer: Quantizer
    sequence_shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the original array; the leading axes are read off the payload."""
        one = _one_group(self.quantizer, self.sequence_shape)
        leaf, single = jax.tree.leaves(self.payload)[0], jax.tree.leaves(one)[0]
        return (*leaf.shape[: leaf.ndim - single.ndim - 1], *self.sequence_shape)


def quantize(tree: Any, quantizer: Quantizer) -> Any:
    """Replaces every array of `tree` by a `QuantizedArray`.

    Args:    tree: any pytree of float arrays [..., tokens, heads, head_dim], tokens a multiple of
               `quantizer.group`. Each sequence has its own state and scales.
             quantizer: keys and values alike; call twice to treat them differently.
    Returns: a tree of the same structure. Pure: it can be jitted, vmapped and scanned.
    Raises:  ValueError if an array cannot be quantized, saying why.
    """
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            "quantize: expected a quantizer such as BlockQuantizer(codebooks.normal_float(4), "
            f"block_size=256); got {quantizer!r}. Schemes are for caches"
        )
    if quantizer.wants_queries or quantizer.wants_keys:
        raise ValueError(
            f"quantize: {type(quantizer).__name__} encodes by the queries or keys of the same "
            "tokens, which only a cache brings (`attend`). Take another quantizer"
        )
    return jax.tree.map(lambda x: _quantize_array(x, quantizer), tree)


def dequantize(tree: Any) -> Any:
    """Decodes every `QuantizedArray` of `tree` to its original shape and dtype.

    Other leaves stay as they are.

    Raises: ValueError if there is none, and leaves that are no floats: a cache, or what is in a
      `QuantizedArray`.
    """
    leaves = jax.tree.leaves(tree, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        for leaf in leaves:
            if not _is_floats(leaf):
                raise ValueError(
                    "dequantize: expected a tree of what `quantize` returned, QuantizedArray; got "
                    f"{_described(leaf)}. A cache is decoded by attend alone"
                )

    def decode(x):
        return _dequantize_array(x) if _is_quantized(x) else x

    return jax.tree.map(decode, tree, is_leaf=_is_quantized)


def stored_bits(tree: Any) -> float:
    """Bits per element that the arrays of `tree` occupy, from what is allocated.

    A `QuantizedArray` counts its codes, scales, zeros and all other payload, and its state, but not
    arrays of a calibrated quantizer, which sequences share. A plain array counts its itemsize.

    Raises: ValueError for leaves that are no numbers to keep, such as those of a cache, which
      counts its own (`cache.stored_bits`).
    """
    stored = elements = 0
    for leaf in jax.tree.leaves(tree, is_leaf=_is_quantized):
        if not _is_quantized(leaf) and not _is_floats(leaf):
            raise ValueError(
                "stored_bits: every leaf must be floats or what `quantize` returned; got "
                f"{_described(leaf)}. Of a cache, see "
                "cache.stored_bits and cache.nbytes"
            )
        elements += math.prod(jnp.shape(leaf))
        arrays = (leaf.payload, leaf.state) if _is_quantized(leaf) else leaf
        stored += sum(8 * math.prod(jnp.shape(a)) * _itemsize(a) for a in jax.tree.leaves(arrays))
    if not elements:
        raise ValueError("stored_bits: the tree has no elements")
    return stored / elements


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _is_floats(x: Any) -> bool:
    """Whether it is an array of floats, or one."""
    return jnp.issubdtype(x.dtype, jnp.floating) if hasattr(x, "dtype") else isinstance(x, float)


def _itemsize(x: Any) -> int:
    """Bytes per element; NumPy's float64 are 8, whatever jax would make of them."""
    return x.dtype.itemsize if hasattr(x, "dtype") else jnp.result_type(x).itemsize


def _described(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}" if hasattr(x, "dtype") else f"{x!r:.80}"


def _quantize_array(x: jax.Array, quantizer: Quantizer) -> QuantizedArray:
    if not _is_floats(x) or jnp.ndim(x) < 3:
        raise ValueError(
            "quantize: every leaf must be floats [..., tokens, heads, head_dim]; "
            f"got {_described(x)}"
        )
    shape, dtype = jnp.shape(x), jnp.result_type(x)
    tokens, heads, head_dim = shape[-3:]
    group = quantizer.group
    if tokens == 0 or tokens % group:
        raise ValueError(
            "quantize: the number of tokens must be a positive multiple of the quantizer's group "
            f"of {group}; got {tokens} in {list(shape)}. Keep the last {tokens % group} tokens "
            "apart, or use a cache, which does"
        )
    quantizer.check(heads, head_dim)

    def encode(x):  # [tokens, heads, head_dim]
        context = _context(tokens, quantizer.init_state(heads, head_dim))
        state = quantizer.observe(x, context)
        groups = (tokens // group, group)

        def encode_group(x, positions):
            return quantizer.quantize(x, Context(positions=positions, state=state))

        rows = x.reshape(*groups, heads, head_dim)
        return jax.vmap(encode_group)(rows, context.positions.reshape(groups)), state

    payload, state = _map_leading(encode, len(shape) - 3)(jnp.asarray(x))
    return QuantizedArray(
        payload=payload, state=state, quantizer=quantizer,
        sequence_shape=(tokens, heads, head_dim), dtype=dtype,
    )  # fmt: skip


def _dequantize_array(x: QuantizedArray) -> jax.Array:
    tokens, quantizer = x.sequence_shape[0], x.quantizer

    def decode(payload, state):
        positions = jnp.arange(tokens, dtype=jnp.int32).reshape(-1, quantizer.group)

        def decode_group(payload, positions):
            context = Context(positions=positions, state=state)
            return quantizer.dequantize(payload, context, x.dtype)

        return jax.vmap(decode_group)(payload, positions).reshape(x.sequence_shape)

    return _map_leading(decode, len(x.shape) - 3)(x.payload, x.state)


def _context(tokens: int, state: State) -> Context:
    return Context(positions=jnp.arange(tokens, dtype=jnp.int32), state=state)


def _map_leading(function, axes: int):
    """`function` mapped over the first `axes` axes of its arguments."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def _one_group(quantizer: Quantizer, sequence_shape: tuple[int, int, int]) -> Payload:
    """The shapes of the payload of one group."""

    def one():
        heads, head_dim = sequence_shape[1:]
        context = _context(quantizer.group, quantizer.init_state(heads, head_dim))
        return quantizer.quantize(jnp.zeros((quantizer.group, heads, head_dim)), context)

    return jax.eval_shape(one)
