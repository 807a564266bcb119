"""Reads .gguf files: weights dequantised to float32, and the config and names of Hugging Face.

GGUF keeps dimensions reversed (the package `gguf` turns them back), has its own tensor names, and
for the architecture `llama`, which is Mistral's too, the rows of Q and K in the order that rotates
neighbouring pairs (2i, 2i + 1), where Hugging Face and this library rotate (i, i + D/2). Of Gemma's
norms it keeps 1 + the weight.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nqkv_jax.extras import missing
from nqkv_jax.models.checkpoint.base import Checkpoint, CheckpointFileError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def open_gguf(path: pathlib.Path) -> Checkpoint:
    """The checkpoint in one .gguf file.

    Raises:
      ImportError: if the package `gguf` is missing.
      CheckpointFileError: if the file is truncated or corrupt.
      NotImplementedError: if its architecture or rope scaling is not supported.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) and "-00001-of-00001" not in path.name:
        raise NotImplementedError(
            f"{path} is one part of a split GGUF file, which is not supported; join the parts with "
            "llama-gguf-split --merge"
        )
    gguf, reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if field.types}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"{path}: GGUF architecture must be one of {ARCHITECTURES}; got {architecture!r}. Use "
            "the Hugging Face checkpoint of this model"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, metadata, tensors)
    return Checkpoint(
        config=config,
        shards=(_GGUFShard(path, gguf, tensors, config),),
        folder=path.parent,
        metadata=metadata,
    )


def _open(path: pathlib.Path):
    try:
        import gguf
    except ImportError as error:
        raise ImportError(missing(f"{path}: reading .gguf files", "gguf", "gguf")) from error
    try:
        return gguf, gguf.GGUFReader(path)
    # The reader indexes a memory map and checks little: a damaged file fails where it is damaged.
    except Exception as error:
        raise CheckpointFileError(
            f"{path} must be a whole GGUF file; it is truncated or corrupt ({error!r}). "
            "Download it again"
        ) from error


def _config(
    path: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """What `config.json` would say."""
    architecture = metadata["general.architecture"]

    def value(key, *default):
        full = f"{architecture}.{key}"
        if full not in metadata and not default:
            raise CheckpointFileError(f"{path} must have the metadata {full!r}; it has not")
        return metadata.get(full, *default)

    if "token_embd.weight" not in tensors:
        raise CheckpointFileError(f"{path} must have the tensor 'token_embd.weight'; it has not")
    heads, hidden = value("attention.head_count"), value("embedding_length")
    window = value("attention.sliding_window", None)
    model_type = "mistral" if architecture == "llama" and window else architecture
    config = {
        "model_type": "gemma3_text" if architecture == "gemma3" else model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", value("rope.dimension_count", hidden // heads)),
        "max_position_embeddings": value("context_length"),
        # A float32 such as 9.999999747378752e-06 is meant as 1e-05.
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(value("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture.startswith("gemma"):
        config |= _gemma(value, config)
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if window:
        config["sliding_window"] = window
    scaling = _rope_scaling(path, value, tensors)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _gemma(value, config: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows about these architectures, and does not keep in files."""
    third = config["model_type"] == "gemma3_text"
    # The largest size of each (27b) scales by the width of a head as it would usually be.
    largest = config["num_hidden_layers"] == (62 if third else 46)
    usual = config["hidden_size"] // config["num_attention_heads"]
    found = {
        "query_pre_attn_scalar": usual if largest else config["head_dim"],
        "attn_logit_softcapping": value("attn_logit_softcapping", None if third else 50.0),
        "final_logit_softcapping": value("final_logit_softcapping", None if third else 30.0),
        "sliding_window": value("attention.sliding_window", None if third else 4096),
    }
    if third:
        found["rope_theta"] = float(value("rope.freq_base", 1e6))
        found["rope_local_base_freq"] = float(value("rope.freq_base_swa", 1e4))
    return found


def _rope_scaling(path: pathlib.Path, value, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = value("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(value("rope.scaling.factor"))}
    if kind != "none":
        raise NotImplementedError(
            f"{path}: rope scaling must be none, linear or that of Llama 3; got {kind!r}. Use the "
            "Hugging Face checkpoint of this model"
        )
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3 keeps no parameters of its scaling here, only the divisors of the frequencies. Those
    # parameters have had one set of values but for the largest divisor: take it, and compare.
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float64)
    low, high, original = 1.0, 4.0, 8192
    scaling = {
        "rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original,
    }  # fmt: skip
    frequencies = value("rope.freq_base", 10000.0) ** (-np.arange(divisors.size) / divisors.size)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1 / (share + (1 - share) / scaling["factor"]), rtol=1e-3):
        raise NotImplementedError(
            f"{path}: its rope frequencies (tensor 'rope_freqs.weight') are not those of Llama 3. "
            "Use the Hugging Face checkpoint of this model"
        )
    return scaling


class _GGUFShard:
    """The tensors of a .gguf file, under their Hugging Face names."""

    def __init__(
        self, path: pathlib.Path, gguf, tensors: Mapping[str, Any], config: dict[str, Any]
    ):
        self.path, self._gguf, self._config = path, gguf, config
        self._tensors = {
            _hf_name(name, config["model_type"]): tensor
            for name, tensor in tensors.items()
            if name != "rope_freqs.weight"  # is in the config
        }
        self.sizes = {name: 4 * math.prod(t.shape.tolist()) for name, t in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in self._tensors.items():
            try:
                array = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{self.path}: tensor {tensor.name!r} has the type {tensor.tensor_type.name}, "
                    "which the package gguf cannot dequantise; use another file of this model"
                ) from error
            if self._config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
                array = array - 1
            yield name, self._rotate_half(name, array)

    def _rotate_half(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rows of Q and K, from pairs (2i, 2i + 1) to pairs (i, i + D/2) within each head."""
        match = re.search(r"self_attn\.([qk])_proj\.", name)
        # Of our architectures only `llama` is converted with permuted rows.
        if match is None or self._config["model_type"] not in ("llama", "mistral"):
            return array
        heads = self._config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        if array.shape[0] % (2 * heads):
            return array  # cannot be right: left to whoever checks the shapes of all tensors
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])  # [heads, D / 2, 2, ...]
        return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_name(name: str, model_type: str) -> str:
    """Names that are not known stay as they are, to be reported as unexpected."""
    base, _, kind = name.rpartition(".")
    if base in _TOP:
        return f"{_TOP[base]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    blocks = _GEMMA_BLOCK if model_type.startswith("gemma") else _BLOCK
    if match and match[2] in blocks:
        return f"model.layers.{match[1]}.{blocks[match[2]]}.{kind}"
    return name
