"""What a model's keys and values are, and how much the loss depends on them.

    _, recorder = lm.apply(lm.params, tokens, Recorder())
    (k, v), ... = recorder.layers                # one pair per layer, keys before RoPE

With `deltas` a perturbation is added to them before they are used, so that the gradient with
respect to deltas of zero is that of the keys and values themselves.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.windows import encode, opening
from nqkv_jax.partial import attend_new
from nqkv_jax.stand_in import StandIn

TOKEN_BLOCK = 128  # tokens whose logits are held at once
KeysValues = tuple[jax.Array, jax.Array]  # [B, S, Hkv, D] each, keys before RoPE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(StandIn):
    """Pass it to a model in place of a cache, with whole texts: exact causal attention.

    Attributes:
      deltas: of each layer, added to its keys before RoPE and to its values; None for nothing.
      layers: keys and values, deltas included, of the layers that have been called.
    """

    deltas: tuple[KeysValues, ...] | None = None
    layers: tuple[KeysValues, ...] = ()

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        """Raises ValueError if layers do not come in order."""
        if layer != len(self.layers):
            raise ValueError(
                f"Recorder: expected layer {len(self.layers)} to come next; got layer={layer}. "
                "Start every pass through the model with a new one"
            )
        if self.deltas is not None:
            dk, dv = self.deltas[layer]
            k, v = k + dk, v + dv
        positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])

        def exact(q, k, v):
            k = k if rotary is None else rotary(k, positions)
            valid = jnp.ones(k.shape[:2], jnp.bool_)
            return attend_new(q, k, v, positions, valid, window, soft_cap)

        # The scores are computed again for the gradient: kept, they would take S^2 per layer.
        out = jax.checkpoint(exact)(q, k, v)
        return out, dataclasses.replace(self, layers=(*self.layers, (k, v)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRecorder(Recorder):
    """Keeps also what the attention is made of.

    Attributes:
      scores: of the same layers, queries [B, S, Hq, D] and keys [B, S, Hkv, D] whose products are
        the scores: after RoPE, and scaled.
    """

    scores: tuple[KeysValues, ...] = ()

    def attend(self, q, k, v, unrotated, *, layer, rotary, window, soft_cap):
        out, after = super().attend(
            q, k, v, unrotated, layer=layer, rotary=rotary, window=window, soft_cap=soft_cap
        )
        keys = after.layers[-1][0]
        if rotary is not None:
            keys = rotary(keys, jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]))
        queries = jnp.moveaxis(q, 3, 1)
        queries = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])
        return out, dataclasses.replace(after, scores=(*self.scores, (queries, keys)))


def loss_and_gradients(
    lm: Any, params: Any, tokens: jax.Array
) -> tuple[jax.Array, tuple[KeysValues, ...], tuple[KeysValues, ...]]:
    """The loss of a text, its keys and values, and the gradients with respect to them.

    Args:
      lm: with the protocol of `nqkv_jax.evaluation`; only `hidden` and `head` are used.
      params: of the model.
      tokens: i32[S], S >= 2.

    Returns:
      The mean cross-entropy of tokens 1.., f32[]; keys and values of every layer, [S, Hkv, D]; and
      the gradients, likewise. Their squares are the diagonal of the (empirical) Fisher information.
    """
    blank = jax.eval_shape(lambda p: lm.hidden(p, tokens[None], Recorder())[1].layers, params)
    deltas = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), blank)

    def loss(deltas):
        hidden, recorder = lm.hidden(params, tokens[None], Recorder(deltas=deltas))
        head = lambda hidden: lm.head(params, hidden[None])[0].astype(jnp.float32)
        return mean_cross_entropy(head, hidden[0, :-1], tokens[1:]), recorder.layers

    (value, recorded), gradients = jax.value_and_grad(loss, has_aux=True)(deltas)
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)
    return value, first(recorded), first(gradients)


def mean_cross_entropy(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array
) -> jax.Array:
    """Mean over tokens of -log softmax(head(hidden))[target], f32[].

    Neither logits nor their gradient exist for more than `TOKEN_BLOCK` tokens: for the gradient
    they are computed again, block by block.

    Args:  head: [tokens, width] -> f32[tokens, vocabulary].  hidden: [S, width].  targets: i32[S].
    """
    size = targets.shape[0]
    width = min(TOKEN_BLOCK, size)
    count = -(-size // width)

    @jax.checkpoint
    def block(start):
        # The last block is moved back to fit; what it repeats does not count again.
        first = jnp.minimum(start, size - width)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, width)
        logits = head(cut(hidden))
        chosen = jnp.take_along_axis(logits, cut(targets)[:, None], axis=1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=1) - chosen
        return jnp.sum(jnp.where(first + jnp.arange(width) >= start, loss, 0))

    return jnp.sum(jax.lax.map(block, jnp.arange(count) * width)) / size


def windows(lm: Any, text: str | Sequence[int], samples: int, seqlen: int) -> np.ndarray:
    """i32[samples, seqlen]: stretches of a text, spread evenly over it, after the model's opening.

    Args:  text: a string, encoded without special tokens; or token ids.

    Raises: ValueError if a size is not positive or more than the model has positions for, the text
      is shorter than the windows together, or its ids are wrong.
    """
    whole_numbers("calibrate", samples=samples, seqlen=seqlen)
    if samples < 1 or seqlen < 2:
        raise ValueError(
            f"calibrate: expected samples >= 1 and seqlen >= 2; got {samples} and {seqlen}"
        )
    if seqlen > lm.config.max_positions:
        raise ValueError(
            f"calibrate: seqlen must be at most {lm.config.max_positions}, the positions that "
            f"{lm.name} has; got {seqlen}"
        )
    tokens = encode("calibrate", lm, text)
    if tokens.size < samples * seqlen:
        raise ValueError(
            f"calibrate: samples={samples} of seqlen={seqlen} tokens each need "
            f"{samples * seqlen:,} tokens of text; got {tokens.size:,}. Give a longer text, or "
            "fewer or shorter windows"
        )
    begin = np.asarray(opening(lm), np.int32)
    starts = np.linspace(0, tokens.size - seqlen, samples).astype(np.int64)
    return np.stack([[*begin, *tokens[s : s + seqlen - begin.size]] for s in starts])
