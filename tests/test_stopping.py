"""Generation: stopping, streaming, sampling."""

import dataclasses
import functools

import pytest
from tiny_generators import SHARED, byte_tokenizer, random_prompts, tiny

from nqkv_jax.models import Sampling, generate, stream

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
