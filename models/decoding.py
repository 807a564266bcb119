"""The three compiled programs of generation: prefill a chunk, first token, decoding loop.

Each is one module-level `jit` whose static arguments say what the program is (the model's graph)
and no more: models of one architecture share programs, and no program keeps a model alive.
Parameters, cache, limits and the numbers of a sampling are arguments, so that a program serves
every prompt of a bucket.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nqkv_jax.cache import KVCache
from nqkv_jax.models.loading import apply
from nqkv_jax.models.sampling import Rules, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What the decoding loop carries. Between steps the latest token is not in the cache yet."""

    cache: KVCache
    token: jax.Array  # i32[B], the latest
    count: jax.Array  # i32[B], tokens generated
    tokens: jax.Array  # i32[B, max_len], those tokens
    done: jax.Array  # bool[B], a stop token came
    failed: jax.Array  # bool[B], a logit was not a number
    keys: jax.Array  # key[B], folded with `count` for every draw
    seen: jax.Array | None  # bool[B, V], only for a repetition penalty


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("logits", "cache"))
def prefill(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, num_new: jax.Array,
    logits: jax.Array, cache: KVCache,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Appends the next chunk of the prompts to the cache.

    Args:
      tokens, num_new: i32[B, chunk] and how many of them are valid, i32[B].
      logits: f32[B, V], kept for sequences whose prompt ended in an earlier chunk.

    Returns: the logits after the latest valid token, and the cache.
    """
    new, cache = apply(graphdef, params, tokens, cache, num_new=num_new, last_only=True)
    return jnp.where((num_new > 0)[:, None], new, logits), cache


@functools.partial(jax.jit, static_argnames="num_samples")
def repeat(logits: jax.Array, cache: KVCache, num_samples: int) -> tuple[jax.Array, KVCache]:
    """Logits and cache of `num_samples` sequences in a row for each one."""
    sequences = jnp.arange(cache.batch * num_samples) // num_samples
    return logits[sequences], cache.take(sequences)


@functools.partial(jax.jit, static_argnames="num_samples", donate_argnames=("cache", "seen"))
def start(
    logits: jax.Array, cache: KVCache, seen: jax.Array | None, seed: jax.Array,
    stop_ids: jax.Array, *, rules: Rules, num_samples: int,
) -> DecodeState:  # fmt: skip
    """The state after the first token, which the logits f32[B, V] of the prefill decide.

    `seed` is u32[]; `num_samples` sequences in a row continue one prompt.
    """
    batch = logits.shape[0]
    fold_in = jax.vmap(jax.random.fold_in)
    row, key = jnp.arange(batch), jax.random.key(seed)
    keys = fold_in(jnp.broadcast_to(key, (batch,)), row // num_samples)
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, cache.max_len), jnp.int32),
        done=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
        keys=fold_in(keys, row % num_samples),
        seen=seen,
    )
    return _choose(state, logits, stop_ids, rules)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef, params: nnx.State, state: DecodeState, stopped: jax.Array,
    stop_ids: jax.Array, limit: jax.Array, *, rules: Rules,
) -> DecodeState:  # fmt: skip
    """Generates until every sequence is done or has `limit` i32[] tokens.

    `stopped` bool[B] are sequences that the caller has ended, on top of `state.done`. A sequence
    that is done costs its share of a step, but neither its tokens nor its cache change.
    """

    def step(state: DecodeState) -> DecodeState:
        logits, cache = apply(
            graphdef, params, state.token[:, None], state.cache,
            num_new=(~state.done).astype(jnp.int32), last_only=True,
        )  # fmt: skip
        state = dataclasses.replace(state, cache=cache)
        return _choose(state, logits, stop_ids, rules)

    state = dataclasses.replace(state, done=state.done | stopped, cache=state.cache.defer_flush())
    state = jax.lax.while_loop(lambda s: jnp.any(~s.done & (s.count < limit)), step, state)
    return dataclasses.replace(state, cache=state.cache.flush())


def _choose(
    state: DecodeState, logits: jax.Array, stop_ids: jax.Array, rules: Rules
) -> DecodeState:
    """Takes the next token of the sequences that are not done."""
    active, row = ~state.done, jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    token = jnp.where(active, sample(logits, keys, rules, state.seen), state.token)
    # Past the end of the row nothing is written: a done sequence keeps what it has.
    at = jnp.where(active, state.count, state.tokens.shape[1])
    failed = state.failed | active & jnp.any(jnp.isnan(logits), axis=1)
    stop = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
    return dataclasses.replace(
        state,
        token=token,
        count=state.count + active.astype(jnp.int32),
        tokens=state.tokens.at[row, at].set(token, mode="drop"),
        done=state.done | stop | failed,
        failed=failed,
        seen=None if state.seen is None else state.seen.at[row, token].set(True),
    )
