"""Gemma from GGUF files, against transformers: names, norms, two ropes, SentencePiece."""

import numpy as np
import pytest

from nqkv_jax.models import from_pretrained

gguf = pytest.importorskip("gguf", reason="writing .gguf files needs the package gguf")
torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch")

TOKENS = np.random.default_rng(0).integers(0, 120, (2, 20))


def reference(kind="gemma3", **changes):
    torch.manual_seed(0)
    name = dict(gemma2="Gemma2Config", gemma3="Gemma3TextConfig")[kind]
    config = getattr(transformers, name)(
        **dict(
            vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=7,
            num_attention_heads=4, num_key_value_heads=1, head_dim=16, sliding_window=5,
            max_position_embeddings=64, query_pre_attn_scalar=16,
        ) | changes,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write(path, model, **keys):
    """As llama.cpp's converter does it."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("llama")
    bytes_ = [f"<0x{i:02X}>" for i in range(100)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_]
    pieces += ["a", "b", "\u2581", "ab", *"defghijklmno"]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 104 + [-10.0, -11.0, -12.0, -1.0] + [-20.0] * 12)
    writer.add_token_types([3, 3, 3, 2] + [6] * 100 + [1] * 16)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    kind = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            array = tensor.numpy() + (1 if name.endswith("norm.weight") else 0)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_logits(path, model):
    lm = from_pretrained(path, dtype="float32", progress=False)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.ptp(expected) > 2
    np.testing.assert_allclose(lm.logits(TOKENS), expected, atol=1e-4)
    return lm


def test_weights_and_tokenizer(tmp_path):
    model = reference()
    write(tmp_path / "tiny.gguf", model)
    lm = assert_same_logits(tmp_path / "tiny.gguf", model)
    assert lm.config.windows == (5,) * 5 + (None, 5)
    assert (lm.config.rope.theta, lm.config.local_rope.theta) == (1e6, 1e4)
    pieces = [lm.tokenizer.decode([i]) for i in lm.tokenizer.encode("ab bab")]
    assert pieces == ["", "ab", " ", "b", "ab"]  # BOS, and what merges first
    assert (lm.tokenizer.bos_id, lm.tokenizer.eos_ids) == (2, {1})


def test_scaling_is_of_the_layers_that_see_everything(tmp_path):
    """From 4b on, contexts are stretched; the windows of the other layers are short enough."""
    full = dict(rope_type="linear", rope_theta=100.0, factor=8.0)
    local = dict(rope_type="default", rope_theta=1e4)
    model = reference(rope_parameters=dict(full_attention=full, sliding_attention=local))
    keys = dict(rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=8.0)
    write(tmp_path / "tiny.gguf", model, **keys)
    lm = assert_same_logits(tmp_path / "tiny.gguf", model)
    assert (lm.config.rope.factor, lm.config.local_rope.factor) == (8.0, 1.0)


def test_what_a_file_may_leave_out_or_add(tmp_path):
    """Without windows no key is written; a cap on logits may be."""
    model = reference(num_hidden_layers=2, sliding_window=None)
    model.config.sliding_window = 0
    write(tmp_path / "tiny.gguf", model)
    assert from_pretrained(tmp_path / "tiny.gguf", progress=False).config.windows == ()
    model.config.sliding_window = 5
    write(tmp_path / "tiny.gguf", model, final_logit_softcapping=30.0)
    config = from_pretrained(tmp_path / "tiny.gguf", progress=False).config
    assert (config.windows, config.score_cap, config.logit_cap) == ((5, 5), None, 30.0)


def test_gemma_2(tmp_path):
    """Caps are in the file, or those of the four published sizes."""
    model = reference("gemma2", attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
    caps = dict(attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
    write(tmp_path / "tiny.gguf", model, **caps)
    lm = assert_same_logits(tmp_path / "tiny.gguf", model)
    assert lm.config.windows == (5, None, 5, None, 5, None, 5)
    assert lm.config.opening == (2,)
    model.config.sliding_window = 0
    write(tmp_path / "tiny.gguf", model)
    config = from_pretrained(tmp_path / "tiny.gguf", progress=False).config
    assert (config.score_cap, config.logit_cap, config.windows[0]) == (50.0, 30.0, 4096)


def test_float16_is_refused(tmp_path):
    """Its activations are beyond 65,504."""
    write(tmp_path / "tiny.gguf", reference(num_hidden_layers=1))
    with pytest.raises(ValueError, match="bfloat16 or float32 for Gemma"):
        from_pretrained(tmp_path / "tiny.gguf", dtype="float16", progress=False)


@pytest.mark.parametrize("kind, layers", [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_scales_scores_by_another_width(tmp_path, kind, layers):
    """As llama.cpp tells 27b from others: by the number of its layers."""
    write(tmp_path / "tiny.gguf", reference(kind, num_hidden_layers=layers))
    lm = from_pretrained(tmp_path / "tiny.gguf", progress=False)
    assert lm.config.score_scale == (32 // 4) ** -0.5  # the others': head_dim ** -0.5
