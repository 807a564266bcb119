"""Attention among the tokens of a prompt: flash attention of the platforms against plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax import prefill
from nqkv_jax.partial import attend_new


def prompt(size=256, head_dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q = draw(2, 2, 3, size, head_dim) * jnp.asarray(head_dim**-0.5, dtype)
    k, v = draw(2, size, 2, head_dim), draw(2, size, 2, head_dim)
    valid = jnp.arange(size)[None] < jnp.array([[size], [100]])
    # What stands in the place of pads must not matter.
    k, v = (jnp.where(valid[:, :, None, None], x, jnp.nan) for x in (k, v))
    return q, k, v, jnp.broadcast_to(jnp.arange(size), valid.shape), valid


@pytest.mark.parametrize("window, soft_cap", [(None, None), (40, None), (None, 1.0)])
def test_splash_attention(window, soft_cap):
    arguments, options = prompt(), dict(window=window, soft_cap=soft_cap)
    valid = arguments[-1][:, None, None]
    expected = jax.jit(functools.partial(attend_new, **options))(*arguments)
    splash = functools.partial(prefill._splash, **options, interpret=True)
    out = jax.jit(splash)(*arguments)
    log_sum = lambda p: jnp.where(valid, p.maximum + jnp.log(p.denominator), 0)
    np.testing.assert_allclose(log_sum(out), log_sum(expected), rtol=0, atol=1e-5)
    kept = lambda p: jnp.where(valid[..., None], p.output(), 0)
    np.testing.assert_allclose(kept(out), kept(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "size, head_dim, flash", [(256, 64, True), (256, 80, False), (100, 64, False)]
)
def test_a_tpu_gets_flash_attention_where_it_can_serve(size, head_dim, flash):
    options = dict(window=None, soft_cap=None, implementation="auto")
    run = functools.partial(prefill.attend_prompt, **options)
    traced = jax.jit(run).trace(*prompt(size, head_dim, jnp.bfloat16))
    lowered = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in lowered("tpu")) == flash
    assert "custom_call" not in lowered("cpu")
