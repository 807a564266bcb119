"""Flushes of all layers at once, with the last: the same bits, and an error where it is missing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, ROTARY, make_cache, make_qkv

import nqkv_jax as nq

MAX_LEN, PROMPT, STEPS, LAYERS = 80, 40, 30, 2
# Of a state and sinks; of two windows and keys before RoPE; of values that want keys; of keys that
# want queries.
SCHEMES = [
    "nqkv:codebook=signed_cubic,residual=16,centre=True,hadamard=True,sinks=4",
    "kivi:bits=4,group_size=16,residual=48,sinks=1,keys=unrotated",
    "ott:group_size=16,residual=8,outliers=2,buffer=3,skip_layers=0",
    "squat:group_size=16,residual=48,subspace=6,keys=unrotated",
]


MORE = functools.partial(pytest.param, marks=pytest.mark.more)


def step(cache, q, k, v, num_new):
    """The tokens q, k and v [B, S, ...] in every layer: the outputs of both, and the cache."""
    outs = []
    for layer in range(LAYERS):
        turn = functools.partial(jnp.roll, shift=layer, axis=-1)
        out, cache = nq.attend(
            turn(q), turn(k), turn(v), cache, layer=layer, rotary=ROTARY, num_new=num_new
        )
        outs.append(out)
    return jnp.stack(outs), cache


@functools.partial(jax.jit, static_argnames="defer")
def decode(cache, q, k, v, num_new, *, defer):
    """Token by token, q [B, tokens, ...], of which num_new [tokens, B] count."""

    def one(cache, token):
        *qkv, num_new = token
        outs, cache = step(cache, *qkv, num_new)
        return cache, outs

    tokens = [jnp.moveaxis(a, 1, 0)[:, :, None] for a in (q, k, v)]
    cache = cache.defer_flush() if defer else cache
    cache, outs = jax.lax.scan(one, cache, (*tokens, num_new))
    return cache.flush(), outs


@pytest.mark.optimized
@pytest.mark.parametrize("spec", [MORE(SCHEMES[0]), SCHEMES[1], *map(MORE, SCHEMES[2:])])
def test_deferred_flushes_leave_the_same_bits(spec):
    prompt, tokens = make_qkv(PROMPT), make_qkv(STEPS, seed=1)
    cache = make_cache(spec, max_len=MAX_LEN, num_layers=LAYERS)
    assert cache.layers[1].key.waits and cache.layers[1].value.waits
    lengths = jnp.asarray([PROMPT, PROMPT - 9], jnp.int32)
    # A prompt is not put off, whatever the cache says.
    _, deferring = jax.jit(step)(cache.defer_flush(), *prompt, lengths)
    _, cache = jax.jit(step)(cache, *prompt, lengths)
    chex.assert_trees_all_equal(deferring.flush(), cache)
    # One sequence pauses for a while, the other comes to an end.
    num_new = np.ones((STEPS, BATCH), np.int32)
    num_new[5:12, 0] = num_new[25:, 1] = 0
    runs = [decode(cache, *tokens, jnp.asarray(num_new), defer=defer) for defer in (False, True)]
    chex.assert_trees_all_equal(*runs)
    lengths = np.asarray([PROMPT, PROMPT - 9]) + num_new.sum(axis=0)
    np.testing.assert_array_equal(runs[1][0].lengths, lengths)


def test_a_token_that_is_not_in_the_last_layer_is_the_only_one():
    q, k, v = make_qkv(2)
    first, second = ([a[:, t : t + 1] for a in (q, k, v)] for t in (0, 1))
    cache = make_cache("nqkv:residual=16", max_len=32, num_layers=3).defer_flush()
    _, cache = nq.attend(*first, cache, layer=1)
    message = r"every token in all layers, the last one last.*or cache\.flush\(\) after a token"
    with pytest.raises(ValueError, match=message):
        nq.attend(*second, cache, layer=1)
    with pytest.raises(ValueError, match=message):
        nq.save_cache(cache, "never_written.safetensors")
    for flushed in (nq.attend(*first, cache, layer=2)[1], cache.flush()):
        _, after = nq.attend(*second, flushed, layer=1)
        assert after.layers[1].lengths.tolist() == [2, 2]


def test_nothing_waits_in_a_scheme_without_a_residual():
    q, k, v = make_qkv(1)
    _, cache = nq.attend(q, k, v, make_cache("nqkv", max_len=8).defer_flush())
    assert cache.layers[0].unflushed is None
    chex.assert_trees_all_equal(cache.flush().layers, cache.layers)
