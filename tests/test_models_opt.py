"""OPT against transformers' OPTForCausalLM: random weights, float32, every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nqkv_jax.models import families, opt
from nqkv_jax.models.config import OptConfig

SMALL = dict(
    vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=96,
    max_position_embeddings=40,
)  # fmt: skip
VARIANTS = {
    "125m": SMALL,
    "350m": SMALL | dict(word_embed_proj_dim=24, do_layer_norm_before=False),
    "2.7b": SMALL | dict(hidden_size=160, num_attention_heads=2, ffn_dim=320),
    "without final norm": SMALL | dict(_remove_final_layer_norm=True),
    "without biases": SMALL | dict(enable_bias=False, layer_norm_elementwise_affine=False),
    "gelu, untied": SMALL | dict(activation_function="gelu", tie_word_embeddings=False),
}


@jax.jit
def forward(model, tokens, num_new=None):
    return model(tokens, num_new=num_new)


@jax.jit
def forward_hidden(model, tokens):
    return model.hidden(tokens)[0]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request):
    """A transformers model with random weights, and ours made from its tensors."""
    return make_pair(VARIANTS[request.param])


def make_pair(settings, seed=0):
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model is there")
    torch.manual_seed(seed)
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**settings)).eval()
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        # Away from zero biases and unit scales, so that a swapped or forgotten one shows; and large
        # enough that attention is not uniform.
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = families.config_from_hf(reference.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return reference, families.from_hf_state(config, tensors)


def reference_logits(reference, tokens):
    import torch

    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


def random_tokens(batch, length, vocab=99, seed=0):
    return np.random.default_rng(seed).integers(3, vocab, (batch, length)).astype(np.int32)


def test_logits_match_transformers(pair):
    reference, model = pair
    tokens = random_tokens(2, 40)  # all learned positions
    logits, cache = forward(model, tokens)
    assert cache is None and logits.dtype == jnp.float32
    expected = reference_logits(reference, tokens)
    assert np.ptp(expected) > 2  # a flat reference would agree with anything
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_head_of_one_token_is_that_row_of_the_logits(pair):
    _, model = pair
    tokens = random_tokens(2, 9)
    hidden = forward_hidden(model, tokens)
    assert hidden.shape == (2, 9, model.config.hidden_size)
    logits, _ = forward(model, tokens)
    np.testing.assert_allclose(model.head(hidden[:, 4:5]), logits[:, 4:5], atol=1e-5)


def test_right_padding_does_not_change_valid_tokens():
    _, model = make_pair(VARIANTS["125m"])
    tokens = random_tokens(2, 12)
    lengths = np.array([12, 7], np.int32)
    padded = np.where(np.arange(12) < lengths[:, None], tokens, 1)
    logits, _ = forward(model, padded, lengths)
    alone, _ = forward(model, tokens[1:, :7])
    np.testing.assert_allclose(logits[1, :7], alone[0], atol=1e-5)


def test_position_rows():
    """Row 0 is never read, row 1 only for padding, row 2 belongs to the first token."""
    rows = opt._position_rows((2, 4), None, jnp.asarray([4, 2]))
    np.testing.assert_array_equal(rows, [[2, 3, 4, 5], [2, 3, 1, 1]])
    np.testing.assert_array_equal(opt._position_rows((1, 3), None, None), [[2, 3, 4]])


class FakeCache:
    """Two sequences, of which 3 and 39 tokens have been cached."""

    def positions(self, tokens):
        return jnp.asarray([[3], [39]], jnp.int32) + jnp.arange(tokens, dtype=jnp.int32)[None]


def test_positions_come_from_the_cache():
    rows = opt._position_rows((2, 2), FakeCache(), jnp.asarray([2, 1]))
    np.testing.assert_array_equal(rows, [[5, 6], [41, 1]])


def test_the_position_offset_matters(monkeypatch):
    reference, model = make_pair(VARIANTS["125m"])
    tokens = random_tokens(1, 8)
    monkeypatch.setattr(opt, "_POSITION_OFFSET", 0)
    wrong, _ = jax.jit(lambda tokens: model(tokens))(tokens)
    assert np.abs(wrong - reference_logits(reference, tokens)).max() > 0.1


def test_the_query_scale_matters(monkeypatch):
    reference, model = make_pair(VARIANTS["125m"])
    tokens = random_tokens(1, 8)
    attend = opt.attend
    monkeypatch.setattr(opt, "attend", lambda *args, **kwargs: attend(*args, scale=1.0, **kwargs))
    wrong, _ = jax.jit(lambda tokens: model(tokens))(tokens)
    assert np.abs(wrong - reference_logits(reference, tokens)).max() > 0.1


def test_too_many_tokens_are_refused():
    model = families.build(OptConfig.from_hf(SMALL | {"model_type": "opt"}))
    with pytest.raises(ValueError, match="learned positions for 40 tokens; got 41"):
        model(jnp.zeros((1, 41), jnp.int32))


def test_unknown_ids_are_never_answered_for_another_token():
    model = families.build(OptConfig.from_hf(SMALL | {"model_type": "opt"}))
    logits, _ = forward(model, np.asarray([[5, 6], [5, 99], [5, -1]]))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1:, 1]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    config = OptConfig.from_hf(SMALL | {"model_type": "opt"})
    full = families.build(config)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(full))
    low = nnx.merge(nnx.graphdef(full), state)
    tokens = jnp.asarray(random_tokens(2, 10))
    hidden = forward_hidden(low, tokens)
    assert hidden.dtype == dtype
    logits, _ = forward(low, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(full, tokens)[0], atol=0.05)


@pytest.mark.parametrize(
    "size, count",
    [
        ("125m", 125_239_296),
        ("350m", 331_196_416),
        ("1.3b", 1_315_758_080),
        ("2.7b", 2_651_596_800),
        ("6.7b", 6_658_473_984),
        ("13b", 12_853_473_280),
        ("30b", 29_974_540_288),
        ("66b", 65_719_701_504),
        ("175b", 174_604_468_224),
    ],
)
def test_parameter_counts(size, count):
    """The published sizes, from the shapes that the modules ask for."""
    config = families.presets[f"opt-{size}"]
    model = families.abstract(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count
    assert families.num_params(config) == count
