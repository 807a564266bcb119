"""benchmarks/gpu_decode.py, whole, in tiny shapes on a CPU; and when things go wrong."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time

import gpu_decode
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import CASES, arguments, dense, oracle
from flax import nnx
from gpu import check, report, splits, sweep
from gpu.dense_cache import DenseCache
from gpu.journal import LOST, DeviceLost, Journal, Unit, supervise, work
from gpu.shapes import Format, Shape, coded_caches, formats, shapes, sides

from nqkv_jax import schemes
from nqkv_jax.models import families
from nqkv_jax.models.loading import apply
from nqkv_jax.pallas_kernels.decode_attention import decode_attention

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
RECORD = {
    "spec", "implementation", "device", "jax", "median_us", "spread", "n", "bytes_read",
    "copy_fraction", "bits", "batch", "num_kv_heads", "context", "ratio_to_best_bf16",
}  # fmt: skip


def worker(folder, *parts):
    arguments = ["--worker", "--dry-run", "--out", str(folder), "--parts", *parts]
    return gpu_decode.main(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a whole dry run leaves."""
    folder = tmp_path_factory.mktemp("results")
    assert worker(folder, *gpu_decode.PARTS) == 0
    assert gpu_decode.report(folder) == 0
    return folder


def rows(folder, part):
    records = json.loads((folder / "gpu_decode.json").read_text())["records"]
    return [r for r in records if r["part"] == part]


def test_every_row_is_timed_or_says_why_not(folder):
    for part in ("sweep", "end-to-end", "splits"):
        for r in rows(folder, part):
            assert (r["median_us"] is None) == bool(r.get("skipped")), r
            if r["implementation"] == "mosaic_gpu":
                assert r["skipped"] == "needs an NVIDIA GPU; this is cpu"
    timed = [r for r in rows(folder, "sweep") if r["median_us"]]
    assert {r["implementation"] for r in timed} == {"jax.nn xla", "xla"}
    (copied,) = [r for r in rows(folder, "bandwidth") if r["implementation"] == "copy"]
    for r in timed:
        assert set(r) >= RECORD
        best = timed[0]["median_us"]  # on a CPU the one bfloat16
        assert r["ratio_to_best_bf16"] == pytest.approx(best / r["median_us"])
        seconds = r["median_us"] / 1e6
        fraction = r["bytes_read"] / seconds / copied["bytes_per_s"]
        assert r["copy_fraction"] == pytest.approx(fraction)


def test_appends_are_timed_against_what_comes_before_them(folder):
    found = {(r["spec"], r["implementation"], r["codebook"]): r for r in rows(folder, "append")}
    for spec in ("tiny/b1", "tiny/b2"):
        nothing = found[spec, "nothing", "none"]
        assert found[spec, "triton", "nqkv"]["skipped"] == "needs a GPU; this is cpu"
        for row in (found[spec, "xla", "none"], found[spec, "xla", "nqkv"]):
            assert row["own_us"] == pytest.approx(row["median_us"] - nothing["median_us"])
    assert "| tiny/b1 | xla | nqkv |" in (folder / "gpu_decode.md").read_text()


def test_an_append_is_a_part_of_the_step_that_has_it():
    append = dict(part="append", num_layers=4, batch=8, codebook="nqkv", median_us=9.0, own_us=5.0)
    step = dict(part="end-to-end", spec="m/equal batch", batch=8, codebook="nqkv", median_us=100.0,
                context=1, tokens_per_second=1.0, cache_bytes=1, spread=0.0)  # fmt: skip
    records = [
        append | dict(spec="m/b8", implementation="triton"),
        append | dict(spec="m/b8", implementation="xla"),
        append | dict(spec="m/b1", implementation="triton", batch=1),
        append | dict(spec="m/b1", implementation="xla", batch=1, own_us=None),
        step | dict(implementation="mosaic_gpu"),
    ]
    text = report.markdown(dict(device="d", jax="0", date="now"), records, {})
    assert "| m/b8 | triton | nqkv | 9.00 | 5.00 | 20.0% of a step |" in text
    assert "| m/b8 | xla | nqkv | 9.00 | 5.00 |  |" in text  # no such decoder was measured
    assert "| m/b1 | triton | nqkv | 9.00 | 5.00 |  |" in text
    assert "| m/b1 | xla | nqkv | 9.00 |  |  |" in text


def test_other_numbers_of_splits_are_timed(monkeypatch):
    """By XLA here, one of which fails."""
    shape, form = Shape(batch=1, context=2048, num_heads=4, num_kv_heads=2), formats()[0]

    def program(shape, form, n):
        if n == 4:
            raise RuntimeError("no four")
        attention = functools.partial(decode_attention, implementation="xla")
        return functools.partial(sweep.attend, form=form, shape=shape, attention=attention)

    monkeypatch.setattr(splits, "program", program)
    monkeypatch.setattr(splits, "why_not", lambda *a: None)
    (unit,) = splits.units([shape], [form], repeats=2)
    records = unit.run(lambda step: None, {"7": "died of signal 6"})
    assert [r["splits"] for r in records] == [8, 1, 4, 7]
    assert [r["taken"] for r in records] == [True, False, False, False]
    assert [r["median_us"] is not None for r in records] == [True, True, False, False]
    text = report.markdown(dict(device="d", jax="0", date="now"), records, {})
    assert "4: RuntimeError: no four, 7: died of signal 6, 8: " in text
    assert f"| {shape.name} | cubic4@128 | 8 | 1: " in text


def test_cases_are_checked_against_the_oracle(folder):
    found = {(r["spec"], r["implementation"]): r for r in rows(folder, "check")}
    assert found["cubic4/short", "xla"]["passed"] and found["cubic4/short", "xla"]["error"] < 1e-5
    assert found["cubic4/long", "mosaic_gpu"]["passed"] is None


def test_whole_decoders(folder):
    found = {(r["measure"], r["implementation"], r["codebook"]): r
             for r in rows(folder, "end-to-end")}  # fmt: skip
    equal, large = (found[m, "xla", "bf16"] for m in ("equal batch", "largest batch"))
    assert large["batch"] > equal["batch"] and large["cache_bytes"] < 2**22
    for row in (equal, large):
        assert row["cache_bytes"] + row["temporary_bytes"] < row["peak_bytes"] < 2**25
    assert found["no cache", "xla", "bf16"]["speedup_over_no_cache"] > 0
    for r in found.values():
        if r["median_us"]:
            assert r["tokens_per_second"] == pytest.approx(r["batch"] / r["median_us"] * 1e6)


def test_the_table_and_the_figure(folder):
    text = (folder / "gpu_decode.md").read_text()
    assert "| b2-t256-h4/2x128 |" in text and "mosaic_gpu cubic4@128: needs an NVIDIA GPU" in text
    # A row per shape, with as many cells as the header.
    header, _, row = text[text.index("| shape |") :].splitlines()[:3]
    assert header.count("|") == row.count("|")
    if not (folder / "gpu_decode.png").exists():
        pytest.importorskip("matplotlib")
    assert (folder / "gpu_decode.png").stat().st_size > 10_000


def test_a_bandwidth_that_is_not_known(folder, tmp_path):
    journal = Journal(folder / "gpu_decode.jsonl")
    records = gpu_decode._bandwidth(8).failed("no memory")
    for r in journal.records:
        if r["part"] != "bandwidth":
            records.append(r | dict(copy_fraction=None) if r["part"] == "sweep" else r)
    report.write(tmp_path, journal.machine, records, {})
    text = (tmp_path / "gpu_decode.md").read_text()
    assert "| copy |  |  | no memory |" in text and "| b2-t256-h4/2x128 |" in text


def test_all_kernels_are_checked_before_what_they_replace():
    names = [unit.name for unit in check.units(["cubic4", "vector2"])]
    assert names == [
        "check/cubic4/mosaic_gpu/short", "check/vector2/triton/short",
        "check/cubic4/mosaic_gpu/long", "check/vector2/triton/long",
        "check/cubic4/xla/short", "check/vector2/xla/short",
    ]  # fmt: skip


def test_a_run_goes_on_where_it_was_cut_off(folder, tmp_path, monkeypatch):
    lines = (folder / "gpu_decode.jsonl").read_text().splitlines(keepends=True)
    (cut,) = [i for i, line in enumerate(lines) if '"done", "unit": "bandwidth"' in line]
    (tmp_path / "gpu_decode.jsonl").write_text("".join(lines[:cut]) + lines[cut][:50])
    monkeypatch.setattr(check, "errors", None)  # would fail if a case ran again
    assert worker(tmp_path, "check", "bandwidth") == 0
    after = Journal(tmp_path / "gpu_decode.jsonl")
    assert sum(r["part"] == "bandwidth" for r in after.records) == 2
    assert [r for r in after.records if r["part"] == "check"] == [
        r for r in Journal(folder / "gpu_decode.jsonl").records if r["part"] == "check"
    ]


def test_time_that_is_up(tmp_path):
    arguments = ["--worker", "--dry-run", "--out", str(tmp_path), "--parts", "check"]
    assert gpu_decode.main([*arguments, "--deadline", "0"]) == 0
    assert Journal(tmp_path / "gpu_decode.jsonl").left == {"check": 8}
    assert gpu_decode.report(tmp_path) == 0
    assert (
        "Not reached in the time that was given: 8 of check"
        in (tmp_path / "gpu_decode.md").read_text()
    )


def test_results_of_another_machine_are_not_gone_on_with(tmp_path):
    Journal(tmp_path / "gpu_decode.jsonl").measured_on(
        device="H100", jax=jax.__version__, dry_run=True, date="2026-01-01"
    )
    with pytest.raises(SystemExit, match=r"begun with device 'H100', and this is 'cpu': .*--fresh"):
        worker(tmp_path, "check")


# Stands for a process that the device ends: of the steps it is told to leave one out.
PROCESS = """
import os, sys, pathlib, time
sys.path.insert(0, sys.argv[2])
from gpu.journal import Journal, Unit, work
journal = Journal(pathlib.Path(sys.argv[1]))
def run(note, fatal):
    note("good")
    if "bad" not in fatal:
        note("bad")
        os.abort() if sys.argv[3] == "dies" else time.sleep(60)
    return [dict(left_out=fatal)]
failed = lambda reason: [dict(failure=reason)]
examine = lambda error: None
work(journal, [Unit("first", run, failed), Unit("second", run, failed)], float("inf"), examine)
"""


@pytest.mark.parametrize("how, reason", [("dies", "died of signal 6"), ("hangs", "nothing hap")])
def test_a_process_that_ends_is_replaced_by_one_that_leaves_out_why(how, reason, tmp_path):
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", PROCESS, str(path), str(BENCHMARKS), how]
    assert supervise(command, path, patience=2.0, tries=3) == 0
    found = [r["left_out"] for r in Journal(path).records]
    assert len(found) == 2 and all(reason in left_out["bad"] for left_out in found)


def test_processes_that_do_not_begin_are_given_up(tmp_path):
    command = [sys.executable, "-c", "import os; os.abort()"]
    assert supervise(command, tmp_path / "none.jsonl", patience=5.0, tries=2) < 0


def test_a_process_is_ended_when_time_is_up(tmp_path):
    """What it was doing counts neither as done nor as the reason of the end."""
    path = tmp_path / "journal.jsonl"
    Journal(path).started("unit")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert supervise(command, path, patience=50.0, tries=2, until=time.time() + 0.5) == 0
    assert not Journal(path).is_done("unit") and not Journal(path).fatal("unit")


def test_after_a_lost_device_a_new_process_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    count = f"open({str(tmp_path / 'count')!r}, 'a')"
    code = f"import sys; f = {count}; f.write('x'); f.flush(); sys.exit({LOST} * (f.tell() < 2))"
    assert supervise([sys.executable, "-c", code], path, patience=50.0, tries=3) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_an_error_that_loses_the_device_is_told_from_others(tmp_path):
    def fail(note, fatal):
        raise RuntimeError("illegal address")

    def examine(error):
        raise DeviceLost(str(error))

    journal = Journal(tmp_path / "journal.jsonl")
    unit = Unit("unit", fail, lambda reason: [dict(failure=reason)])
    with pytest.raises(DeviceLost, match="illegal address"):
        work(journal, [unit], float("inf"), examine)
    journal.ended("the device failed")
    assert work(Journal(journal.path), [unit], float("inf"), examine) == 0
    assert Journal(journal.path).records == [dict(failure="the device failed")]


def test_wrong_output_is_found():
    given = arguments(CASES["cubic4"], (200, 0), num_tiles=2)
    out, total = oracle(*given, None)
    good = (out, np.exp(np.where(np.isinf(total), -np.inf, 0)), np.where(np.isinf(total), 0, total))
    assert max(check.errors(given, good, None).values()) < 1e-12
    off = (out + 0.1 * np.abs(dense(given[2])).max(), *good[1:])
    assert check.errors(given, off, None)["error"] == pytest.approx(0.1)
    nan = (np.where(out == out.max(), np.nan, out), *good[1:])
    assert not check.errors(given, nan, None)["error"] <= 1
    with pytest.raises(ValueError, match="sums above 0 where tokens are seen"):
        check.errors(given, (out, np.ones_like(total), total), None)


def test_caches_take_the_bytes_that_are_reported():
    for form in formats():
        for shape in (Shape(batch=2, context=256, num_heads=4, num_kv_heads=2), shapes()[-1]):
            cache = jax.eval_shape(
                lambda key, s=shape, f=form: coded_caches(key, s, f, 3), jax.random.key(0)
            )
            assert len(cache) == 3
            key, value = sides(cache[0], form)
            # Waves are functions of the position, not stored.
            arrays = jax.tree.leaves((dataclasses.replace(key, waves=None), value))
            assert sum(a.size * a.dtype.itemsize for a in arrays) == form.nbytes(shape)
    assert Format().nbytes(shapes()[0]) == 4 * shapes()[0].elements
    assert shapes()[0].name == "b8-t32768-h32/8x128" and len({s.name for s in shapes()}) == 24


def test_small_caches_take_turns():
    small, large = (
        sweep.rows_of(Shape(batch=1, context=n, num_heads=32, num_kv_heads=8), formats(), 16)
        for n in (2048, 131072)
    )
    assert all(row.copies == 16 or row.copies * row.form.nbytes(
        Shape(batch=1, context=2048, num_heads=32, num_kv_heads=8)) >= 100 * 2**20
        for row in small)  # fmt: skip
    assert all(row.copies == 1 for row in large if row.form.bits > 2)


def test_the_dense_cache_decodes_like_a_cache_in_full_precision():
    config = dataclasses.replace(
        families.presets["llama-3-8b"], vocab_size=32, hidden_size=32, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, ffn_size=32,
    )  # fmt: skip
    graphdef, params = nnx.split(families.build(config))
    sizes = dict(num_layers=2, num_kv_heads=2, head_dim=16, batch=2, max_len=8)
    other = schemes.get("none").init(**sizes, dtype=jnp.float32)
    side = (jnp.zeros((2, 8, 2, 16), jnp.float32),) * 2
    cache = DenseCache(keys=side, values=side, lengths=jnp.zeros(2, jnp.int32),
                       implementation="xla")  # fmt: skip
    step = jax.jit(lambda tokens, cache: apply(graphdef, params, tokens, cache, last_only=True))
    for token in ([3, 9], [27, 1], [5, 5], [8, 30]):
        tokens = jnp.asarray(token, jnp.int32)[:, None]
        logits, cache = step(tokens, cache)
        expected, other = step(tokens, other)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [4, 4]


def test_nothing_has_to_be_installed():
    """The folders of the checkout are found without an installation's map of them."""
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path[:0] = [{str(BENCHMARKS)!r}]
import gpu_decode, gpu.end_to_end
from nqkv_jax.models import families
from nqkv_jax.models.checkpoint import open_checkpoint
from nqkv_jax.pallas_kernels.decode_attention import mosaic_gpu
print(families.__file__, mosaic_gpu.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    root = BENCHMARKS.parent
    files = [root / "models/families.py", root / "pallas_kernels/decode_attention/mosaic_gpu.py"]
    assert done.stdout.split() == [str(f) for f in files], done.stderr


@pytest.mark.parametrize(
    "wrong, message", [(["--minutes", "0"], "expected minutes > 0; got 0"),
                       (["--parts", "sleep"], "invalid choice: 'sleep'")],
)  # fmt: skip
def test_bad_input(wrong, message, capsys):
    with pytest.raises(SystemExit):
        gpu_decode.main(wrong)
    assert message in capsys.readouterr().err
