"""The configuration of the Llama family, and how it reads the `config.json` of its members."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from nqkv_jax.models.config import (
    ModelConfig,
    check_activation,
    check_hf,
    num_heads,
    special_tokens,
)
from nqkv_jax.models.rope import RopeConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The Llama family: RoPE, RMSNorm, a gated MLP, grouped-query attention.

    Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM2, Gemma 2 and Gemma 3 differ only in these fields.

    Attributes:
      ffn_size: hidden width of the MLP.
      norm_eps: of all RMSNorms.
      norm_offset: added to the scales of all RMSNorms (Gemma: 1).
      post_norms: RMSNorms of what attention and MLP give, too, before it is added (Gemma).
      embed_scale: of embeddings on their way in; None for 1 (Gemma: sqrt(hidden_size)).
      rope: rotary position embedding.
      local_rope: that of layers with a sliding window, where it is another (Gemma 3).
      score_scale: of queries times keys; None for head_dim ** -0.5.
      score_cap: scores become score_cap * tanh(scores / score_cap); None for no cap (Gemma 2: 50).
      logit_cap: of logits, likewise (Gemma 2: 30).
      qkv_bias, out_bias, mlp_bias: biases of these linear maps.
      qk_norm: RMSNorm over each head's channels of queries and keys, before RoPE (Qwen3, Gemma 3).
      windows: sliding window of every layer, None for all tokens; empty if no layer has one.
      activation: of the MLP's gate.

    Source: Touvron et al. (2023), LLaMA; Jiang et al. (2023), Mistral 7B; Qwen team (2024, 2025);
      Abdin et al. (2024), Phi-3; Gemma team (2024), Gemma 2, section 2; Gemma team (2025), Gemma 3,
      section 2.
    """

    model_type: str = "llama"
    ffn_size: int
    norm_eps: float
    norm_offset: float = 0.0
    post_norms: bool = False
    embed_scale: float | None = None
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
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
        for name in ("score_cap", "logit_cap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise ValueError(f"LlamaConfig.{name} must be positive or None; got {cap}")
        check_activation(self, ("silu", "swish", "gelu_pytorch_tanh"))

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def opening(self) -> tuple[int, ...]:
        """Gemma breaks down without its BOS token."""
        needed = self.model_type.startswith("gemma") and self.bos_token_id is not None
        return (self.bos_token_id,) if needed else ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dictionary of a Hugging Face `config.json`.

        Absent keys have the defaults of the family.

        Raises: ValueError for sizes that contradict each other or an activation we do not have;
          NotImplementedError for a kind of RoPE scaling or of layers that we do not have.
        """
        check_hf(config, tuple(_DEFAULTS))
        kind = config["model_type"]
        default = _DEFAULTS[kind]
        get = functools.partial(setting, config)
        gemma = kind in _GEMMA
        hidden = get("hidden_size", default.get("hidden_size", 4096))
        heads = num_heads(config, default.get("num_heads", 32))
        kv_heads = config.get("num_key_value_heads", default["num_kv_heads"])
        layers = get("num_hidden_layers", default.get("num_layers", 32))
        max_positions = get("max_position_embeddings", default["max_positions"])
        # Which of Qwen2's projections have a bias is part of the architecture, not of its settings.
        bias = get("attention_bias", False) if kind in ("llama", "qwen3", *_GEMMA) else False
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
            tie_embeddings=get("tie_word_embeddings", gemma),
            **special_tokens(
                config, bos=default["bos"], eos=default["eos"], pad=default.get("pad")
            ),
            ffn_size=get("intermediate_size", default["ffn_size"]),
            norm_eps=float(get("rms_norm_eps", default.get("norm_eps", 1e-6))),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=bias,
            mlp_bias=get("mlp_bias", False) if kind == "llama" else False,
            qk_norm=kind in ("qwen3", "gemma3_text"),
            windows=_windows(config, layers),
            **(_gemma(config, hidden, max_positions) if gemma else _llama(config, max_positions)),
        )


# What transformers assumes where config.json is silent (it may leave out what is at its default).
_DEFAULTS: dict[str, dict[str, Any]] = {
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
    "phi3": dict(
        vocab_size=32064, max_positions=4096, num_kv_heads=None, head_dim=None, ffn_size=8192,
        bos=1, eos=32000, pad=32000, hidden_size=3072, norm_eps=1e-5,
    ),
    "gemma2": dict(
        vocab_size=256000, max_positions=8192, num_kv_heads=4, head_dim=256, ffn_size=9216,
        bos=2, eos=1, pad=0, hidden_size=2304, num_heads=8, num_layers=26,
    ),
    "gemma3_text": dict(
        vocab_size=262208, max_positions=131072, num_kv_heads=4, head_dim=256, ffn_size=9216,
        bos=2, eos=1, pad=0, hidden_size=2304, num_heads=8, num_layers=26,
    ),
}  # fmt: skip
# Every so many layers one sees all tokens, the others have a sliding window.
_GEMMA = {"gemma2": 2, "gemma3_text": 6}


def _llama(config: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """Activation and RoPE of all but Gemma."""
    return dict(
        activation=setting(config, "hidden_act", "silu"),
        rope=RopeConfig.from_hf(config, max_positions=max_positions),
    )


def _gemma(config: Mapping[str, Any], hidden: int, max_positions: int) -> dict[str, Any]:
    """What sets Gemma apart."""
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention must be false; got true")
    get = functools.partial(setting, config)
    if config["model_type"] == "gemma2":
        caps, ropes = (
            (50.0, 30.0),
            dict(rope=RopeConfig.from_hf(config, max_positions=max_positions)),
        )
    else:
        caps, ropes = (None, None), _ropes_of_gemma3(config, max_positions)
    return dict(
        activation=get("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        post_norms=True,
        embed_scale=hidden**0.5,
        score_scale=get("query_pre_attn_scalar", 256) ** -0.5,
        # An explicit null is a setting of its own here, "no cap".
        score_cap=config.get("attn_logit_softcapping", caps[0]),
        logit_cap=config.get("final_logit_softcapping", caps[1]),
        **ropes,
    )


def _ropes_of_gemma3(config: Mapping[str, Any], max_positions: int) -> dict[str, RopeConfig]:
    """Layers with a window have frequencies of their own."""
    get = functools.partial(setting, config)
    full, local = {"rope_theta": 1e6}, {"rope_theta": 1e4}
    if parameters := get("rope_parameters", {}):
        if not all(isinstance(value, Mapping) for value in parameters.values()):
            raise NotImplementedError(
                "rope_parameters must have those of full_attention and of sliding_attention for "
                f"Gemma 3; got {dict(parameters)}"
            )
        full["rope_parameters"] = parameters.get("full_attention")
        local["rope_parameters"] = parameters.get("sliding_attention")
    else:  # before transformers 5
        full = {"rope_theta": get("rope_theta", 1e6), "rope_scaling": get("rope_scaling", {})}
        local["rope_theta"] = get("rope_local_base_freq", 1e4)
    return dict(
        rope=RopeConfig.from_hf(full, max_positions=max_positions),
        local_rope=RopeConfig.from_hf(local, max_positions=max_positions),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer; () if none has one."""
    kind = config["model_type"]
    if kind == "llama":
        return ()
    # Unlike for most keys, null is a setting of its own here, "no window".
    size = config.get("sliding_window", None if kind == "phi3" else 4096)
    if kind in ("mistral", "phi3"):
        return (size,) * layers if size is not None else ()
    optional = kind not in _GEMMA
    if size is None or (optional and not config.get("use_sliding_window", False)):
        return ()
    kinds = config.get("layer_types")
    if kinds is None and optional:
        full = setting(config, "max_window_layers", 28)
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    elif kinds is None:
        period = setting(config, "sliding_window_pattern", _GEMMA[kind])
        if period < 1:
            raise ValueError(f"sliding_window_pattern must be positive; got {period}")
        kinds = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(layers)
        ]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise NotImplementedError(
            f"layer_types must name 'full_attention' or 'sliding_attention' for each of {layers} "
            f"layers; got {list(kinds)}"
        )
    windows = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()
