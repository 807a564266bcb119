"""The Llama family against transformers: random weights, float32, what each member adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqkv_jax.models import families

SMALL = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, intermediate_size=80, max_position_embeddings=64,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1000.0, original_max_position_embeddings=32)
GEMMA = SMALL | dict(head_dim=16, sliding_window=6, sliding_window_pattern=2)
# name: (class in transformers, settings). Sequences have 48 tokens: more than the windows, and more
# than the original contexts.
VARIANTS = {
    "llama": ("Llama", SMALL),
    "llama, tied": ("Llama", SMALL | dict(tie_word_embeddings=True)),
    "llama, one KV head per head": ("Llama", SMALL | dict(num_key_value_heads=6)),
    "llama, biases": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True)),
    "llama, head_dim": ("Llama", SMALL | dict(head_dim=16)),
    "llama 3": ("Llama", SMALL | dict(rope_parameters=LLAMA3_ROPE)),
    "linear rope": (
        "Llama",
        SMALL | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "yarn": ("Llama", SMALL | dict(head_dim=32, rope_parameters=YARN | dict(factor=4.0))),
    "yarn, mscale": (
        "Llama",
        SMALL
        | dict(
            head_dim=32,
            rope_parameters=YARN
            | dict(factor=8.0, mscale=1.0, mscale_all_dim=0.5, beta_fast=16.0, truncate=False),
        ),
    ),
    "mistral": ("Mistral", SMALL | dict(sliding_window=9)),
    "mistral, no window": ("Mistral", SMALL | dict(sliding_window=None, head_dim=12)),
    "qwen2": ("Qwen2", SMALL),
    "qwen2, windows": (
        "Qwen2",
        SMALL | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", SMALL | dict(head_dim=16)),
    "qwen3, tied, biases, windows": (
        "Qwen3",
        SMALL
        | dict(
            head_dim=16, tie_word_embeddings=True, attention_bias=True, use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi3": ("Phi3", SMALL | dict(pad_token_id=0)),
    "phi3, windows": ("Phi3", SMALL | dict(pad_token_id=0, sliding_window=9, rms_norm_eps=1e-3)),
    "gemma 2": (
        "Gemma2", GEMMA | dict(attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
    ),
    "gemma 2, without caps": (
        "Gemma2",
        GEMMA
        | dict(
            attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=5,
        ),
    ),
    "gemma 3": ("Gemma3Text", GEMMA),
    "gemma 3, scaled": (
        "Gemma3Text",
        GEMMA
        | dict(
            query_pre_attn_scalar=5, tie_word_embeddings=False, attention_bias=True,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=200.0, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=50.0),
            ),
        ),
    ),
}  # fmt: skip


@jax.jit
def forward(model, tokens, num_new=None):
    return model(tokens, num_new=num_new)


@jax.jit
def forward_hidden(model, tokens):
    return model.hidden(tokens)[0]


def make_pair(variant):
    """A transformers model with random weights, and ours made from its tensors."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model is there")
    name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{name}Config")(**settings)
    reference = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(hf_config).eval()
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        # Away from zero biases and unit scales, and large enough that attention is not uniform.
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    config = families.config_from_hf(reference.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return reference, families.from_hf_state(config, tensors)


def reference_logits(reference, tokens):
    import torch

    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


def random_tokens(batch, length):
    return np.random.default_rng(0).integers(0, 97, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant):
    reference, model = make_pair(variant)
    tokens = random_tokens(2, 48)
    logits, cache = forward(model, tokens)
    assert cache is None and logits.dtype == jnp.float32
    expected = reference_logits(reference, tokens)
    assert np.ptp(expected) > 2  # a flat reference would agree with anything
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("published", [True, False])
def test_the_decoder_of_a_model_that_sees_images(published):
    """Gemma 3 from 4b on: only texts are read here; its checkpoints hold all of it."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model is there")
    torch.manual_seed(0)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    hf_config = transformers.Gemma3Config(
        text_config=GEMMA | dict(num_hidden_layers=7), vision_config=vision, mm_tokens_per_image=4,
        eos_token_id=[1, 9], image_token_index=96, boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    reference = transformers.Gemma3ForConditionalGeneration(hf_config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    config = families.config_from_hf(reference.config.to_dict())
    assert (config.model_type, config.eos_token_ids) == ("gemma3_text", (1, 9))
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    assert any("vision_tower" in name for name in tensors)
    if published:
        renamed = [
            (name.replace("model.language_model.", "language_model.model."), tensor)
            for name, tensor in tensors.items()
        ]
        tensors = {
            name if name.startswith("language_model") else name.removeprefix("model."): tensor
            for name, tensor in renamed
        }
        assert "language_model.model.norm.weight" in tensors
    tokens = random_tokens(1, 20) % 90
    logits, _ = forward(families.from_hf_state(config, tensors), tokens)
    np.testing.assert_allclose(logits, reference_logits(reference, tokens), atol=1e-4)


@pytest.mark.parametrize("variant", ["llama 3", "linear rope", "yarn"])
def test_the_rope_scaling_matters(variant):
    """The tests above would not notice a scaling that changes nothing at these lengths."""
    reference, model = make_pair(variant)
    tokens = random_tokens(1, 48)
    rope = dict(rope_type="default", rope_theta=model.config.rope.theta)
    plain = families.config_from_hf(reference.config.to_dict() | dict(rope_parameters=rope))
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    wrong, _ = forward(families.from_hf_state(plain, tensors), tokens)
    assert np.abs(wrong - reference_logits(reference, tokens)).max() > 0.1


@pytest.mark.parametrize("variant", ["mistral", "qwen2, windows"])
def test_the_window_matters(variant):
    _, model = make_pair(variant)
    tokens = random_tokens(1, 48)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 97
    # Three layers see back three windows in all; in qwen2's case one layer sees everything.
    reach = 3 * 8 + 1 if variant == "mistral" else 48
    difference = np.abs(forward(model, tokens)[0] - forward(model, changed)[0]).max(-1)[0]
    assert (difference[:reach] > 0).all() and (difference[reach:] == 0).all()


@pytest.mark.parametrize("batch, length", [(2, 40), (1, 1)])
def test_head_of_one_token_is_that_row_of_the_logits(batch, length):
    model = families.build(families.config_from_hf(SMALL | dict(model_type="llama")))
    tokens = random_tokens(batch, length)
    hidden = forward_hidden(model, tokens)
    logits, _ = forward(model, tokens)
    np.testing.assert_allclose(model.head(hidden[:, -1:]), logits[:, -1:], atol=1e-6)


def test_bfloat16_agrees_between_one_token_and_many():
    """One token goes another way through the products in bfloat16; it must be the same product."""
    config = families.config_from_hf(SMALL | dict(model_type="llama"))
    model = families.build(config, dtype=jnp.bfloat16)
    tokens = jnp.asarray(random_tokens(1, 5))
    one, _ = forward(model, tokens[:, :1])
    many, _ = forward(model, tokens)
    assert one.shape == (1, 1, 97)
    np.testing.assert_allclose(one, many[:, :1], atol=0.02)


def test_windows_and_layers_reach_attend(monkeypatch):
    from nqkv_jax.models import llama

    calls = []

    def attend(q, k, v, cache, **kwargs):
        calls.append((q.shape, k.shape, v.shape, cache, kwargs))
        return q, cache + 1

    monkeypatch.setattr(llama, "attend", attend)
    name, settings = VARIANTS["qwen3, tied, biases, windows"]
    model = families.build(families.config_from_hf(settings | dict(model_type=name.lower())))
    num_new = jnp.asarray([4, 2])
    _, cache = model.hidden(jnp.asarray(random_tokens(2, 4)), 0, num_new=num_new)
    assert cache == 3
    assert [call[3] for call in calls] == [0, 1, 2]
    assert [call[4]["layer"] for call in calls] == [0, 1, 2]
    assert [call[4]["window"] for call in calls] == [5, None, 5]
    assert all(call[4]["num_new"] is num_new for call in calls)
    assert all(call[4]["rotary"].inverse_frequencies.shape == (8,) for call in calls)
    assert calls[0][:3] == ((2, 4, 6, 16), (2, 4, 2, 16), (2, 4, 2, 16))


@pytest.mark.parametrize(
    "preset, count",
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("phi-3-mini-4k", 3_821_079_552),
        ("gemma-2-2b", 2_614_341_888),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameter_counts(preset, count):
    """The published sizes; `filler` also checks that the weight map covers every parameter."""
    config = families.presets[preset]
    assert families.num_params(config) == count
    families.filler(config)
