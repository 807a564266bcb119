"""Configurations, token checks, and filling a model from named tensors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from nqkv_jax.models import families
from nqkv_jax.models.config import OptConfig, check_tokens
from nqkv_jax.models.llama_config import LlamaConfig
from nqkv_jax.models.rope import RopeConfig
from nqkv_jax.models.weights import CheckpointError, ParamFiller, Weight

TINY = dict(
    model_type="llama", vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=12, max_position_embeddings=16,
    tie_word_embeddings=True,
)  # fmt: skip
TINY_OPT = dict(
    model_type="opt", vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    ffn_dim=12, max_position_embeddings=16,
)  # fmt: skip


# Reading config.json


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    """config.json may leave out whatever is at its default."""
    transformers = pytest.importorskip("transformers", reason="the reference for defaults")
    theirs = transformers.AutoConfig.for_model(model_type)
    sparse = families.config_from_hf({"model_type": model_type})
    assert sparse == families.config_from_hf(theirs.to_dict())
    assert sparse == families.config_from_hf(json.loads(theirs.to_json_string()))
    assert sparse.num_layers == theirs.num_hidden_layers


def test_old_and_new_spelling_of_rope_agree():
    scaling = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    old = TINY | dict(rope_theta=5e5, rope_scaling=scaling | dict(rope_type="llama3"))
    older = TINY | dict(rope_theta=5e5, rope_scaling=scaling | dict(type="llama3"))
    new = TINY | dict(rope_parameters=scaling | dict(rope_type="llama3", rope_theta=5e5))
    config = families.config_from_hf(old)
    assert config == families.config_from_hf(older) == families.config_from_hf(new)
    assert config.rope == families.presets["llama-3.1-8b"].rope
    assert families.config_from_hf(TINY | dict(rope_theta=5e5, rope_scaling=None)).rope == (
        RopeConfig(theta=5e5)
    )


def test_old_and_new_spelling_of_gemmas_two_ropes_agree():
    base = TINY | dict(model_type="gemma3_text")
    old = base | dict(
        rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=dict(rope_type="linear", factor=8.0)
    )
    full = dict(rope_type="linear", rope_theta=5e5, factor=8.0)
    local = dict(rope_type="default", rope_theta=2e4)
    new = base | dict(rope_parameters=dict(full_attention=full, sliding_attention=local))
    config = families.config_from_hf(old)
    assert config == families.config_from_hf(new)
    assert config == families.config_from_hf(old | dict(rope_parameters=None))
    assert (config.rope.theta, config.rope.factor) == (5e5, 8.0)
    assert config.local_rope == RopeConfig(theta=2e4)
    silent = families.config_from_hf(base)
    assert (silent.rope.theta, silent.local_rope.theta) == (1e6, 1e4)


def test_caps_of_gemma():
    """Absent keys have the defaults of the family, an explicit null is no cap."""
    caps = lambda config: (config.score_cap, config.logit_cap)
    second, third = (TINY | dict(model_type=name) for name in ("gemma2", "gemma3_text"))
    null = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert caps(families.config_from_hf(second)) == (50.0, 30.0)
    assert caps(families.config_from_hf(second | null)) == (None, None)
    assert caps(families.config_from_hf(third)) == (None, None)
    assert caps(families.config_from_hf(third | dict(final_logit_softcapping=20.0))) == (None, 20.0)
    preset = families.presets["gemma-2-2b"]
    silent = dict(model_type="gemma2", tie_word_embeddings=True)
    assert families.config_from_hf(silent) == preset  # all of its settings are the defaults


def test_yarn_infers_its_factor():
    scaling = dict(type="yarn", original_max_position_embeddings=8)
    config = families.config_from_hf(TINY | dict(rope_scaling=scaling | dict(factor=None)))
    assert config.rope.factor == 2.0
    assert config.rope.attention_factor == pytest.approx(0.1 * np.log(2) + 1)


def test_common_properties():
    config = families.presets["smollm2-135m"]
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.hidden_size, config.sliding_window) == (64, 576, None)
    assert families.presets["mistral-7b"].sliding_window == 4096
    assert families.config_from_hf(TINY | dict(eos_token_id=[5, 6])).eos_token_ids == (5, 6)
    assert families.config_from_hf(TINY | dict(eos_token_id=None)).eos_token_ids == ()
    assert families.config_from_hf(TINY | dict(num_key_value_heads=None)).num_kv_heads == 4
    assert hash(config) == hash(dataclasses.replace(config))  # static under jit


def test_windows_of_layers():
    base = TINY | dict(model_type="qwen2", num_hidden_layers=3, sliding_window=7)
    assert families.config_from_hf(base).windows == ()
    some = families.config_from_hf(base | dict(use_sliding_window=True, max_window_layers=2))
    assert some.windows == (None, None, 7)
    assert some.sliding_window is None
    every = families.config_from_hf(base | dict(use_sliding_window=True, max_window_layers=0))
    assert every.sliding_window == 7
    assert families.config_from_hf(TINY | dict(model_type="mistral")).sliding_window == 4096
    gemma = dict(model_type="gemma3_text", sliding_window=7, num_hidden_layers=3)
    assert families.config_from_hf(TINY | gemma).windows == (7, 7, 7)
    local = families.config_from_hf(TINY | gemma | dict(sliding_window_pattern=2))
    assert local.windows == (7, None, 7)
    assert families.presets["gemma-3-270m"].sliding_window is None
    none = TINY | dict(model_type="mistral", sliding_window=None)
    assert families.config_from_hf(none).sliding_window is None


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            dict(model_type="gpt2"),
            ValueError,
            "gemma2, gemma3, gemma3_text, llama, mistral, .*; got 'gpt2'",
        ),
        (dict(model_type=None), ValueError, "got None"),
        (dict(num_key_value_heads=3), ValueError, "multiple of num_kv_heads=3; got 4"),
        (dict(num_key_value_heads=0), ValueError, "num_kv_heads must be a positive integer; got 0"),
        (dict(num_attention_heads=0), ValueError, "num_attention_heads must be .* got 0"),
        (dict(hidden_size=-8), ValueError, "hidden_size must be a positive integer; got -8"),
        (dict(head_dim=3), ValueError, "head_dim must be even"),
        (dict(hidden_act="relu"), ValueError, "one of silu, swish, gelu_pytorch_tanh; got 'relu'"),
        (
            dict(rope_scaling=dict(rope_type="longrope", factor=2)),
            NotImplementedError,
            "'longrope' is not supported; supported: default, linear, llama3, yarn",
        ),
        (
            dict(model_type="phi3", rope_scaling=dict(type="longrope", short_factor=[1.0])),
            NotImplementedError,
            "'longrope' is not supported",
        ),
        (dict(rope_scaling=dict(type="dynamic", factor=2)), NotImplementedError, "'dynamic'"),
        (dict(rope_scaling=dict(type="linear")), ValueError, "needs a `factor`"),
        (dict(rope_scaling=dict(type="llama3", factor=8)), ValueError, "needs `low_freq_factor`"),
        (dict(partial_rotary_factor=0.5), NotImplementedError, "must be 1; got 0.5"),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
            NotImplementedError,
            "differ between layers",
        ),
        (dict(quantization_config=dict(quant_method="gptq")), NotImplementedError, "gptq"),
        (
            dict(model_type="qwen3", use_sliding_window=True, layer_types=["chunked"] * 2),
            NotImplementedError,
            "layer_types must name",
        ),
        (dict(model_type="gemma3_text", layer_types=["x"] * 2), NotImplementedError, "must name"),
        (
            dict(model_type="gemma2", attn_logit_softcapping=-1.0),
            ValueError,
            r"score_cap must be positive or None; got -1\.0",
        ),
        (
            dict(model_type="gemma3_text", final_logit_softcapping=0.0),
            ValueError,
            r"logit_cap must be positive or None; got 0\.0",
        ),
        (
            dict(model_type="gemma3_text", rope_parameters=dict(rope_theta=5e5)),
            NotImplementedError,
            "must have those of full_attention and of sliding_attention",
        ),
        (
            dict(model_type="gemma3_text", sliding_window_pattern=0),
            ValueError,
            "sliding_window_pattern must be positive; got 0",
        ),
        (
            dict(model_type="gemma3_text", use_bidirectional_attention=True),
            NotImplementedError,
            "use_bidirectional_attention must be false",
        ),
    ],
)
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        families.config_from_hf(TINY | changes)


def test_opt_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match=r"relu, gelu.*got 'silu'"):
        OptConfig.from_hf(TINY_OPT | dict(activation_function="silu"))
    with pytest.raises(ValueError, match=r"must be num_heads \* head_dim = 3 \* 2; got 8"):
        OptConfig.from_hf(TINY_OPT | dict(num_attention_heads=3))
    with pytest.raises(ValueError, match="num_attention_heads must be a positive integer; got 0"):
        OptConfig.from_hf(TINY_OPT | dict(num_attention_heads=0))
    with pytest.raises(ValueError, match="model_type must be one of opt; got 'llama'"):
        OptConfig.from_hf(TINY)
    with pytest.raises(ValueError, match="windows must have one entry for each of 30 layers"):
        dataclasses.replace(families.presets["smollm2-135m"], windows=(3,))


# Token ids


def test_check_tokens():
    config = families.config_from_hf(TINY)
    ids = check_tokens(config, [[0, 19], [3, 4]])
    assert ids.dtype == np.int32 and ids.shape == (2, 2)
    assert check_tokens(config, []).shape == (0,)
    with pytest.raises(ValueError, match=r"in \[0, 20\).*got 20 at position \(1, 0\) \(2 of 4"):
        check_tokens(config, [[0, 19], [20, -1]])
    with pytest.raises(ValueError, match="must be integers; got float64"):
        check_tokens(config, [1.0])


def test_wrong_token_arrays_are_refused():
    for config in (families.config_from_hf(TINY), families.config_from_hf(TINY_OPT)):
        model = families.abstract(config)
        with pytest.raises(ValueError, match=r"integer array \[batch, tokens\]; got .* \(3,\)"):
            jax.eval_shape(lambda tokens: model(tokens), jnp.zeros(3, jnp.int32))  # noqa: B023
        with pytest.raises(ValueError, match="got float32"):
            jax.eval_shape(lambda tokens: model(tokens), jnp.zeros((1, 3)))  # noqa: B023


# Filling


def tensors_of(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(weight.shape).astype(dtype)
        for name, weight in families.weight_map(config).items()
    }


@pytest.mark.parametrize("settings", [TINY, TINY_OPT], ids=["llama", "opt"])
def test_the_order_of_tensors_does_not_matter(settings):
    config = families.config_from_hf(settings)
    tensors = tensors_of(config)
    shuffled = dict(reversed(tensors.items()))
    one, other = (families.from_hf_state(config, t) for t in (tensors, shuffled))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_parts_of_a_fused_kernel():
    config = families.config_from_hf(TINY)
    tensors = tensors_of(config)
    kernel = families.from_hf_state(config, tensors).layers[1].qkv.kernel[...]
    expected = [tensors[f"model.layers.1.self_attn.{which}_proj.weight"].T for which in "qkv"]
    np.testing.assert_array_equal(kernel, np.concatenate(expected, axis=1))


def test_parameters_move_to_the_device_as_soon_as_they_are_complete():
    config = families.config_from_hf(TINY)
    tensors = tensors_of(config)
    filler = families.filler(config)
    for which, buffers in (("q", 1), ("k", 1), ("v", 0)):
        name = f"model.layers.0.self_attn.{which}_proj.weight"
        filler.add(name, tensors[name])
        assert len(filler._buffers) == buffers
    assert filler._arrays["layers", 0, "qkv", "kernel"].shape == (8, 16)
    assert len(filler.missing()) == len(tensors) - 3


def test_the_caller_may_reuse_its_arrays():
    config = families.config_from_hf(TINY)
    tensors = tensors_of(config)
    model = families.from_hf_state(config, tensors)
    table = np.array(model.embed.table[...])
    tensors["model.embed_tokens.weight"][:] = 0
    np.testing.assert_array_equal(model.embed.table[...], table)


@pytest.mark.parametrize("stored", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_casts(stored, dtype):
    config = families.config_from_hf(TINY_OPT)
    tensors = tensors_of(config, stored)
    state = nnx.state(families.from_hf_state(config, tensors, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
    expected = tensors["model.decoder.embed_tokens.weight"].astype(dtype)
    np.testing.assert_array_equal(state["embed"]["table"][...], expected)


def test_all_problems_are_reported_together():
    config = families.config_from_hf(TINY)
    tensors = tensors_of(config)
    del tensors["model.norm.weight"]
    tensors["model.model.norm.weight"] = np.ones(8, np.float32)  # a doubled prefix is no prefix
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((8, 12), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((12, 8), np.int32)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError) as caught:
        families.from_hf_state(config, tensors)
    error = caught.value
    assert error.missing == ["model.norm.weight"]
    assert error.unexpected == ["model.model.norm.weight"]
    assert error.misfits == [
        "model.layers.0.mlp.up_proj.weight: expected shape (12, 8), got (8, 12)",
        "model.layers.1.mlp.up_proj.weight: expected floating-point values, got int32",
        "model.embed_tokens.weight: came twice",
    ]
    for name in (*error.missing, *error.unexpected, *error.misfits):
        assert name in str(error)


def test_long_lists_are_cut_in_the_message_only():
    filler = families.filler(families.presets["smollm2-135m"])
    with pytest.raises(CheckpointError, match=r"and 260 more") as caught:
        filler.finish()
    assert len(caught.value.missing) == 272
    assert "272 missing tensors:" in str(caught.value)


def test_float16_overflow_is_reported():
    config = families.config_from_hf(TINY)
    tensors = tensors_of(config)
    tensors["model.norm.weight"][3] = 1e5
    families.from_hf_state(config, tensors, dtype=jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: has values beyond"):
        families.from_hf_state(config, tensors, dtype=jnp.float16)


@pytest.mark.parametrize("settings", [TINY, TINY_OPT], ids=["llama", "opt"])
def test_checkpoints_without_a_head(settings):
    config = families.config_from_hf(settings)
    bare = {name.removeprefix("model."): array for name, array in tensors_of(config).items()}
    families.from_hf_state(config, bare)


def test_leftovers_are_ignored():
    llama, opt = families.config_from_hf(TINY), families.config_from_hf(TINY_OPT)
    untied = families.config_from_hf(TINY | dict(tie_word_embeddings=False))
    assert families.ignored(llama, "lm_head.weight")
    assert not families.ignored(untied, "lm_head.weight")
    assert "lm_head.weight" in families.weight_map(untied)
    assert families.ignored(llama, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert families.ignored(opt, "model.decoder.version")
    assert not families.ignored(llama, "model.layers.0.self_attn.rotary_emb.inv_freq.scale")


def test_a_weight_map_must_cover_the_model():
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"must cover every parameter.*kernel"):
        ParamFiller(model, {"b": Weight(path=("bias",), shape=(3,))})


def test_shardings_are_chosen_per_parameter():
    config = families.config_from_hf(TINY)
    seen = {}

    def device(path, shape):
        seen[path] = shape
        return jax.devices()[0]

    filler = families.filler(config, device=device)
    for name, array in tensors_of(config).items():
        filler.add(name, array)
    filler.finish()
    assert seen["layers", 0, "gate_up", "kernel"] == (8, 24)
    assert isinstance(config, LlamaConfig)
