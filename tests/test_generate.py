"""Generation: ragged batches, caches, compilations, bad requests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_generators import SHARED, make_cache, random_prompts, tiny

from nqkv_jax import schemes
from nqkv_jax.models import Sampling, decoding, generate, stream
from nqkv_jax.models.requests import prepare


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
        assert result.cache.max_len == 128
        generate(lm, random_prompts(16, 1), **(options | dict(max_new_tokens=100)))
        options |= SHARED
        generate(lm, random_prompts(70, 33), **options)  # more chunks
        generate(tiny(seed=1, tokenizer=False), random_prompts(33, 2), **options)  # other weights
        options |= dict(max_new_tokens=9, stop_ids=[3, 4])
        generate(lm, random_prompts(33, 2), **options)
    assert counted.names == () and traces == []


def test_numbers_of_a_sampling_share_the_programs(compilations):
    lm, prompts = tiny(tokenizer=False), random_prompts(9)
    sample = lambda **numbers: generate(
        lm, prompts, max_new_tokens=8, sampling=Sampling(**numbers), **SHARED
    )
    first = sample(temperature=0.5, top_k=40, top_p=0.5, min_p=0.1, repetition_penalty=1.5)
    with compilations as counted:
        second = sample(temperature=4.0, top_k=40, top_p=0.9, min_p=1e-3, repetition_penalty=0.5)
    assert counted.names == () and first.tokens != second.tokens


def test_the_decoding_loop_updates_its_state_in_place():
    lm = tiny(tokenizer=False)
    cache = make_cache(lm, "none", batch=2, max_len=80)
    stop_ids, none = jnp.full(8, -1), jnp.zeros(2, bool)
    options = dict(rules=Sampling().rules())
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
        ([], {}, "lists of token ids; got none"),
        ({"a": 1}, {}, r"lists of token ids; got \{'a': 1\}"),
        ({"a"}, {}, r"lists of token ids; got \{'a'\}"),
        (b"ab", {}, "lists of token ids; got b'ab'"),
        (["a", None], {}, "prompt 1 must be a list of token ids; got None"),
        (["a", b"x"], {}, "prompt 1 must be a list of token ids; got b'x'"),
        ([[1], [2, [3]]], {}, r"prompt 1 must be a list of token ids; got \[2, \[3\]\]"),
        (7, {}, "lists of token ids; got 7"),
        ([1, 2], {}, r"got int at the top level. For one list of ids: \[ids\]"),
        ("a", dict(max_new_tokens=0), "max_new_tokens must be a whole number >= 1; got 0"),
        ("a", dict(max_new_tokens=True), "max_new_tokens must be a whole number >= 1; got True"),
        ("a", dict(max_new_tokens=2.0), "max_new_tokens must be a whole number"),
        ("a", dict(max_len=0), "max_len must be a whole number"),
        ("a", dict(num_samples=0), "num_samples must be"),
        ("a", dict(prefill_chunk=1), "prefill_chunk must be a whole number >= 2"),
        ("a", dict(seed=-1), r"seed must be a whole number in \[0, 4294967295\]"),
        ("a", dict(scheme="nqvk"), "unknown scheme 'nqvk'; there are: .*nqkv"),
        ("a", dict(cache_dtype="int8"), "cache_dtype must be float32, bfloat16 or float16"),
        ("a", dict(cache_dtype="no such"), "cache_dtype must be"),
        ("a", dict(implementation="cuda"), "implementation must be one of .*xla.*; got 'cuda'"),
        ("a", dict(implementation=["xla"]), r"must be one of .*; got \['xla'\]"),
        ("a", dict(sampling="greedy"), "sampling must be a Sampling"),
        ("a", dict(stop=["x", ""]), "stop must be strings that are not empty"),
        ("a", dict(stop=5), "stop must be strings that are not empty; got 5"),
        ("a", dict(stop=None), "stop must be strings that are not empty; got None"),
        ("a", dict(add_special_tokens="no"), "add_special_tokens must be True or False; got 'no'"),
        ("a", dict(stop_ids=[259]), "stop_ids: token ids must be in"),
        ("a", dict(stop_ids=3), "stop_ids must be a list of token ids; got 3"),
    ],
)
def test_bad_requests(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, **options)


def test_prompts_may_come_from_anywhere():
    lm = tiny()
    texts = prepare(lm, ["a", "bc"]).prompts
    for prompts in (("a", "bc"), np.array(["a", "bc"]), (text for text in ("a", "bc"))):
        assert prepare(lm, prompts).prompts == texts
    assert prepare(lm, [np.array([1, 2]), range(3)]).prompts == [[1, 2], [0, 1, 2]]


def test_a_kernel_is_asked_for(monkeypatch):
    sizes = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    lm = tiny(max_position_embeddings=256, **sizes)
    prepared = functools.partial(prepare, lm, "a", max_new_tokens=4)
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu needs a TPU.* jax has cpu here"):
        prepared(implementation="mosaic_tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="mosaic_tpu needs keys and values in tiles"):
        prepared(implementation="mosaic_tpu", scheme="squat")


def test_there_is_room_for_what_a_kernel_reads_at_a_time(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sizes = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)

    def room(positions=4096, **options):
        lm = tiny(max_position_embeddings=positions, **sizes)
        return prepare(lm, "a", implementation="mosaic_tpu", **options).max_len

    assert room(max_new_tokens=4) == 1024
    assert room(max_new_tokens=1500) == 1536
    assert room(max_new_tokens=4, max_len=256) == 256
    assert room(256, max_new_tokens=4) == 256
    with pytest.raises(NotImplementedError, match="with max_len a multiple of 128"):
        room(160, max_new_tokens=4)


def test_without_kernels_the_tokens_are_the_same():
    lm, prompts = tiny(), random_prompts(9, 3)
    found = generate(lm, prompts, max_new_tokens=6, implementation="xla", **SHARED)
    assert found.cache.layers[1].implementation == "xla"
    assert found.tokens == generate(lm, prompts, max_new_tokens=6, **SHARED).tokens


def test_without_a_tokenizer_text_is_refused():
    lm = tiny(tokenizer=False)
    with pytest.raises(ValueError, match=r"no tokenizer; pass lists of token ids"):
        generate(lm, "a")
    with pytest.raises(ValueError, match="no tokenizer for stop strings; use stop_ids"):
        generate(lm, [[1]], stop="a")
    with pytest.raises(ValueError, match="no tokenizer to make text; use generate"):
        stream(lm, [1])


@pytest.mark.parametrize("call", [generate, stream])
def test_a_name_is_no_model(call):
    with pytest.raises(ValueError, match="model that from_pretrained returned; got 'smollm2-135m'"):
        call("smollm2-135m", "a")


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
