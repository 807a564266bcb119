"""Generation that goes on from a cache, and several samples of one prompt."""

import jax
import pytest
from tiny_generators import SHARED, random_prompts, tiny

import nqkv_jax as nq
from nqkv_jax.models import Sampling, generate, stream
from nqkv_jax.models.requests import Request

SCHEMES = ["none", "nqkv:bits=3,block_size=8,sinks=2,residual=8", "kivi:group_size=8,residual=16"]


def read(lm, prompts, scheme, **options):
    """A cache with the prompts."""
    return generate(lm, prompts, scheme=scheme, max_new_tokens=1, **(SHARED | options)).cache


@pytest.mark.parametrize("scheme", SCHEMES)
def test_going_on_is_as_if_all_had_been_one_prompt(scheme, tmp_path):
    """What was read before is the first chunk of the whole prompt, which later ones see through the
    cache, too."""
    lm, (first, second) = tiny(tokenizer=False), random_prompts(16, 9)
    options = dict(max_new_tokens=20, prefill_chunk=16)
    whole = generate(lm, [first + second], scheme=scheme, max_len=80, **options)
    cache = read(lm, [first], scheme)
    assert cache.lengths.tolist() == [16]
    nq.save_cache(cache, tmp_path / "prompt.safetensors")
    # It can be used again, and be read from a file.
    for again in (cache, cache, nq.load_cache(tmp_path / "prompt.safetensors")):
        result = generate(lm, [second], cache=again, **options)
        assert result.tokens == whole.tokens and result.scheme == scheme
        assert result.prompt_tokens == [second]
        assert result.cache.lengths.tolist() == whole.cache.lengths.tolist() == [16 + 9 + 19]
    assert cache.lengths.tolist() == [16]


def test_a_generation_goes_on_with_its_last_token():
    lm, prompts = tiny(tokenizer=False), random_prompts(9, 3)
    options = dict(scheme="none", **SHARED)
    whole = generate(lm, prompts, max_new_tokens=24, **options)
    result = generate(lm, prompts, max_new_tokens=10, **options)
    tokens = result.tokens
    for _ in range(2):
        last = [row[-1:] for row in tokens]
        result = generate(lm, last, cache=result.cache, max_new_tokens=7, prefill_chunk=16)
        tokens = [row + new for row, new in zip(tokens, result.tokens, strict=True)]
    assert tokens == whole.tokens


def test_sequences_of_a_cache_have_lengths_of_their_own():
    lm, prompts = tiny(tokenizer=False), random_prompts(12, 5)
    after = read(lm, prompts[:1], "none")
    begun = after.take([0, 0]).reset([True, False])
    assert begun.lengths.tolist() == [0, 12]
    result = generate(lm, [prompts[1]] * 2, cache=begun, max_new_tokens=8, prefill_chunk=16)
    alone = generate(lm, [prompts[1]], scheme="none", max_new_tokens=8, **SHARED)
    after = generate(lm, [prompts[1]], cache=after, max_new_tokens=8, prefill_chunk=16)
    assert result.tokens == alone.tokens + after.tokens and alone.tokens != after.tokens


def test_text_that_goes_on_gets_no_bos():
    lm = tiny()
    first = generate(lm, "ab", scheme="none", max_new_tokens=1, **SHARED)
    assert first.prompt_tokens[0][0] == 256
    options = dict(cache=first.cache, max_new_tokens=6, prefill_chunk=16)
    result = generate(lm, "cd", **options)
    assert first.prompt_tokens[0] + result.prompt_tokens[0] == lm.tokenizer.encode("abcd")
    pieces = stream(lm, "cd", **options)
    assert "".join(pieces) == result.texts[0] and pieces.result.tokens == result.tokens
    # Nothing is there yet: it begins.
    empty = first.cache.reset()
    assert generate(lm, "cd", **(options | dict(cache=empty))).prompt_tokens[0][0] == 256


def test_what_a_cache_must_be():
    lm, prompt = tiny(tokenizer=False), [[1, 2]]
    cache = read(lm, prompt, "nqkv:block_size=16", max_len=40)
    for message, changes in {
        "cache must be a KVCache, such as Generation.cache; got 'nqkv'": dict(cache="nqkv"),
        "cache must be a KVCache": dict(cache=jax.eval_shape(lambda: cache)),
        r"cache must have \{'num_layers': 2, .*got \{'num_layers': 3": dict(
            cache=nq.schemes.get("none").init(
                num_layers=3, batch=1, max_len=40, num_kv_heads=2, head_dim=8
            )
        ),
        "a prompt for each of the cache's 1 sequences; got 2": dict(prompts=[[1], [2]]),
        "scheme is what the cache has, nqkv:block_size=16; got nqkv.": dict(scheme="nqkv"),
        "max_len is what the cache has, 40; got 41": dict(max_len=41),
        "cache_dtype is what the cache has, float32; got bfloat16": dict(cache_dtype="bfloat16"),
        r"fit into max_len=40; got 44 \(most tokens of cache and prompt: 4, .*does not grow": dict(
            max_new_tokens=40
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            generate(lm, **(dict(prompts=prompt, cache=cache, max_new_tokens=4) | changes))
    # What it has may be said again.
    same = dict(scheme="nqkv:block_size=16", max_len=40, cache_dtype="float32")
    generate(lm, prompt, cache=cache, max_new_tokens=4, prefill_chunk=16, **same)
    jax.jit(lambda c: c, donate_argnums=0)(cache)
    with pytest.raises(ValueError, match=r"the cache is gone, .* donated"):
        generate(lm, prompt, cache=cache)


def test_a_cache_must_keep_what_the_model_attends_to():
    lm = tiny(max_position_embeddings=1024, tokenizer=False)
    cache = nq.schemes.get("none").init(
        num_layers=2, batch=1, max_len=1024, num_kv_heads=2, head_dim=8, windows=[None, 64]
    )
    with pytest.raises(ValueError, match="in layer 1 it keeps 64 of all"):
        generate(lm, [[1]], cache=cache)


def test_max_len_is_bounded_by_the_positions():
    with pytest.raises(ValueError, match="at most the 160 positions of tiny; got 1000000"):
        generate(tiny(), "a", max_len=1_000_000)


# --- samples


def test_samples_share_one_reading_of_the_prompt(monkeypatch):
    lm, prompts = tiny(tokenizer=False), random_prompts(9, 3)
    options = dict(scheme=SCHEMES[1], sampling=Sampling(temperature=1.0), seed=5) | SHARED
    chunks, shapes = Request.chunks, []

    def counted(request):
        for tokens, num_new in chunks(request):
            shapes.append(tokens.shape)
            yield tokens, num_new

    monkeypatch.setattr(Request, "chunks", counted)
    several = generate(lm, prompts, num_samples=3, max_new_tokens=12, **options)
    assert shapes == [(2, 16)]
    assert several.cache.batch == 6 and len(set(map(tuple, several.tokens))) == 6
    assert several.prompt_tokens == [p for p in prompts for _ in range(3)]
    # The first sample is what one alone is.
    one = generate(lm, prompts, max_new_tokens=12, **options)
    assert one.tokens == several.tokens[::3]
    # They all go on, too.
    last = [row[-1:] for row in several.tokens]
    more = generate(lm, last, cache=several.cache, max_new_tokens=2, prefill_chunk=16)
    assert more.cache.lengths.tolist() == [9 + 13] * 3 + [3 + 13] * 3
