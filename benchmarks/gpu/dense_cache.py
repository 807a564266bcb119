"""A bfloat16 cache that `jax.nn.dot_product_attention` reads: the baseline of whole decoders."""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.partial import Partial
from nqkv_jax.stand_in import StandIn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache(StandIn):
    """Keys (after RoPE) and values as they are; takes the place of a `KVCache` when decoding.

    Attributes:
      keys, values: of every layer, [B, max_len, Hkv, D].
      lengths: i32[B], tokens that are there.
      implementation: "cudnn" or "xla".
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    implementation: str = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    def positions(self, num_tokens: int) -> jax.Array:
        return self.lengths[:, None] + jnp.arange(num_tokens)[None]

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        """See `StandIn.attend`; one new token per sequence."""
        batch, heads, group, size, head_dim = q.shape
        if size != 1 or window is not None or soft_cap is not None:
            raise NotImplementedError("DenseCache: one new token at a time, no window, and no cap")
        # `q` was rotated as if it came first.
        query = unrotated.reshape(batch, 1, heads * group, head_dim)
        if rotary is not None:
            positions = self.positions(1)
            query, k = rotary(query, positions), rotary(k, positions)
        write = jax.vmap(lambda rows, x, at: jax.lax.dynamic_update_slice_in_dim(rows, x, at, 0))
        stored = self.keys[layer].dtype
        keys = write(self.keys[layer], k.astype(stored), self.lengths)
        values = write(self.values[layer], v.astype(stored), self.lengths)
        with jax.numpy_dtype_promotion("standard"):  # which jax.nn counts on
            out = jax.nn.dot_product_attention(
                query.astype(stored), keys, values, key_value_seq_lengths=self.lengths + 1,
                implementation=self.implementation,
            )  # fmt: skip
        out = out.reshape(batch, heads, group, 1, head_dim).astype(jnp.float32)
        ones = jnp.ones(out.shape[:-1], jnp.float32)
        put = lambda arrays, a: (*arrays[:layer], a, *arrays[layer + 1 :])
        last = layer == len(self.keys) - 1
        cache = dataclasses.replace(
            self, keys=put(self.keys, keys), values=put(self.values, values),
            lengths=self.lengths + jnp.int32(last),
        )  # fmt: skip
        return Partial(numerator=out, denominator=ones, maximum=jnp.zeros_like(ones)), cache
