"""Attention of one query per sequence over keys and values that stay packed."""

import functools

import jax
import jax.numpy as jnp

from nqkv_jax.pallas_kernels.decode_attention import (
    mosaic_gpu,
    mosaic_tpu,
    mosaic_tpu_vectors,
    triton_vectors,
    xla,
    xla_vectors,
)
from nqkv_jax.pallas_kernels.decode_attention.codes import TiledCodes, Waves
from nqkv_jax.pallas_kernels.decode_attention.vectors import VectorCodes
from nqkv_jax.tiles import TOKENS

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "PLATFORMS",
    "TiledCodes",
    "VectorCodes",
    "Waves",
    "check_backend",
    "decode_attention",
    "room",
    "unsupported",
]

Codes = TiledCodes | VectorCodes

# By name, and by what both sides are.
KERNELS = {
    "mosaic_tpu": {TiledCodes: mosaic_tpu, VectorCodes: mosaic_tpu_vectors},
    "mosaic_gpu": {TiledCodes: mosaic_gpu},
    "triton": {VectorCodes: triton_vectors},
}
IMPLEMENTATIONS = ("auto", "xla", *KERNELS)
NAMES = {
    TiledCodes: "codes of single channels (as nqkv has)",
    VectorCodes: "codes of eight channels (as nsnquant has)",
}
KERNEL_ROOM = 1024  # tokens of a cache: some kernels read 512 at a time, beside a residual
# Those that "auto" takes, by the platform of `jax.lax.platform_dependent`. Not those for GPUs as
# long as none has been timed on one.
PLATFORMS = {"mosaic_tpu": "tpu"}


def decode_attention(
    q: jax.Array,
    key: Codes,
    value: Codes,
    lengths: jax.Array,
    *,
    first: jax.Array | None = None,
    soft_cap: float | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention over tokens first[b] <= t < lengths[b] of each sequence.

    Keys and values are decoded in registers, a tile of 128 tokens at a time. Products are in the
    dtype of `q`, by kernels for GPUs in float16 whatever that is, with sums, softmax and scales in
    float32.

    Args:
      q: float[B, Hkv, G, D], rotated and scaled; G query heads share a KV head. D is `key.width`:
        head_dim, and more if keys have waves, or their means are apart.
      key, value: the cache. Tokens beyond `lengths` may hold anything, but for 8-bit floats of
        values, which must be finite.
      lengths: i32[B], tokens that are there: at most 128 * tiles, of the side that has fewer.
      first: i32[B], the first token that is seen (a sliding window); None for 0.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None for no cap.
      implementation: "auto" is the fused kernel where the platform has one and it can serve the
        case (`PLATFORMS`), else "xla". A kernel's name (`KERNELS`) asks for that one.

    Returns:
      numerator f32[B, Hkv, G, head_dim] and denominator f32[B, Hkv, G], relative to exp(maximum),
      and maximum f32[B, Hkv, G], of the scores or near it, -inf where no token is seen. The output
      is numerator / denominator; parts over other tokens merge by their maxima.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: the implementation that was asked for cannot serve the case.
    """
    _check(q, key, value, lengths, first, soft_cap, implementation)
    lengths = lengths.astype(jnp.int32)
    first = jnp.zeros_like(lengths) if first is None else jnp.maximum(first.astype(jnp.int32), 0)
    reference = xla_vectors if isinstance(key, VectorCodes) else xla
    run = functools.partial(reference.decode_attention, soft_cap=soft_cap)
    arguments = (q, key, value, lengths, first)
    kernel = lambda name: functools.partial(
        _traced_once, run=KERNELS[name][type(key)].decode_attention, soft_cap=soft_cap
    )
    group = q.shape[2]
    if implementation in KERNELS:
        if reason := unsupported(implementation, key, value, group):
            raise NotImplementedError(f"decode_attention: {implementation} needs {reason}")
        return kernel(implementation)(*arguments)
    by_platform = {
        platform: kernel(name)
        for name, platform in PLATFORMS.items()
        if unsupported(name, key, value, group) is None
    }
    if implementation == "xla" or not by_platform:
        return run(*arguments)
    return jax.lax.platform_dependent(*arguments, **by_platform, default=run)


@functools.partial(jax.jit, static_argnames=("run", "soft_cap"))
def _traced_once(*arguments, run, soft_cap):
    """For all layers of a model: a kernel takes longer to trace than the rest of a layer, and is
    traced on every platform. Kernels are written for numbers of 32 bits."""
    with jax.enable_x64(False):
        return run(*arguments, soft_cap=soft_cap)


def unsupported(implementation: str, key: Codes, value: Codes, group: int) -> str | None:
    """What a kernel would need to serve the case, of `group` query heads per KV head, or None if it
    can."""
    kinds = KERNELS[implementation]
    if type(key) is not type(value) or type(key) not in kinds:
        served = " or ".join(NAMES[kind] for kind in kinds)
        got = " and ".join(dict.fromkeys(NAMES[type(side)] for side in (key, value)))
        return f"{served}; got {got}"
    return kinds[type(key)].unsupported(key, value, group)


def check_backend(implementation: str) -> None:
    """Raises NotImplementedError if jax's default backend is not the one that a kernel is for."""
    wanted = "tpu" if implementation == "mosaic_tpu" else "gpu"
    if implementation in KERNELS and jax.default_backend() != wanted:
        raise NotImplementedError(
            f"implementation: {implementation} needs a {wanted.upper()}, and jax for it; jax has "
            f"{jax.default_backend()} here. With auto, what there is decides"
        )


def room(implementation: str, tokens: int) -> int:
    """The tokens that a cache should have room for, if it is to hold so many: whole tiles, and,
    where a kernel is asked for, what any kernel reads at a time."""
    return max(-(-tokens // TOKENS) * TOKENS, KERNEL_ROOM if implementation in KERNELS else 0)


def _check(q, key, value, lengths, first, soft_cap, implementation) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"decode_attention: implementation must be one of {IMPLEMENTATIONS}; got "
            f"{implementation!r}"
        )
    key.check("key"), value.check("value")
    if type(key) is not type(value) or value.width != value.head_dim:
        raise ValueError(
            "decode_attention: expected key and value of one kind, and values without waves or "
            "means that are apart; "
            f"got {type(key).__name__} and {type(value).__name__} of {value.width} channels"
        )
    batch, heads = key.words.shape[0], key.num_heads
    if (value.words.shape[0], value.num_heads, value.head_dim) != (batch, heads, key.head_dim):
        raise ValueError(
            "decode_attention: key and value must agree in batch, heads and head_dim; got "
            f"words {key.words.shape} of head_dim {key.head_dim} and {value.words.shape} of "
            f"{value.head_dim}"
        )
    if q.ndim != 4 or (q.shape[0], q.shape[1], q.shape[3]) != (batch, heads, key.width):
        raise ValueError(
            f"decode_attention: expected q [{batch}, {heads}, query heads per KV head, "
            f"{key.width}]; got {q.shape}"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"decode_attention: expected q of float32, bfloat16 or float16; got {q.dtype}"
        )
    for name, a in (("lengths", lengths), ("first", first)):
        if a is not None and (a.shape != (batch,) or not jnp.issubdtype(a.dtype, jnp.integer)):
            raise ValueError(
                f"decode_attention: expected {name} i32[{batch}]; got {a.dtype} of {a.shape}"
            )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"decode_attention: expected soft_cap > 0 or None; got {soft_cap}")
