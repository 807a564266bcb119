"""Tokenizers of SentencePiece inside GGUF files, against the package sentencepiece."""

import io

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nqkv_jax.models.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece", reason="the reference tokenizer")

CORPUS = [
    "The cache holds keys and values of all tokens before the latest one.",
    "the cat sat on the mat, and then the other cat sat on the other mat",
    "Keys are rotated; values are not.  Two  spaces   or three\tand a tab",
    "naïve café, déjà vu: Äpfel und Öl", "aaaa aaa aa a bbbb bab abba", "<b>bold</b> </b><b>",
]  # fmt: skip
CONTROL = ["<s>", "</s>"]
# Marks of the parts of a text that are tokens of their own, and characters that need bytes.
TEXTS = st.text(
    st.sampled_from("abcdehknorst TK.,;<>/éä\t\n") | st.characters(codec="utf-8"), max_size=60
) | st.lists(st.sampled_from([" ", "  ", "\n", "\n\n", "the", " cat", "aa", "<b>", "😀"])).map(
    "".join
)


def train(**options):
    """A BPE of about 400 pieces: the 256 bytes, characters, and what is merged of them."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=model, model_type="bpe", vocab_size=400,
        normalization_rule_name="identity", byte_fallback=True, hard_vocab_limit=False,
        remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(processor, *, prefix):
    """The keys that llama.cpp's converter writes."""
    ids = range(processor.get_piece_size())
    types = []
    for i in ids:
        if processor.is_unknown(i):
            types.append(2)
        elif processor.is_control(i):
            types.append(3)
        elif processor.is_byte(i):
            types.append(6)
        else:
            types.append(1 if processor.get_score(i) or i == first_merge(processor) else 4)
    pieces = [processor.id_to_piece(i) for i in ids]
    keys = {
        "model": "llama",
        "tokens": [
            p.replace("\u2581", " ") if t == 4 else p for p, t in zip(pieces, types, strict=True)
        ],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": types,
        "unknown_token_id": processor.unk_id(),
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
    }
    if not prefix:
        keys["add_space_prefix"] = False
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def first_merge(processor):
    """The piece with the score 0 that pieces given by the user have, too: the first after bytes."""
    return max(i for i in range(processor.get_piece_size()) if processor.is_byte(i)) + 1


@pytest.fixture(scope="module", params=["prefix", "no prefix"])
def pair(request):
    """The reference, and ours: as Llama 2's (a space comes before the text), and as Gemma's."""
    prefix = request.param == "prefix"
    options = dict(add_dummy_prefix=prefix)
    if not prefix:
        options["user_defined_symbols"] = ["\n", "\n\n", "\u2581\u2581"]
    processor = train(**options)
    return processor, Tokenizer.from_gguf(metadata_of(processor, prefix=prefix))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_tokens_are_those_of_sentencepiece(pair, text):
    processor, tokenizer = pair
    text = text.replace("\0", "").replace("\u2581", "")
    # The reference takes them for text; ours, as everywhere, for the tokens.
    assume(not any(token in text for token in CONTROL))
    expected = processor.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == processor.decode(expected) == text
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in expected]) + stream.flush() == text


@settings(deadline=None)
@given(data=st.data())
def test_a_stream_is_the_text_of_any_tokens(pair, data):
    """Also of bytes that are no characters."""
    processor, tokenizer = pair
    byte_ids = [i for i in range(processor.get_piece_size()) if processor.is_byte(i)]
    ids = st.integers(0, processor.get_piece_size() - 1) | st.sampled_from(byte_ids)
    ids = data.draw(st.lists(ids, max_size=12))
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_merges_matter(pair):
    processor, tokenizer = pair
    ids = tokenizer.encode(CORPUS[0], add_special_tokens=False)
    assert len(ids) < len(CORPUS[0]) / 2
    assert any(processor.is_byte(i) for i in tokenizer.encode("😀"))


def test_prompts_begin_with_bos(pair):
    processor, tokenizer = pair
    assert tokenizer.add_bos  # llama.cpp's default for this kind
    ids = tokenizer.encode("the cat")
    assert ids == [processor.bos_id(), *processor.encode("the cat")]
    assert tokenizer.decode(ids) == "the cat"
    np.testing.assert_array_equal(tokenizer.encode("<s>the cat"), ids)
    assert tokenizer.eos_ids == {processor.eos_id()}
    assert set(CONTROL) <= {tokenizer.decode([i], skip_special_tokens=False) for i in range(4)}
