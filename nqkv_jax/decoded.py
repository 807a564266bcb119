"""What decoding token by token would see, for a whole text in parallel.

Scoring a text through the cache one token at a time is exact and slow. But what the query at
position t
sees is known in advance: a token is decoded from its codes if the scheme has encoded it by then,
and in full precision otherwise. `DecodedView` stands in for a cache and chooses, per query and
token, the raw or the decoded key and value. It encodes through the cache itself, so that both give
the same bits.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nqkv_jax.body import decode_groups
from nqkv_jax.partial import Partial, capped, mix, visible
from nqkv_jax.rotary import Rotary
from nqkv_jax.schemes.base import LayerShape, Scheme
from nqkv_jax.side import Side
from nqkv_jax.stand_in import StandIn

QUERY_TILE = 256  # queries at a time: bounds the scores to [heads, QUERY_TILE, tokens]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedView(StandIn):
    """Pass it to a model in place of a cache, with whole texts (see `StandIn`).

    Attributes:
      scheme: which cache to stand in for.
      num_layers: of the model.
      dtype: of the cache that it stands in for.
    """

    scheme: Scheme = dataclasses.field(metadata={"static": True})
    num_layers: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if not isinstance(self.scheme, Scheme):
            raise ValueError(
                f"DecodedView: expected scheme to be a Scheme, as schemes.get returns; got "
                f"{self.scheme!r}"
            )

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        """Attention as decoding would see it, and the view itself."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"DecodedView: has layers 0..{self.num_layers - 1}; got {layer}")
        batch, size, num_kv_heads, head_dim = k.shape
        shape = LayerShape(
            num_kv_heads=num_kv_heads, head_dim=head_dim, layer=layer, num_layers=self.num_layers
        )
        cache = self.scheme.layer(shape).init(
            shape, batch=batch, max_len=size, dtype=self.dtype, window=window, keep_all=True
        )
        positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
        rotate = rotary is not None and cache.rotated
        if rotate:
            k = rotary(k, positions)
        k, v = k.astype(self.dtype), v.astype(self.dtype)
        queries = None
        if cache.wants_queries:
            queries, num_sinks = unrotated, cache.key.num_sinks
            if rotate or (rotary is not None and cache.key.rotates):
                heads = unrotated.reshape(batch, size, -1, head_dim)
                at = cache.key.counted(positions - num_sinks) + num_sinks
                queries = rotary(heads, at).reshape(unrotated.shape)
        cache = cache.append(k, v, jnp.full(batch, size, jnp.int32), rotary, queries)
        if rotary is not None and not cache.rotated:
            k = rotary(k, positions)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        keys, values = _decoded(cache.key, k, rotary), _decoded(cache.value, v, None)

        def tile(start):
            queries = jax.lax.dynamic_slice_in_dim(q, start, width, axis=3)
            at = start + jnp.arange(width)
            score = lambda k: jnp.einsum(
                "bhgsd,bthd->bhgst", queries, k, preferred_element_type=jnp.float32
            )
            at = jnp.broadcast_to(at, (batch, width))
            mask = visible(at, positions, jnp.ones((batch, size), bool), window)
            scores = _choose(cache.key, at, size, score(keys), lambda: score(k))
            scores = jnp.where(mask[:, None, None], capped(scores, soft_cap), -jnp.inf)
            maximum = jnp.max(scores, axis=-1)
            weights = jnp.exp(scores - maximum[..., None])
            chosen = _encoded(cache.value, at, size)
            choose = lambda yes: jnp.where(yes[:, None, None], weights, 0)
            numerator = mix(choose(chosen), values, mask & chosen)
            if _ever_raw(cache.value):
                numerator = numerator + mix(choose(~chosen), v, mask & ~chosen)
            return Partial(
                numerator=numerator, denominator=jnp.sum(weights, axis=-1), maximum=maximum
            )

        width = min(QUERY_TILE, size)
        count = -(-size // width)
        # The last tile is moved back to fit; rows that two tiles compute are equal.
        starts = jnp.minimum(jnp.arange(count) * width, size - width)
        tiles = jax.lax.map(tile, starts)
        row = jnp.arange(size)
        index, offset = row // width, row - starts[row // width]
        return jax.tree.map(lambda a: _rows(a, index, offset), tiles), self


def _rows(tiles: jax.Array, index: jax.Array, offset: jax.Array) -> jax.Array:
    """[tiles, B, H, G, width, ...] -> [B, H, G, S, ...]."""
    return jnp.moveaxis(jnp.moveaxis(tiles, 4, 1)[index, offset], 0, 3)


def _ever_raw(side: Side) -> bool:
    """Whether some query may see some token of this side in full precision."""
    return not (side.window.immediate and side.num_sinks == 0)


def _decoded(side: Side, raw: jax.Array, rotary: Rotary | None) -> jax.Array:
    """`raw` [B, S, Hkv, D], with every token that ends up encoded replaced by its decoded self."""
    if not side.num_groups:
        return raw
    first = jnp.zeros((), jnp.int32)
    decoded = decode_groups(side, side.body, first, rotary=rotary, dtype=raw.dtype, folded=False)
    decoded = decoded[:, : raw.shape[1] - side.num_sinks]
    if side.period is not None and rotary is not None:
        token = jnp.broadcast_to(jnp.arange(decoded.shape[1]), decoded.shape[:2])
        decoded = rotary.rest()(decoded, token - side.counted(token))
    return jax.lax.dynamic_update_slice_in_dim(raw, decoded, side.num_sinks, axis=1)


def _encoded(side: Side, at: jax.Array, size: int) -> jax.Array:
    """bool[B, queries, size]: whether the query at `at` [B, queries] sees a token as decoded."""
    tokens = at + 1 if side.window.immediate else at
    count = side.window.encoded(jnp.maximum(tokens - side.num_sinks, 0))
    token = jnp.arange(size) - side.num_sinks
    return (token[None, None] >= 0) & (token[None, None] < count[..., None])


def _choose(side: Side, at: jax.Array, size: int, decoded: jax.Array, raw) -> jax.Array:
    if not _ever_raw(side):
        return decoded
    return jnp.where(_encoded(side, at, size)[:, None, None], decoded, raw())
