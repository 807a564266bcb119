"""Which model a checkpoint's `model_type` means, and the shapes of well-known checkpoints."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nqkv_jax.models import llama, opt
from nqkv_jax.models.config import ModelConfig, OptConfig
from nqkv_jax.models.layers import Decoder
from nqkv_jax.models.llama_config import LlamaConfig
from nqkv_jax.models.rope import RopeConfig
from nqkv_jax.models.weights import ParamFiller, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that loading has to know about an architecture.

    Attributes:
      config: its configuration class.
      model: its module, `model(config, rngs=..., dtype=...)`.
      weight_map: from a configuration to {checkpoint name: `Weight`}.
      bare: how names begin in checkpoints of the decoder without a head, which lack "model.".
    """

    config: type[ModelConfig]
    model: Callable[..., Decoder]
    weight_map: Callable[[Any], dict[str, Weight]]
    bare: tuple[str, ...]


_OPT = Family(config=OptConfig, model=opt.Opt, weight_map=opt.weight_map, bare=("decoder.",))
_LLAMA = Family(
    config=LlamaConfig,
    model=llama.Llama,
    weight_map=llama.weight_map,
    bare=("embed_tokens.", "layers.", "norm."),
)

FAMILIES: dict[str, Family] = {
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
}

# Constants of the architecture that older checkpoints saved as if they were weights.
_LEFTOVERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|decoder\.version)$")

_GEMMA3 = "gemma3"  # with a part that sees images, around a "gemma3_text"
# As published, and as transformers 5 saves it.
_GEMMA3_DECODER = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_GEMMA3_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration of any supported model.

    Args: config: the dictionary of a Hugging Face `config.json`.

    Raises:
      ValueError: if its `model_type` is not supported (lists those that are), or it contradicts
        itself.
      NotImplementedError: if it asks for something that its family does not have here.
    """
    if config.get("model_type") == _GEMMA3:
        config = _decoder_of_gemma3(config)
    family = _family(config.get("model_type"))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise NotImplementedError(
            f"the weights of this checkpoint are quantized ({method}); "
            "load one with float32, float16 or bfloat16 weights, or a .gguf file"
        )
    return family.config.from_hf(config)


def _decoder_of_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of 4b and larger, which also see images. Special tokens are those of the whole."""
    outer = (
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "quantization_config",
    )  # fmt: skip
    given = {name: config[name] for name in outer if config.get(name) is not None}
    return dict(config.get("text_config") or {}) | given | {"model_type": "gemma3_text"}


def _family(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, _GEMMA3}))
        raise ValueError(f"model_type must be one of {known}; got {model_type!r}")
    return FAMILIES[model_type]


def weight_map(config: ModelConfig) -> dict[str, Weight]:
    """Every tensor that a checkpoint of this model must have, by its canonical name."""
    return _family(config.model_type).weight_map(config)


def canonical_name(config: ModelConfig, name: str) -> str:
    """The name that a tensor has in a checkpoint with a head.

    Checkpoints of the bare decoder lack the leading "model."; it is put back. Anything else stays
    as it is, so that a doubled prefix is reported as unexpected. In those of Gemma 3 that see
    images, too, the decoder has a name.
    """
    if config.model_type == "gemma3_text":
        for published, ours in _GEMMA3_DECODER:
            if name.startswith(published):
                name = ours + name.removeprefix(published)
    return f"model.{name}" if name.startswith(_family(config.model_type).bare) else name


def ignored(config: ModelConfig, name: str) -> bool:
    """Whether a tensor of this canonical name may come although the model has no use for it."""
    if name == "lm_head.weight":
        return config.tie_embeddings
    if config.model_type == "gemma3_text" and _GEMMA3_IMAGES.match(name):
        return True
    return _LEFTOVERS.search(name) is not None


def build(config: ModelConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> Decoder:
    """A model with random weights: normal with deviation 0.02, unit scales, zero biases."""
    rng = np.random.default_rng(seed)
    unit = 1 - (config.norm_offset if isinstance(config, LlamaConfig) else 0.0)
    fill = filler(config, dtype=dtype)
    # Through NumPy and the weight map: initialising the modules themselves would compile a program
    # for every shape.
    for name, weight in weight_map(config).items():
        kind = weight.path[-1]
        if kind in ("scale", "bias"):
            fill.add(name, np.full(weight.shape, unit if kind == "scale" else 0, np.float32))
        else:
            fill.add(name, rng.standard_normal(weight.shape, np.float32) * np.float32(0.02))
    return fill.finish()


def abstract(config: ModelConfig, *, dtype: Any = jnp.float32) -> Decoder:
    """A model whose parameters are shapes only: costs no memory, whatever its size."""
    model = _family(config.model_type).model
    return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0), dtype=dtype))


def filler(config: ModelConfig, *, dtype: Any = jnp.float32, device: Any = None) -> ParamFiller:
    """What turns the tensors of a checkpoint into a model; see `weights.ParamFiller`."""
    return ParamFiller(
        abstract(config, dtype=dtype),
        weight_map(config),
        canonical_name=functools.partial(canonical_name, config),
        ignored=functools.partial(ignored, config),
        device=device,
    )


def from_hf_state(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], *, dtype: Any = jnp.float32
) -> Decoder:
    """A model from tensors that are all in memory.

    Raises: CheckpointError: if they do not fit the model.
    """
    fill = filler(config, dtype=dtype)
    for name, array in tensors.items():
        fill.add(name, array)
    return fill.finish()


def num_params(config: ModelConfig) -> int:
    """How many parameters the model has; a tied head counts once."""
    # Every parameter is covered exactly once by the weight map (ParamFiller checks it).
    return sum(int(np.prod(weight.shape)) for weight in weight_map(config).values())


def _opt(layers: int, hidden: int, heads: int, **overrides: Any) -> OptConfig:
    fields = dict(
        vocab_size=50272, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=hidden // heads, max_positions=2048, tie_embeddings=True,
        bos_token_id=2, eos_token_ids=(2,), pad_token_id=1, ffn_size=4 * hidden, embed_size=hidden,
    )  # fmt: skip
    return OptConfig(**(fields | overrides))


_LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    max_positions=4096, tie_embeddings=False, bos_token_id=1, eos_token_ids=(2,), ffn_size=11008,
    norm_eps=1e-5,
)  # fmt: skip
_LLAMA_3_8B = dataclasses.replace(
    _LLAMA_2_7B, vocab_size=128256, num_kv_heads=8, ffn_size=14336, max_positions=8192,
    bos_token_id=128000, eos_token_ids=(128001,), rope=RopeConfig(theta=500_000.0),
)  # fmt: skip

# For planning memory without a checkpoint. OPT: Zhang et al. (2022), table 1, and the published
# configurations (the table does not show the exceptions of 350m; 175b has no public weights).
# The others: config.json of the named release; Mistral is v0.1, with a sliding window everywhere.
presets: dict[str, ModelConfig] = {
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, embed_size=512, norm_first=False, final_norm=False),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": dataclasses.replace(
        _LLAMA_3_8B, max_positions=131072,
        rope=RopeConfig(
            theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192,
            low_freq_factor=1.0, high_freq_factor=4.0,
        ),
    ),
    "mistral-7b": dataclasses.replace(
        _LLAMA_2_7B, model_type="mistral", num_kv_heads=8, ffn_size=14336, max_positions=32768,
        windows=(4096,) * 32,
    ),
    "qwen2.5-7b": LlamaConfig(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28,
        num_kv_heads=4, head_dim=128, max_positions=131072, tie_embeddings=False,
        bos_token_id=151643, eos_token_ids=(151643,), ffn_size=18944, norm_eps=1e-6,
        rope=RopeConfig(theta=1e6), qkv_bias=True,
    ),
    "qwen3-8b": LlamaConfig(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, num_layers=36, num_heads=32,
        num_kv_heads=8, head_dim=128, max_positions=40960, tie_embeddings=False,
        bos_token_id=151643, eos_token_ids=(151645,), ffn_size=12288, norm_eps=1e-6,
        rope=RopeConfig(theta=1e6), qk_norm=True,
    ),
    "phi-3-mini-4k": LlamaConfig(
        model_type="phi3", vocab_size=32064, hidden_size=3072, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=96, max_positions=4096, tie_embeddings=False, bos_token_id=1,
        eos_token_ids=(32000,), pad_token_id=32000, ffn_size=8192, norm_eps=1e-5,
        windows=(2047,) * 32,
    ),
    "gemma-2-2b": LlamaConfig(
        model_type="gemma2", vocab_size=256000, hidden_size=2304, num_layers=26, num_heads=8,
        num_kv_heads=4, head_dim=256, max_positions=8192, tie_embeddings=True, bos_token_id=2,
        eos_token_ids=(1,), pad_token_id=0, ffn_size=9216, norm_eps=1e-6, norm_offset=1.0,
        post_norms=True, embed_scale=2304**0.5, score_scale=256**-0.5, score_cap=50.0,
        logit_cap=30.0, windows=(4096, None) * 13, activation="gelu_pytorch_tanh",
    ),
    "gemma-3-270m": LlamaConfig(
        model_type="gemma3_text", vocab_size=262144, hidden_size=640, num_layers=18, num_heads=4,
        num_kv_heads=1, head_dim=256, max_positions=32768, tie_embeddings=True, bos_token_id=2,
        eos_token_ids=(1,), pad_token_id=0, ffn_size=2048, norm_eps=1e-6, norm_offset=1.0,
        post_norms=True, embed_scale=640**0.5, rope=RopeConfig(theta=1e6), local_rope=RopeConfig(),
        score_scale=256**-0.5, qk_norm=True, windows=((512,) * 5 + (None,)) * 3,
        activation="gelu_pytorch_tanh",
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        max_positions=8192, tie_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
        pad_token_id=2, ffn_size=1536, norm_eps=1e-5, rope=RopeConfig(theta=1e5),
    ),
}  # fmt: skip
