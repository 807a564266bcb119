"""Log-likelihoods against float64 and transformers, what is made of them, and bad items."""

import importlib
import json

import jax
import numpy as np
import pytest
import tiny_checkpoint
from tiny_language_model import TinyLM

from nqkv_jax import schemes
from nqkv_jax.evaluation import last_word, multiple_choice, perplexity
from nqkv_jax.evaluation.choice import read_items
from nqkv_jax.evaluation.likelihood import Likelihood, Scorer, batches, check_pairs, encode_pair
from nqkv_jax.models import from_pretrained

LM = TinyLM.random()
MODULE = importlib.import_module("nqkv_jax.evaluation.choice")
RNG = np.random.default_rng(0)
PAIRS = [
    (RNG.integers(0, 256, int(n)).tolist(), RNG.integers(0, 256, int(m)).tolist())
    for n, m in zip(RNG.integers(1, 30, 45), RNG.integers(1, 12, 45), strict=True)
]


def test_scores_match_float64():
    apply = jax.jit(LM.apply)
    results = Scorer(LM, schemes.get("none"))(PAIRS)
    for (context, continuation), result in zip(PAIRS, results, strict=True):
        tokens = np.zeros((1, 64), np.int32)
        both = context + continuation
        tokens[0, : len(both)] = both
        logits = np.asarray(apply(LM.params, tokens)[0][0], np.float64)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows = np.arange(len(context) - 1, len(both) - 1)
        np.testing.assert_allclose(
            result.log_likelihood, logits[rows, continuation].sum(), rtol=1e-5, atol=1e-5
        )
        assert result.greedy == np.all(logits[rows].argmax(axis=1) == continuation)
        assert result.tokens == len(continuation)


def test_scores_are_those_of_decoding():
    """Perplexity is tested against the decode loop; a text's likelihood is the same figure."""
    tokens = RNG.integers(0, 256, 30).tolist()
    scorer = Scorer(LM, schemes.get("int2"))
    (whole,) = scorer([(tokens[:1], tokens[1:])])
    expected = perplexity(LM, tokens, scheme="int2", window=30)
    np.testing.assert_allclose(-whole.log_likelihood / 29, expected.nll, rtol=1e-4)
    # What follows the context is the rest of that, whatever else is in the batch.
    rest, first = scorer([(tokens[:10], tokens[10:]), (tokens[:1], tokens[1:10])])
    np.testing.assert_allclose(
        rest.log_likelihood + first.log_likelihood, whole.log_likelihood, rtol=1e-5
    )


def test_batches():
    pairs = [([0] * n, [0]) for n in (10, 40, 31, 32, 300, 30)]
    assert batches(pairs, 512) == [(512, [4]), (64, [1, 3]), (32, [0, 2, 5])]
    assert batches(pairs, 310)[0] == (310, [4])
    assert [len(m) for _, m in batches([([0] * 20, [0])] * 70, 512)] == [32, 32, 6]


def test_contexts_are_cut_at_the_front():
    ((context, continuation),) = check_pairs(LM, [(range(600), [1, 2, 3])])
    assert context == list(range(91, 600)) and continuation == [1, 2, 3]
    for pair in (([], [1]), ([1], []), ([1], [0] * 512)):
        with pytest.raises(ValueError, match=r"request 1 has \d+ and \d+"):
            check_pairs(LM, [([1], [2]), pair])


def test_blanks_go_to_the_continuation():
    assert encode_pair(LM, "ab  ", "cd") == (list(b"ab"), list(b"  cd"))
    assert encode_pair(LM, "ab", " cd") == (list(b"ab"), list(b" cd"))
    for texts in (("", "a"), ("  ", "a"), ("a", "")):
        with pytest.raises(ValueError, match="at least one token each"):
            encode_pair(LM, *texts)
    with pytest.raises(ValueError, match="without a tokenizer"):
        encode_pair(TinyLM(LM.params, tokenizer=None), "a", "b")


ITEMS = [
    dict(query="Question: how?\n", choices=["so", "otherwise"], gold=1),
    dict(query="It is ", choices=["aa", "bbbb", "c"], gold=0),
    dict(context_options=["He", "She"], continuation="did.", gold=1),
]


def scored(monkeypatch, values):
    """The texts that are scored; their log-likelihoods are `values`."""
    seen = []

    def fake(what, lm, pairs, **options):
        seen.extend((bytes(a).decode(), bytes(b).decode()) for a, b in pairs)
        return [Likelihood(log_likelihood=v, greedy=v > -1, tokens=1) for v in values], 1.5

    monkeypatch.setattr(MODULE, "recorded_likelihoods", fake)
    return seen


def test_multiple_choice(monkeypatch):
    # Right as they are: the third. Per character: the first, -4/2 < -9/9, and the third.
    seen = scored(monkeypatch, [-4, -9, -3, -2, -5, -2.5, -1])
    result = multiple_choice(LM, ITEMS, scheme="nqkv")
    assert seen == [
        ("Question: how?\nAnswer:", " so"), ("Question: how?\nAnswer:", " otherwise"),
        ("It is", " aa"), ("It is", " bbbb"), ("It is", " c"), ("He", " did."), ("She", " did."),
    ]  # fmt: skip
    assert (result.items, result.requests, result.seconds) == (3, 7, 1.5)
    np.testing.assert_allclose([result.accuracy, result.accuracy_norm], [1 / 3, 2 / 3])
    np.testing.assert_allclose(result.accuracy_error, np.std([0, 0, 1], ddof=1) / np.sqrt(3))
    low, high = result.accuracy_interval
    assert 0 < low < 1 / 3 < high < 1 and result.scheme == "nqkv"
    # The first of equals; and nobody is right by breaking down.
    scored(monkeypatch, [-2, -2, -1, -1, -1, -1, -1])
    assert multiple_choice(LM, ITEMS, scheme="none").accuracy == pytest.approx(1 / 3)
    scored(monkeypatch, [np.nan] * 7)
    broken = multiple_choice(LM, ITEMS, scheme="none")
    assert broken.accuracy == broken.accuracy_norm == 0


def test_last_word(monkeypatch):
    seen = scored(monkeypatch, [-0.5, -2, -3.5])
    items = [dict(context="a b", continuation=c) for c in "xyz"]
    result = last_word(LM, items, scheme="none")
    assert seen == [("a b", " x"), ("a b", " y"), ("a b", " z")]
    np.testing.assert_allclose(result.accuracy, 1 / 3)
    np.testing.assert_allclose([result.nll, result.perplexity], [2, np.exp(2)])
    np.testing.assert_allclose(result.nll_error, 1.5 / np.sqrt(3))
    with pytest.raises(ValueError, match=r"item 1 is .*choices.*Use `choice`"):
        last_word(LM, [items[0], ITEMS[0]], scheme="none")
    for measure in (multiple_choice, last_word):
        with pytest.raises(ValueError, match="expected at least one item; got none"):
            measure(LM, [], scheme="none")
    with pytest.raises(ValueError, match=r"item 1 is .*context.*Use `lambada`"):
        multiple_choice(LM, [ITEMS[0], items[0]], scheme="none")


def test_agrees_with_transformers(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model is there")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    tiny_checkpoint.write_tokenizer(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    lm = from_pretrained(tmp_path, dtype="float32", progress=False)

    pool = "of lamp six yes and no till".split()
    text = lambda n: " ".join(RNG.choice(pool, n))
    items = [
        dict(query=text(2), choices=[text(RNG.integers(1, 4)) for _ in range(3)], gold=i % 3)
        for i in range(12)
    ]
    theirs = np.zeros((12, 3))
    for i, item in enumerate(items):
        for j, choice in enumerate(item["choices"]):
            before = len(tokenizer.encode(item["query"], add_special_tokens=False))
            ids = tokenizer.encode(f"{item['query']} {choice}", add_special_tokens=False)
            with torch.no_grad():
                scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            rows = range(before - 1, len(ids) - 1)
            theirs[i, j] = sum(float(scores[t, ids[t + 1]]) for t in rows)

    ours, compute = [], MODULE.recorded_likelihoods

    def keep(*args, **options):
        found, seconds = compute(*args, **options)
        ours.extend(f.log_likelihood for f in found)
        return found, seconds

    monkeypatch.setattr(MODULE, "recorded_likelihoods", keep)
    result = multiple_choice(lm, items, scheme="none")
    ours = np.reshape(ours, (12, 3))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    gold = np.array([item["gold"] for item in items])
    lengths = np.array([[len(choice) for choice in item["choices"]] for item in items])
    assert result.accuracy == np.mean(theirs.argmax(axis=1) == gold)
    assert result.accuracy_norm == np.mean((theirs / lengths).argmax(axis=1) == gold)


@pytest.mark.parametrize("line, message", [
    ("a diary", r"line 2 must be a JSON object"),
    ("[1]", r"line 2: an item must be a JSON object with \{query, choices, gold\} or .*got \[1\]"),
    ('{"query": "x", "choices": ["a", "b"]}', "line 2: an item must be"),
    ('{"query": "x", "choices": ["a"], "gold": 0}', "choices must be at least two texts"),
    ('{"query": "x", "choices": "ab", "gold": 0}', "choices must be at least two texts"),
    ('{"query": "x", "choices": ["a", " "], "gold": 0}', "choices must be at least two texts"),
    ('{"query": "", "choices": ["a", "b"], "gold": 0}', "query must be a text that is not empty"),
    ('{"query": "x", "choices": ["a", "b"], "gold": 2}', "number of a choice, 0 to 1; got 2"),
    ('{"query": "x", "choices": ["a", "b"], "gold": true}', "0 to 1; got true"),
    ('{"context_options": ["a", "b"], "continuation": "c", "gold": -1}', "0 to 1; got -1"),
    ('{"context": "x", "continuation": 3}', "continuation must be a text that is not empty; got 3"),
])  # fmt: skip
def test_wrong_items(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(ITEMS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_items(path)
    assert read_items(path, limit=1) == [ITEMS[0]]


def test_lines_end_at_line_feeds_only(tmp_path):
    """A byte order mark, line ends of Unicode in texts, and blank lines, as files do have them."""
    first = dict(context="a\u2028b\x85c\u2029", continuation="d")
    lines = [json.dumps(first, ensure_ascii=False), "", json.dumps(ITEMS[0]), " ", "no", ""]
    path = tmp_path / "task.jsonl"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert read_items(path, limit=2) == [first, ITEMS[0]]
    with pytest.raises(ValueError, match="line 5 must be a JSON object"):
        read_items(path)


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="at least one item; it is empty"):
        read_items(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8; byte 0"):
        read_items(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        read_items(tmp_path / "latin.jsonl", limit=0)


def test_reads_the_shared_tasks(shared_data):
    for path in sorted((shared_data / "zeroshot").glob("*.jsonl")):
        assert len(read_items(path, limit=50)) == 50
