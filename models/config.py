"""What defines a model: frozen configurations, read from a checkpoint's `config.json`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from nqkv_jax.models.rope import RopeConfig, setting


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
        _check_activation(self, ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh"))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "OptConfig":
        """Reads the dictionary of a Hugging Face `config.json`; absent keys have OPT's defaults.

        Raises: ValueError for sizes that contradict each other or an activation we do not have.
        """
        _check_hf(config, ("opt",))
        get = functools.partial(setting, config)
        hidden, heads = get("hidden_size", 768), _num_heads(config, 12)
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
            **_special_tokens(config, bos=2, eos=2, pad=1),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The Llama family: RoPE, RMSNorm, a gated MLP, grouped-query attention.

    Llama, Mistral, Qwen2, Qwen3 and SmolLM2 differ only in these fields.

    Attributes:
      ffn_size: hidden width of the MLP.
      norm_eps: of all RMSNorms.
      rope: rotary position embedding.
      qkv_bias, out_bias, mlp_bias: biases of these linear maps.
      qk_norm: RMSNorm over each head's channels of queries and keys, before RoPE (Qwen3).
      windows: sliding window of every layer, None for all tokens; empty if no layer has one.
      activation: of the MLP's gate.

    Source: Touvron et al. (2023), LLaMA; Jiang et al. (2023), Mistral 7B; Qwen team (2024, 2025).
    """

    model_type: str = "llama"
    ffn_size: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    activation: str = "silu"

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig.head_dim must be even (RoPE); got {self.head_dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"LlamaConfig.windows must have one entry for each of {self.num_layers} layers; "
                f"got {len(self.windows)}"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"LlamaConfig.windows must be positive or None; got {self.windows}")
        _check_activation(self, ("silu", "swish"))

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dictionary of a Hugging Face `config.json`.

        Absent keys have the defaults of the family.

        Raises: ValueError for sizes that contradict each other or an activation we do not have;
          NotImplementedError for a kind of RoPE scaling or of layers that we do not have.
        """
        defaults = _LLAMA_DEFAULTS
        _check_hf(config, tuple(defaults))
        kind = config["model_type"]
        default = defaults[kind]
        get = functools.partial(setting, config)
        hidden = get("hidden_size", 4096)
        heads = _num_heads(config, 32)
        kv_heads = config.get("num_key_value_heads", default["num_kv_heads"])
        layers = get("num_hidden_layers", 32)
        max_positions = get("max_position_embeddings", default["max_positions"])
        # Which of Qwen2's projections have a bias is part of the architecture, not of its settings.
        bias = get("attention_bias", False) if kind in ("llama", "qwen3") else False
        return cls(
            model_type=kind,
            vocab_size=get("vocab_size", default["vocab_size"]),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            # An explicit null means one KV head per query head, an absent key the family's default.
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=get("head_dim", default["head_dim"] or hidden // heads),
            max_positions=max_positions,
            tie_embeddings=get("tie_word_embeddings", False),
            **_special_tokens(config, bos=default["bos"], eos=default["eos"], pad=None),
            ffn_size=get("intermediate_size", default["ffn_size"]),
            norm_eps=float(get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config, max_positions=max_positions),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=bias,
            mlp_bias=get("mlp_bias", False) if kind == "llama" else False,
            qk_norm=kind == "qwen3",
            windows=_windows(config, layers),
            activation=get("hidden_act", "silu"),
        )


# What transformers assumes where config.json is silent (it may leave out what is at its default).
_LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        vocab_size=32000, max_positions=2048, num_kv_heads=None, head_dim=None, ffn_size=11008,
        bos=1, eos=2,
    ),
    "mistral": dict(
        vocab_size=32000, max_positions=131072, num_kv_heads=8, head_dim=None, ffn_size=14336,
        bos=1, eos=2,
    ),
    "qwen2": dict(
        vocab_size=151936, max_positions=32768, num_kv_heads=32, head_dim=None, ffn_size=22016,
        bos=None, eos=None,
    ),
    "qwen3": dict(
        vocab_size=151936, max_positions=32768, num_kv_heads=32, head_dim=128, ffn_size=22016,
        bos=None, eos=None,
    ),
}  # fmt: skip


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer; () if none has one."""
    kind = config["model_type"]
    if kind == "llama":
        return ()
    # Unlike for most keys, null is a setting of its own here, "no window".
    size = config.get("sliding_window", 4096)
    if kind == "mistral":
        return (size,) * layers if size is not None else ()
    if not config.get("use_sliding_window", False) or size is None:
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        full = setting(config, "max_window_layers", 28)
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise NotImplementedError(
            f"layer_types must name 'full_attention' or 'sliding_attention' for each of {layers} "
            f"layers; got {list(kinds)}"
        )
    windows = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _check_hf(config: Mapping[str, Any], model_types: tuple[str, ...]) -> None:
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"model_type must be one of {', '.join(model_types)}; got {config.get('model_type')!r}"
        )


def _num_heads(config: Mapping[str, Any], default: int) -> int:
    """Query heads, by which `hidden_size` is divided before `ModelConfig` checks either."""
    heads = setting(config, "num_attention_heads", default)
    if heads == 0:
        raise ValueError("num_attention_heads must be a positive integer; got 0")
    return heads


def _special_tokens(
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


def _check_activation(config: Any, supported: tuple[str, ...]) -> None:
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
