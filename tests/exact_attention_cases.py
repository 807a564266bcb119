"""Cases of `exact_attention`, for its tests and for the execution of its instructions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.pallas_kernels.exact_attention import Slots, exact_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCase:
    name: str
    slots: Slots
    group: int = 4
    head_dim: int = 128
    dtype: np.dtype = jnp.bfloat16
    soft_cap: float | None = None

    def __str__(self):
        return self.name


def _case(name, num_sinks, ring, window=None, **options):
    return ExactCase(
        name=name, slots=Slots(num_sinks=num_sinks, ring=ring, window=window), **options
    )


CASES = {
    case.name: case
    for case in [
        _case("residual", 0, 128),
        _case("sinks-and-residual", 4, 128, head_dim=64, group=1),
        _case("sinks", 5, 0, group=8, dtype=jnp.float16),
        _case("window-d256", 2, 66, window=40, head_dim=256, group=20),
        _case("residual-256", 0, 256, head_dim=64),
        _case("soft-cap", 4, 128, group=2, soft_cap=1.0),
    ]
}
# Tokens of each sequence that are encoded.
FIRST = np.array([0, 0, 96, 1000, 64], np.int32)
HEADS = 2


def arguments(case: ExactCase, seed: int = 0) -> tuple:
    """What `exact_attention` takes, but for the slots."""
    rng, batch = np.random.default_rng(seed), len(FIRST)
    draw = lambda *s: rng.normal(size=(batch, *s)).astype(np.float32)
    slots = case.slots.num_sinks + case.slots.ring
    q = draw(HEADS, case.group, case.head_dim) * case.head_dim**-0.5
    k, v = draw(slots, HEADS, case.head_dim), draw(slots, HEADS, case.head_dim)
    if case.slots.ring:
        first = FIRST
        length = case.slots.num_sinks + first + [0, 1, 7, case.slots.ring, case.slots.ring - 1]
        length[0] = 0
    else:
        first, length = np.zeros_like(FIRST), np.array([0, 1, 3, 5, 900])
    query = np.maximum(length - 1, 0)
    query[-1] = length[-1]  # of a sequence that is over: nothing of its own is there
    seen = visible(case, first, length, query)
    for a in (k, v):
        a[~seen] = np.nan
    numbers = (jnp.asarray(a, jnp.int32) for a in (first, length, query))
    return *(jnp.asarray(a).astype(case.dtype) for a in (q, k, v)), *numbers


def visible(case: ExactCase, first, length, query) -> np.ndarray:
    """bool[sequences, slots], token by token."""
    slots = case.slots
    seen = np.zeros((len(first), slots.num_sinks + slots.ring), bool)
    for b in range(len(first)):
        for position in range(min(length[b], query[b] + 1)):
            if slots.window is not None and query[b] - position >= slots.window:
                continue
            if position < slots.num_sinks:
                seen[b, position] = True
            elif position - slots.num_sinks >= first[b] and slots.ring:
                seen[b, slots.num_sinks + (position - slots.num_sinks) % slots.ring] = True
    return seen


def check(case: ExactCase, interpret: bool = False) -> None:
    """
    Raises: AssertionError if it is not what NumPy gives in float64.
    """
    given = arguments(case)
    options = dict(soft_cap=case.soft_cap, interpret=interpret)
    run = jax.jit(lambda *a: exact_attention(*a, case.slots, **options))
    numerator, denominator, maximum = (np.asarray(a, np.float64) for a in run(*given))
    q, k, v = (np.asarray(a, np.float64) for a in given[:3])
    seen = visible(case, *map(np.asarray, given[3:]))
    mask = seen[:, None, None]  # [B, 1, 1, T]
    k, v = (np.where(seen[:, :, None, None], a, 0) for a in (k, v))
    scores = np.einsum("bhgd,bthd->bhgt", q, k)
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    scores = np.where(mask, scores, -np.inf)
    some = np.broadcast_to(mask.any(-1), maximum.shape)
    np.testing.assert_array_equal(np.isfinite(maximum), some)
    np.testing.assert_array_equal(denominator > 0, some)
    top = np.where(some, scores.max(-1, initial=-np.inf), 0)
    weights = np.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = numerator / np.where(some, denominator, 1)[..., None]
    expected = np.einsum("bhgt,bthd->bhgd", weights, v) / np.where(some, total, 1)[..., None]
    # Weights are rounded to the dtype of values.
    np.testing.assert_allclose(out, expected, atol=4e-3, rtol=0)
    log_sum = np.log(denominator[some]) + maximum[some]
    np.testing.assert_allclose(log_sum, np.log(total[some]) + top[some], atol=1e-4, rtol=0)
