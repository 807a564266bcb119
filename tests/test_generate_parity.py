"""Generation: the greedy tokens of transformers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny_generators import LLAMA, LLAMA3_ROPE, OPT, language_model, random_prompts

from nqkv_jax.models import families, generate

PARITY = {
    "opt-125m": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "opt, head_dim 80": ("OPT", OPT | dict(hidden_size=160, num_attention_heads=2)),
    "opt, no final norm": ("OPT", OPT | dict(_remove_final_layer_norm=True)),
    "llama 3": ("Llama", LLAMA | dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=9)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=16)),
    "phi3": ("Phi3", LLAMA | dict(sliding_window=9, pad_token_id=0)),
    "gemma 2": (
        "Gemma2",
        LLAMA
        | dict(
            head_dim=16, sliding_window=9, attn_logit_softcapping=3.0, tie_word_embeddings=False
        ),
    ),
}  # fmt: skip


def greedy_reference(reference, prompts, count):
    """Greedy tokens of transformers' generate(), and by how much the best logit led, at least."""
    import torch
    import transformers

    ids = torch.tensor(prompts)
    settings = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, pad_token_id=0, bos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    best = torch.stack(out.logits).topk(2, dim=-1).values
    leads = (best[..., 0] - best[..., 1]).amin(dim=0)
    return out.sequences[:, len(prompts[0]) :].tolist(), leads.tolist()


# The logits of the others are compared in tests/test_models_opt.py and tests/test_models_llama.py.
MORE = "opt-350m", "opt, head_dim 80", "opt, no final norm", "qwen2", "phi3"


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.more) if v in MORE else v for v in PARITY]
)
def test_greedy_tokens_are_those_of_transformers(variant):
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model")
    name, settings = PARITY[variant]
    torch.manual_seed(1)
    hf_config = getattr(transformers, f"{name}Config")(**settings, eos_token_id=None)
    reference = getattr(transformers, f"{name}ForCausalLM")(hf_config).eval()
    reference.set_attn_implementation("eager")
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    config = families.config_from_hf(reference.config.to_dict())
    config = dataclasses.replace(config, eos_token_ids=())
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    lm = language_model(families.from_hf_state(config, tensors), config)
    prompts = random_prompts(*[40] * 32)
    continuations, leads = greedy_reference(reference, prompts, 64)
    # The most varied one without a near tie: random models tend to be parrots.
    best = max(range(32), key=lambda i: (leads[i] > 1e-3, len(set(continuations[i]))))
    prompt, expected = prompts[best], continuations[best]
    assert leads[best] > 1e-3 and len(set(expected)) >= 4
    # Three chunks of prompt, the last one not full.
    result = generate(lm, [prompt], scheme="none", max_new_tokens=64, prefill_chunk=16)
    assert result.tokens == [expected]
    assert result.texts is None and result.finish_reasons == ["length"]


def smollm2_reference(lm):
    """transformers' model with the parameters of ours."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model")
    c = lm.config
    hf_config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        intermediate_size=c.ffn_size, max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=True, eos_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope.theta),
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(hf_config).eval()
    reference.generation_config.eos_token_id = None
    params = dict(nnx.to_flat_state(lm.params))
    state = {}
    for name, weight in families.weight_map(c).items():
        value = np.asarray(params[weight.path][...])
        if weight.offset is not None:
            rows = range(weight.offset, weight.offset + weight.shape[0])
            value = value.take(rows, axis=weight.axis)
        state[name] = torch.tensor(value.T if weight.transpose else value)
    missing = reference.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    return reference


@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_smollm2_greedy_tokens_are_those_of_transformers(smollm2, count):
    reference = smollm2_reference(smollm2)
    prompt = smollm2.tokenizer.encode("The capital of France is")
    (expected,), _ = greedy_reference(reference, [prompt], count)
    result = generate(smollm2, [prompt], scheme="none", max_new_tokens=count)
    stop = next((i for i, t in enumerate(expected) if t in smollm2.eos_ids), count - 1)
    assert result.tokens == [expected[: stop + 1]]
    assert result.texts[0].startswith(" Paris")
