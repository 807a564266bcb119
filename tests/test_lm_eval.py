"""The model as lm-evaluation-harness sees it, alone and in a whole evaluation."""

import types
import warnings

import numpy as np
import pytest
import tiny_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the harness's dependencies have their own
    lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[lm-eval]"')
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

from nqkv_jax import schemes
from nqkv_jax.cli.lm_eval import NqkvLM
from nqkv_jax.evaluation.likelihood import Scorer
from nqkv_jax.evaluation.lm_eval import HarnessLM
from nqkv_jax.models import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), max_position_embeddings=32)


@pytest.fixture(scope="module")
def model(folder):
    arguments = f"pretrained={folder},scheme=nqkv,bits=3,block_size=32,max_gen_toks=6"
    given = dict(batch_size=2, max_batch_size=None, device=None)  # as the harness passes them
    return get_model("nqkv").create_from_arg_string(arguments, given)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def test_registered_with_its_options(model):
    assert isinstance(model, NqkvLM)
    assert model.get_model_info()["scheme"] == "nqkv:bits=3,block_size=32"
    with pytest.raises(ValueError, match="has no option 'bit'"):
        get_model("nqkv").create_from_arg_string("pretrained=nowhere,scheme=nqkv,bit=3")


def test_loglikelihood(model):
    found = model.loglikelihood(
        requests("loglikelihood", ("abc ", "def"), ("", "xyz"), ("abc", " def")), disable_tqdm=True
    )
    ids = model.tok_encode
    pairs = [(ids("abc"), ids(" def")), ([256], ids("xyz"))]
    expected = Scorer(model._lm, schemes.get("nqkv:bits=3,block_size=32"))(pairs)
    assert found == [
        (expected[i].log_likelihood, expected[i].greedy) for i in (0, 1, 0)
    ]  # a blank at the end of a context is read as one before the continuation


def test_loglikelihood_rolling(model):
    """Every token once: a BOS token first, then windows of 31 tokens and what is left."""
    text = "what is seen is what is scored, " * 2
    (found,) = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    ids = model.tok_encode(text)
    assert len(ids) == 64
    # The last window has full context, and only its last two tokens count.
    pairs = [([256], ids[:31]), (ids[30:31], ids[31:62]), (ids[32:62], ids[62:])]
    expected = model._scorer(pairs)
    np.testing.assert_allclose(found, sum(e.log_likelihood for e in expected), rtol=1e-6)
    assert sum(e.tokens for e in expected) == len(ids)


def test_generate_until(model):
    prompts = ["ab", "cdefg", "hi", "z" * 60]
    settings = dict(until=["\n"], max_gen_toks=6, do_sample=False, temperature=0.0)
    found = model.generate_until(
        requests("generate_until", *((p, settings) for p in prompts)), disable_tqdm=True
    )
    # Two at a time, the longest first; the end of what is too long.
    together = [("z" * 26, "cdefg"), ("ab", "hi")]
    for pair in together:
        result = generate(
            model._lm, [model.tok_encode(p) for p in pair], scheme="nqkv:bits=3,block_size=32",
            max_new_tokens=6, stop=["\n"],
        )  # fmt: skip
        for prompt, text in zip(pair, result.texts, strict=True):
            assert found[prompts.index(prompt if prompt in prompts else "z" * 60)] == text


def test_generation_settings(model):
    assert model._stopping(dict(until="\n\n")) == (("\n\n",), 6)
    assert model._stopping(dict(until=["a", ""], max_new_tokens=3)) == (("a",), 3)
    assert model._stopping(dict(temperature=0.7, do_sample=False)) == ((), 6)
    for settings in (dict(do_sample=True), dict(temperature=0.7)):
        with pytest.raises(ValueError, match="do_sample must be false"):
            model._stopping(settings)
    with pytest.raises(ValueError, match="32 new tokens must fit into the 32 positions"):
        model._continue(["a"], (), 32)


def test_wrong_arguments(model):
    for size in (0, "auto", 1.5):
        with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
            HarnessLM(model._lm, generate, batch_size=size)
    nameless = types.SimpleNamespace(tokenizer=None, name="odd")
    with pytest.raises(ValueError, match="odd came without a tokenizer"):
        HarnessLM(nameless, generate)


def test_chat(model):
    history = [dict(role="user", content="Hello")]
    assert model.apply_chat_template(history) == "<user>Hello"
    assert "messages" in model.chat_template(True) and model.tokenizer_name == model._lm.name


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_whole_evaluation(model):
    """A task of our own from definition to score, in the harness's evaluator."""
    docs = [
        dict(question=f"{a}?", choices=["yes", "no", "perhaps"], answer=i % 3)
        for i, a in enumerate("abcde")
    ]

    def dataset(**kwargs):
        import datasets

        return {"test": datasets.Dataset.from_list(docs)}

    task = dict(
        task="tiny_choice", custom_dataset=dataset, test_split="test",
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[dict(metric="acc"), dict(metric="acc_norm")],
    )  # fmt: skip
    results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    found = results["results"]["tiny_choice"]
    ids = model.tok_encode
    pairs = [(ids(doc["question"]), ids(f" {c}")) for doc in docs for c in doc["choices"]]
    scores = np.reshape([f.log_likelihood for f in model._scorer(pairs)], (5, 3))
    gold = [d["answer"] for d in docs]
    assert found["acc,none"] == np.mean(scores.argmax(axis=1) == gold)
    lengths = [len(c) for c in docs[0]["choices"]]
    assert found["acc_norm,none"] == np.mean((scores / lengths).argmax(axis=1) == gold)


def test_a_model_that_needs_a_bos_token_gets_it(model, monkeypatch):
    """As the harness does it for Gemma."""
    plain = model.tok_encode("abc")
    monkeypatch.setattr(type(model._lm.config), "opening", (256,))
    assert model.tok_encode("abc") == [256, *plain]
    assert model.tok_encode("abc", add_special_tokens=False) == plain
    monkeypatch.setattr(
        model, "tokenizer", types.SimpleNamespace(encode=lambda text, **_: [256, *plain])
    )
    assert model.tok_encode("abc") == [256, *plain]  # as a chat template wrote it
    monkeypatch.undo()
    monkeypatch.setattr(type(model._lm.config), "opening", (256,))
    prompts = []

    def generate(lm, batch, **given):
        prompts.extend(batch)
        return types.SimpleNamespace(texts=["x"] * len(batch))

    monkeypatch.setattr(model, "_generate", generate)
    assert model._continue(["abc" * 20], (), 6) == ["x"]
    assert len(prompts[0]) == 26 and prompts[0][0] == 256
    seen = []
    monkeypatch.setattr(model, "_likelihoods", lambda pairs, _: seen.extend(pairs) or [])
    with pytest.raises(ValueError, match="shorter"):  # nothing was scored
        model.loglikelihood_rolling(requests("loglikelihood_rolling", ("abc",)), disable_tqdm=True)
    assert seen == [([256], plain)]
