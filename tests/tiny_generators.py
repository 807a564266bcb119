"""Random models that generate, which the tests of generation share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, pre_tokenizers

from nqkv_jax import schemes
from nqkv_jax.models import LanguageModel, families
from nqkv_jax.models.tokenizer import Tokenizer

LLAMA = dict(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, max_position_embeddings=160,
)  # fmt: skip
OPT = dict(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=160,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
EOS = 257
# What most tests share, so that they also share compiled programs.
SHARED = dict(max_len=80, prefill_chunk=16)


@functools.cache
def byte_tokenizer():
    """One token per byte, so that most random tokens are pieces of characters."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])  # 256, 257, 258
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos=True)


def language_model(model, config, *, tokenizer=None, dtype=np.float32):
    return LanguageModel(
        model=model, config=config, tokenizer=tokenizer, name="tiny", dtype=np.dtype(dtype)
    )


@functools.cache
def tiny(kind="llama", seed=0, tokenizer=True, **changes):
    """A random model that never makes its end token by itself; scaled so that it is no parrot."""
    hf = dict(model_type=kind, eos_token_id=EOS) | (OPT if kind == "opt" else LLAMA) | changes
    config = families.config_from_hf(hf)
    model = families.build(config, seed=seed)
    rng = np.random.default_rng(seed)

    def noise(a):
        return a + 0.3 * jnp.asarray(rng.standard_normal(a.shape), a.dtype)

    nnx.update(model, jax.tree.map(noise, nnx.state(model)))
    return language_model(model, config, tokenizer=byte_tokenizer() if tokenizer else None)


def random_prompts(*lengths, seed=0, vocab=256):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def make_cache(lm, scheme, *, batch, max_len, dtype=jnp.float32):
    c = lm.config
    return schemes.get(scheme).init(
        num_layers=c.num_layers, batch=batch, max_len=max_len, num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim, dtype=dtype,
    )  # fmt: skip
