"""Waves in the TPU kernel: what cosines and sines of a token's angle add to its scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from nqkv_jax import tiles
from nqkv_jax.pallas_kernels.decode_attention.codes import Waves
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_common import product
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_plan import Plan


def operands(waves: Waves, q: jax.Array, plan: Plan) -> list[jax.Array]:
    """Queries [B, Hkv, 2, G, lanes], as they are and with cosine and sine in each other's place;
    what they meet where tiles start [tiles, 2, lanes], and at the places in them
    [fold, 128, lanes], in the order of the lanes of scores."""
    lanes = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % tiles.LANES)])
    join = lambda a, b: jnp.concatenate([a, b], axis=-1)
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, plan.group - q.shape[2]), (0, 0)))
    cosine, sine = jnp.split(q, 2, axis=-1)
    queries = jnp.stack([q, join(sine, cosine)], axis=2)
    cos, sin = waves.starts.cos[:, 0], waves.starts.sin[:, 0]
    starts = jnp.stack([join(cos, cos), join(sin, -sin)], axis=1)
    places = join(waves.places.cos, waves.places.sin)[:, 0]
    token = [(plan.fold * np.arange(tiles.LANES) + row) % tiles.TOKENS for row in range(plan.fold)]
    places = places[np.stack(token)].astype(plan.key.levels.dtype)
    return [lanes(queries), lanes(starts), lanes(places)]


def scores(q, starts, places, plan: Plan) -> list[jax.Array]:
    """What waves add to scores, f32[rows, 128] of each unit.

    By the addition theorems: queries are turned to where each tile starts, and meet its places.
    """
    turned = [
        q[0] * starts[tile, pl.ds(0, 1)] + q[1] * starts[tile, pl.ds(1, 1)]
        for tile in range(plan.step)
    ]
    turned = jnp.concatenate(turned, axis=0).astype(places.dtype)  # [tiles * group, lanes]
    by_row = [product(turned, places[row], 1) for row in range(plan.fold)]
    of_tile = lambda s, tile: s[tile * plan.group : (tile + 1) * plan.group]
    of_unit = lambda s, u: [of_tile(s, u * plan.fold + t) for t in range(plan.fold)]
    return [
        jnp.concatenate([plan.of_own_group(of_unit(s, u)) for s in by_row], axis=0)
        for u in range(plan.units)
    ]
