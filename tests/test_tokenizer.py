"""Tokenizers: ids, special tokens, streaming, chat templates."""

import json
import random
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import models as token_models

from nqkv_jax.models.checkpoint import (
    CheckpointFileError,
    CheckpointNotFoundError,
    open_checkpoint,
)
from nqkv_jax.models.tokenizer import Tokenizer

OPT = {"model_type": "opt"}
TEXTS = [
    "The capital of France is",
    "In 1994 it cost $12,345.67\n\n\tand ½ more ",
    "naïve “quotes” 東京 😀👩‍👩‍👧 é",
    "  leading and trailing  ",
    "",
]


def byte_vocab(*special: str) -> dict[str, int]:
    """Special tokens, then one token for every byte."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {token: i for i, token in enumerate(names)}


def gguf_metadata(**changes):
    vocab = byte_vocab("<|start|>", "<|end|>")
    tokens = [*vocab, "ab", "abc"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata | {f"tokenizer.{name}": value for name, value in changes.items()}


@pytest.fixture(scope="module")
def smollm2():
    try:
        return open_checkpoint("smollm2-135m")
    except (CheckpointNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return Tokenizer.from_gguf(smollm2.metadata)


# --- OPT


@pytest.fixture
def opt_folder(shared_data):
    return shared_data / "opt_tokenizer"


def test_opt(opt_folder):
    tokenizer = Tokenizer.from_folder(opt_folder, OPT)
    assert tokenizer.encode("Hello world") == [2, 31414, 232]
    assert tokenizer.encode("I like you.") == [2, 100, 101, 47, 4]
    assert tokenizer.encode("I like you.", add_special_tokens=False) == [100, 101, 47, 4]
    assert tokenizer.encode("</s>I like you.") == [2, 100, 101, 47, 4]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (2, 1, {2})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([2, 100], skip_special_tokens=False) == "</s>I"


def test_opt_against_transformers(opt_folder):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    vocab = json.loads((opt_folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (opt_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    oracle = transformers.GPT2Tokenizer(
        vocab=vocab, merges=merges, bos_token="</s>", eos_token="</s>", unk_token="</s>"
    )
    tokenizer = Tokenizer.from_folder(opt_folder, OPT)
    for text in TEXTS:
        expected = oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def with_tokenizer_json(folder, vocab, *, processor=False, merges=(), bos="</s>", **settings):
    """A folder with a tokenizer.json, whose post-processor puts `bos` first if so asked."""
    backend = tokenizers.Tokenizer(token_models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(bos, special=True)])
    if processor:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    # Some publishers leave these switched on.
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("processor", [False, True], ids=["bare", "post-processor"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_bos_exactly_once(tmp_path, processor, flag):
    vocab = byte_vocab("<s>", "<pad>", "</s>")
    settings = {} if flag is None else {"add_bos_token": flag}
    folder = with_tokenizer_json(tmp_path, vocab, processor=processor, **settings)
    tokenizer = Tokenizer.from_folder(folder, OPT)
    a = [vocab["a"]] * 5  # longer than the truncation that the file asks for
    prompt = a if flag is False else [2, *a]
    assert tokenizer.encode("aaaaa") == prompt
    assert tokenizer.encode("</s>aaaaa") == [2, *a]  # as written, never twice
    assert tokenizer.encode("aaaaa", add_special_tokens=False) == a
    assert tokenizer.encode_batch(["aaaaa", "</s>"]) == [prompt, [2]]


def test_post_processor_alone_decides_for_other_models(tmp_path):
    vocab = byte_vocab("<s>", "</s>")
    for processor in (False, True):
        with_tokenizer_json(tmp_path, vocab, processor=processor, bos="<s>", bos_token="<s>")
        tokenizer = Tokenizer.from_folder(tmp_path, {"model_type": "llama"})
        assert tokenizer.encode("a") == [0] * processor + [vocab["a"]]


def test_special_tokens_from_all_files(tmp_path):
    vocab = byte_vocab("<s>", "<pad>", "</s>", "<end>", "<eot>")
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "[never added]"}
    with_tokenizer_json(tmp_path, vocab, **settings)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = Tokenizer.from_folder(tmp_path, {"model_type": "llama", "eos_token_id": 4})
    assert tokenizer.eos_ids == {2, 3, 4}
    assert tokenizer.bos_id == 0
    assert tokenizer.pad_id is None
    assert tokenizer.vocab_size == len(vocab)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = Tokenizer.from_folder(tmp_path, {"model_type": "llama", "bos_token_id": 0})
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 1)


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointFileError, match=r"tokenizer\.json must be a tokenizer's"):
        Tokenizer.from_folder(tmp_path)
    with_tokenizer_json(tmp_path, byte_vocab("</s>"), bos_token="<nowhere>")
    with pytest.raises(ValueError, match=r"not: \{'bos_token': '<nowhere>'\}"):
        Tokenizer.from_folder(tmp_path)


def test_bad_arguments():
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    with pytest.raises(ValueError, match="got one string"):
        tokenizer.encode_batch("text")
    with pytest.raises(ValueError, match="must be a string; got int"):
        tokenizer.encode(3)
    with pytest.raises(ValueError, match="not be negative; got -1"):
        tokenizer.decode([5, -1])
    assert tokenizer.decode(np.array(tokenizer.encode("abc"))) == "abc"


# --- GGUF


def test_gguf_pre_tokenizers():
    def pieces(text, pre):
        tokenizer = Tokenizer.from_gguf(gguf_metadata(**{"ggml.pre": pre, "ggml.add_bos_token": 0}))
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("abc 12", "gpt-2") == ["ab", "c", " ", "1", "2"]
    assert pieces("abc", "llama-bpe") == ["abc"]  # in the vocabulary, though no merge makes it
    assert pieces("abc", "qwen2") == ["ab", "c"]
    with pytest.raises(NotImplementedError, match=r"one of.*'smollm'.*got 'falcon'.*from_folder"):
        pieces("abc", "falcon")


def test_gguf_splits():
    metadata = gguf_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens += ["12", "123", "1234", "Ġ1", "Ġa"]
    merges = ["1 2", "12 3", "123 4", "Ġ 1", "Ġ a"]
    metadata |= {
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
    }

    def pieces(pre):
        tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre})
        return [tokenizer.decode([i]) for i in tokenizer.encode(" 1234 a", False)]

    assert pieces("gpt-2") == [" ", "1234", " a"]  # merged in the order of the list
    assert pieces("llama-bpe") == [" ", "123", "4", " a"]
    assert pieces("smollm") == pieces("qwen2") == [" ", "1", "2", "3", "4", " a"]


def test_gguf_bos():
    assert Tokenizer.from_gguf(gguf_metadata()).encode("a")[0] != 0
    for changes in ({"ggml.add_bos_token": True}, {"ggml.pre": "llama-bpe"}):
        tokenizer = Tokenizer.from_gguf(gguf_metadata(**changes))
        assert tokenizer.encode("a")[:2] == tokenizer.encode("<|start|>a")[:2]
        assert tokenizer.encode("a").count(0) == tokenizer.encode("<|start|>a").count(0) == 1
    assert Tokenizer.from_gguf(gguf_metadata(**{"ggml.eot_token_id": 7})).eos_ids == {1, 7}


def test_gguf_tokens_that_end_turns():
    """Published files of chat models name their end-of-text token alone."""
    metadata = gguf_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "<end_of_turn>", "<|eot_id|>", "<|im_end|>"]
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] += [3, 4, 1]
    assert Tokenizer.from_gguf(metadata).eos_ids == {1, len(tokens) - 3, len(tokens) - 2}


def test_gguf_of_other_kinds_is_refused():
    with pytest.raises(NotImplementedError, match=r"that of SentencePiece; got 't5'.*from_folder"):
        Tokenizer.from_gguf(gguf_metadata(**{"ggml.model": "t5"}))
    lacking = gguf_metadata(**{"ggml.model": "llama"})
    with pytest.raises(CheckpointFileError, match=r"scores for each of its 260 tokens; got 0"):
        Tokenizer.from_gguf(lacking)
    with pytest.raises(CheckpointFileError, match=r"must have tokenizer\.ggml\.tokens"):
        Tokenizer.from_gguf(lacking | {"tokenizer.ggml.tokens": []})
    with pytest.raises(CheckpointFileError, match="that of one of 260 tokens; got 260"):
        Tokenizer.from_gguf(lacking | {"tokenizer.ggml.unknown_token_id": 260})
    lacking |= {"tokenizer.ggml.scores": [0.0] * 260, "tokenizer.ggml.token_type": [1]}
    with pytest.raises(CheckpointFileError, match=r"token_type for each of its 260 tokens; got 1"):
        Tokenizer.from_gguf(lacking)


def test_smollm2(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("1994")
    assert [tokenizer.decode([i]) for i in digits] == ["1", "9", "9", "4"]
    # The one place in WikiText-2's test set where GPT-2's splitting alone gives other tokens.
    assert tokenizer.encode("4 ½") == [36, *tokenizer.encode(" "), 16738]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (1, 2, {2})
    assert tokenizer.vocab_size == 49152


def test_smollm2_against_transformers(smollm2, smollm2_tokenizer, shared_data):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    metadata = smollm2.metadata
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    oracle = transformers.GPT2Tokenizer(vocab=vocab, merges=merges, unk_token="<|endoftext|>")
    backend = oracle.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"), backend.pre_tokenizer]
    )
    files = sorted((shared_data / "wikitext-2-raw").glob("*test*"))
    if not files:
        pytest.skip("no WikiText beside the repository")
    text = " and died 4 ½ months later\n" + files[0].read_text(encoding="utf-8")[:100_000]
    assert smollm2_tokenizer.encode(text) == oracle(text)["input_ids"]


# --- streaming


def test_stream_holds_incomplete_characters_back(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("東京 😀!")
    stream = smollm2_tokenizer.stream()
    given = [stream.push(i) for i in ids]
    assert "".join(given) + stream.flush() == "東京 😀!"
    assert all("\ufffd" not in text for text in given)
    assert given.count("") > 0  # otherwise this tests nothing


def test_stream_is_decode():
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    text = "é東😀a\ufffd \u200d"
    for seed in range(300):
        draw = random.Random(seed)
        ids = tokenizer.encode(text) if seed < 10 else []
        ids += [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(30))]
        for skip in (True, False):
            stream, given, rest = tokenizer.stream(skip_special_tokens=skip), "", list(ids)
            while rest:
                n = draw.randrange(1, 4)
                given += stream.push(*rest[:n])
                rest = rest[n:]
            assert given + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
            assert stream.flush() == ""


def test_stream_keeps_the_spaces_of_a_sentencepiece_decoder():
    vocab = {"▁a": 0, "▁b": 1, "c": 2}
    backend = tokenizers.Tokenizer(token_models.BPE(vocab, []))
    backend.decoder = decoders.Metaspace()  # drops the space before the first word
    stream = Tokenizer(backend).stream()
    assert [stream.push(i) for i in (0, 1, 2, 0)] == ["a", " b", "c", " a"]


# --- chat


def template(source, **tokens):
    backend = tokenizers.Tokenizer(token_models.BPE(byte_vocab("<s>", "</s>"), []))
    return Tokenizer(backend, chat_template=source, **tokens)


USER = [{"role": "user", "content": "Hi <there>"}]


def test_chat_smollm2(smollm2_tokenizer):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    system += "trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nHi <there><|im_end|>\n"
    prompt = smollm2_tokenizer.chat(USER)
    assert prompt == system + user + "<|im_start|>assistant\n"
    assert smollm2_tokenizer.chat(USER, add_generation_prompt=False) == system + user
    own = [{"role": "system", "content": "Be brief."}, *USER]
    assert smollm2_tokenizer.chat(own, False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + user
    )
    ids = smollm2_tokenizer.encode(prompt, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == prompt


TEMPLATES = [
    "{%- for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n  {% endif %}"
    "\n{%- endfor %}{{ eos_token }}",
    "{{ bos_token }}{{ messages | tojson }}{% if tools %}x{% endif %}{{ documents }}",
    "{{ messages | tojson(indent=2) }}{% for m in messages %}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ strftime_now('%Y') }}{% if pad_token is defined %}x{% endif %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_chat_against_transformers(source):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    tokenizer = template(source, bos_token="<s>", eos_token="</s>")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, bos_token="<s>", eos_token="</s>"
    )
    expected = oracle.apply_chat_template(
        USER, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.chat(USER) == expected


def test_chat_errors(monkeypatch):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    with pytest.raises(ValueError, match="must have a chat template"):
        template(None).chat(USER)
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").chat(USER)
    with pytest.raises(ValueError, match="not valid Jinja"):
        template("{% for %}").chat(USER)
    with pytest.raises(ValueError, match="mappings with 'role'"):
        template("{{ messages }}").chat(["Hi"])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[chat\]" in a checkout'):
        template("a template not compiled before").chat(USER)


def test_chat_templates_are_sandboxed():
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    for source in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(ValueError, match="refuses the messages"):
            template(source).chat(USER)


def test_where_templates_come_from(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    with_tokenizer_json(tmp_path, byte_vocab("</s>"), chat_template=named)
    assert Tokenizer.from_folder(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own file"
