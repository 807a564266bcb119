"""Every scheme generates with both families of models: what the cache holds is what it counts."""

import jax
import numpy as np
import pytest
from cases import SCHEMES
from test_generate import random_prompts, tiny

from nqkv_jax import schemes
from nqkv_jax.models import generate
from nqkv_jax.plan import AbstractCaches

# Of tiny models of other sizes; a calibration belongs to one, and has tests of its own.
SPECS = {s.partition(":")[0]: s for s in SCHEMES if not s.startswith(("kvquant", "commvq"))}
SMALLER = {"quanto": "quanto:group_size=8,residual=16", "hqq": "hqq:group_size=8,residual=16",
           "kvq": "kvq:group_size=8,residual=16", "kivi": "kivi:group_size=8,residual=16",
           "squat": "squat:group_size=8,residual=16,block=4"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("name", SPECS)
def test_generates(name, kind):
    lm = tiny(kind, tokenizer=False)
    spec = SMALLER.get(name, SPECS[name])
    prompts = random_prompts(37, 5, seed=3)
    result = generate(lm, prompts, scheme=spec, max_new_tokens=24, max_len=80, prefill_chunk=16)
    assert [len(tokens) for tokens in result.tokens] == [24, 24]
    assert result.cache.lengths.tolist() == [37 + 23, 5 + 23]
    assert result.cache_bytes == sum(a.nbytes for a in jax.tree.leaves(result.cache))
    planned = AbstractCaches(lm.config, schemes.get(spec), np.float32)(batch=2, max_len=80)
    assert planned.nbytes == result.cache_bytes


@pytest.mark.parametrize("kind", ["llama", pytest.param("opt", marks=pytest.mark.more)])
def test_a_tile_is_filled_while_generating(kind):
    """`nqkv-plus` as it is by default, which encodes 128 tokens at a time, after 4 sinks."""
    lm = tiny(kind, tokenizer=False, num_attention_heads=2)
    prompts = random_prompts(120, 5, seed=3)
    result = generate(
        lm, prompts, scheme="nqkv-plus", max_new_tokens=24, max_len=150, prefill_chunk=64
    )
    assert result.cache.lengths.tolist() == [120 + 23, 5 + 23]
    for layer in result.cache.layers:
        assert np.asarray(layer.key.state.fitted).tolist() == [True, False]
        for side in (layer.key, layer.value):
            words = np.abs(np.asarray(jax.tree.leaves(side.body)[0], np.int32))
            assert words[0].any() and not words[1].any()
    planned = AbstractCaches(lm.config, schemes.get("nqkv-plus"), np.float32)
    assert planned(batch=2, max_len=150).nbytes == result.cache_bytes
