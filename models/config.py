"""What defines a model: frozen configurations, read from a checkpoint's `config.json`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from nqkv_jax.models.rope import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all decoders have, and all that planning a cache needs.

    Attributes:
      model_type: the family's name in the Hugging Face configuration, such as "llama".
      vocab_size: rows of the embedding (may exceed what the tokenizer uses).
      hidden_size: width of the residual stream.
      num_layers: decoder layers.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: channels per head; num_heads * head_dim need not be `hidden_size`.
      max_positions: the context the model was trained for.
      tie_embeddings: the head multiplies with the embedding and has no weights of its own.
      bos_token_id: prepended to prompts by some tokenizers; None if there is none.
      eos_token_ids: generation stops at any of them.
      pad_token_id: None if there is none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tie_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be a positive integer; got {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{type(self).__name__}.num_heads must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}; got {self.num_heads}"
            )

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of this layer attends to; None for all."""
        return None

    @property
    def opening(self) -> tuple[int, ...]:
        """Token ids that a text must begin with, in evaluations and calibrations, too.

        Published ones put no BOS token before their windows; most models read well without.
        """
        return ()

    @property
    def sliding_window(self) -> int | None:
        """The window that every layer has; None if some layer attends to all tokens."""
        windows = {self.window(layer) for layer in range(self.num_layers)}
        return None if None in windows else max(windows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptConfig(ModelConfig):
    """OPT: learned absolute positions, LayerNorm, a two-layer MLP, as many KV heads as query heads.

    Attributes:
      ffn_size: hidden width of the MLP.
      embed_size: width of the token embedding; where it is not `hidden_size` (OPT-350m), linear
        maps without bias stand between embedding and decoder, and between decoder and head.
      norm_first: LayerNorm before attention and MLP; False: after the residual sum (OPT-350m).
      final_norm: a LayerNorm after the last layer.
      use_bias: biases in the linear maps of the layers.
      norm_affine: LayerNorms have scale and bias.
      activation: of the MLP; a key of `layers.ACTIVATIONS`.

    Source: Zhang et al. (2022), OPT: Open Pre-trained Transformer Language Models.
    """

    model_type: str = "opt"
    ffn_size: int
    embed_size: int
    norm_first: bool = True
    final_norm: bool = True
    use_bias: bool = True
    norm_affine: bool = True
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"OptConfig.hidden_size must be num_heads * head_dim = {self.num_heads} * "
                f"{self.head_dim}; got {self.hidden_size}"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"OptConfig.num_kv_heads must be num_heads={self.num_heads}; "
                f"got {self.num_kv_heads}"
            )
        check_activation(self, ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh"))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "OptConfig":
        """Reads the dictionary of a Hugging Face `config.json`; absent keys have OPT's defaults.

        Raises: ValueError for sizes that contradict each other or an activation we do not have.
        """
        check_hf(config, ("opt",))
        get = functools.partial(setting, config)
        hidden, heads = get("hidden_size", 768), num_heads(config, 12)
        norm_first = get("do_layer_norm_before", True)
        return cls(
            vocab_size=get("vocab_size", 50272),
            hidden_size=hidden,
            num_layers=get("num_hidden_layers", 12),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_positions=get("max_position_embeddings", 2048),
            tie_embeddings=get("tie_word_embeddings", True),
            **special_tokens(config, bos=2, eos=2, pad=1),
            ffn_size=get("ffn_dim", 3072),
            embed_size=get("word_embed_proj_dim", hidden),
            norm_first=norm_first,
            # The flag marks checkpoints that were fine-tuned without the norm, when transformers
            # (before 4.20.1) lacked it. The post-norm model never had one.
            final_norm=norm_first and not get("_remove_final_layer_norm", False),
            use_bias=get("enable_bias", True),
            norm_affine=get("layer_norm_elementwise_affine", True),
            activation=get("activation_function", "relu"),
        )


def check_hf(config: Mapping[str, Any], model_types: tuple[str, ...]) -> None:
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"model_type must be one of {', '.join(model_types)}; got {config.get('model_type')!r}"
        )


def num_heads(config: Mapping[str, Any], default: int) -> int:
    """Query heads, by which `hidden_size` is divided before `ModelConfig` checks either."""
    heads = setting(config, "num_attention_heads", default)
    if heads == 0:
        raise ValueError("num_attention_heads must be a positive integer; got 0")
    return heads


def special_tokens(
    config: Mapping[str, Any], *, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    """Ids as the configuration gives them; eos may be one id or a list there."""
    ids = config.get("eos_token_id", eos)
    ids = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    return {
        "bos_token_id": config.get("bos_token_id", bos),
        "eos_token_ids": ids,
        "pad_token_id": config.get("pad_token_id", pad),
    }


def check_activation(config: Any, supported: tuple[str, ...]) -> None:
    if config.activation not in supported:
        raise ValueError(
            f"{type(config).__name__}.activation must be one of {', '.join(supported)}; "
            f"got {config.activation!r}"
        )


def check_tokens(config: ModelConfig, tokens: Any) -> np.ndarray:
    """Checks token ids on the host, where a bad one can still be reported.

    Args:
      config: of the model.
      tokens: integers, any shape (padding must hold valid ids too).

    Returns: the ids as i32, same shape.

    Raises:
      ValueError: if ids are not integers, or one is outside the vocabulary: which, where, and how
        large the vocabulary is.
    """
    ids = np.asarray(tokens)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers; got {ids.dtype} of shape {ids.shape}")
    bad = (ids < 0) | (ids >= config.vocab_size)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"token ids must be in [0, {config.vocab_size}), the vocabulary of this "
            f"{config.model_type} model; got {ids[where]} at position {where}"
            f" ({int(bad.sum())} of {ids.size} ids are outside)"
        )
    return ids.astype(np.int32)
