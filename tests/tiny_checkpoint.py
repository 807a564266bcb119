"""A checkpoint of a few thousand parameters in the hub's layout, with a tokenizer."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from nqkv_jax.models import families

CONFIG = dict(
    model_type="llama", vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, intermediate_size=48, max_position_embeddings=256,
    rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257,
)  # fmt: skip


def write(folder: pathlib.Path) -> str:
    """Writes a Llama with random weights and one token per byte; returns the folder's name."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    weights = families.weight_map(families.config_from_hf(CONFIG))
    save_file(
        {
            name: rng.standard_normal(w.shape).astype(np.float32) * 0.3
            for name, w in weights.items()
        },
        folder / "model.safetensors",
    )
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                bos_token="<s>",
                eos_token="</s>",
                chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
            )
        )
    )
    return str(folder)
