"""The leaderboard: what is measured again and what is not, and what readers get."""

import html.parser
import importlib
import json
import math
import types

import numpy as np
import pytest
import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from tiny_language_model import TinyLM

from nqkv_jax import schemes
from nqkv_jax.cli import main
from nqkv_jax.evaluation import leaderboard as boards
from nqkv_jax.evaluation import report
from nqkv_jax.evaluation.throughput import CacheTiming, PairedTimings

DIVERGENCE = importlib.import_module("nqkv_jax.evaluation.divergence")
TOKENS = np.random.default_rng(1).integers(0, 256, 100)


class LongLM(TinyLM):
    config = types.SimpleNamespace(**(vars(TinyLM.config) | dict(max_positions=2048)))


LM = LongLM.random()
SETTINGS = boards.Settings(
    window=32, max_tokens=96, passkey_length=600, passkey_samples=2, repeats=3
)


class Killed(BaseException):
    """Nothing that could be caught by mistake."""


class Log(list):
    """What was done; `append` dies instead, once at each of the lengths in `deaths`."""

    deaths = frozenset()

    def append(self, item):
        if len(self) in self.deaths:
            self.deaths = self.deaths - {len(self)}
            raise Killed
        super().append(item)


@pytest.fixture
def done(monkeypatch):
    """Stand-ins for what takes time; the list says what was done."""
    done = Log()

    def comparer(lm, scheme, dtype):
        def compare(params, tokens):
            done.append(("kl", str(scheme)))
            worse = len(str(scheme)) - 3
            return dict(
                kl=np.full(31, 0.01 * worse), same=np.ones(31), full_nll=np.full(31, 2.0),
                nll=np.full(31, 2 + 0.1 * worse),
            )  # fmt: skip

        return compare

    class Timings:
        def __init__(self, lm, *, length, steps, repeats):
            assert (length, steps, repeats) == (24, 8, 3)

        def __call__(self, scheme):
            done.append(("speed", str(scheme)))
            time = lambda s: CacheTiming(
                variant="x", cache_dtype="float32", length=24, cache_bytes=9, seconds=(s, s, 2 * s)
            )
            return time(0.1), time(0.2)

    monkeypatch.setattr(DIVERGENCE, "comparer", comparer)
    monkeypatch.setattr(boards, "PairedTimings", Timings)
    # Nothing is compiled here that would fill the memory.
    monkeypatch.setattr(boards.jax, "clear_caches", lambda: None)
    return done


def make(done, folder, *names, settings=SETTINGS, text=TOKENS):
    def generate(lm, prompts, *, scheme, **options):
        done.append(("passkey", str(scheme)))
        return types.SimpleNamespace(tokens=[[] for _ in prompts])

    entries, missing = boards.resolve(names, {})
    return boards.leaderboard(
        LM, entries, text, generate=generate, folder=folder, settings=settings, missing=missing,
        progress=False,
    )  # fmt: skip


def once(*names):
    return [(m, n) for n in names for m in ["kl"] * 3 + ["passkey", "speed"]]


def test_only_what_changed_is_measured(done, tmp_path):
    board = make(done, tmp_path, "none", "nqkv")
    assert done == once("none", "nqkv")
    done.clear()
    assert make(done, tmp_path, "none", "nqkv") == board and not done
    more = make(done, tmp_path, "none", "int4", "nqkv")
    assert done == once("int4") and more["rows"][2] == board["rows"][1]
    done.clear()
    change = lambda **fields: boards.Settings(**(vars(SETTINGS) | fields))
    make(done, tmp_path, "nqkv", settings=change(passkey_samples=3))
    assert done == [("passkey", "nqkv")]
    done.clear()
    make(done, tmp_path, "nqkv", settings=change(max_tokens=64))
    assert done == [("kl", "nqkv")] * 2
    done.clear()
    make(done, tmp_path, "nqkv", text=TOKENS[::-1])
    assert done == [("kl", "nqkv")] * 3
    done.clear()
    # And what was measured first is still there.
    assert make(done, tmp_path, "none", "nqkv") == board and not done


def test_another_version_is_another_measurement(done, tmp_path, monkeypatch):
    make(done, tmp_path, "nqkv")
    done.clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert make(done, tmp_path, "nqkv")["versions"]["nqkv-jax"] == "99"
    assert done == once("nqkv")


def test_killed_and_resumed(done, tmp_path):
    names = ("none", "nqkv", "int4")
    expected = make(done, tmp_path / "undisturbed", *names)
    whole = list(done)
    done.clear()
    # Once in the middle of a text, once before pass keys, and once before a timing.
    done.deaths = {1, 8, 14}
    for deaths in (3, 2, 1):
        with pytest.raises(Killed):
            make(done, tmp_path / "disturbed", *names)
        assert len(done.deaths) == deaths - 1
    assert make(done, tmp_path / "disturbed", *names) == expected
    # Nothing that was finished is done again.
    assert done == whole


def test_wrong_timings():
    for length in (0, 2041):
        with pytest.raises(ValueError, match=r"lengths must be between 1 and 20.*got"):
            PairedTimings(LM, length=length)
    with pytest.raises(ValueError, match="steps and repeats must be positive; got 1, 0, 5"):
        PairedTimings(LM, length=9, steps=0)


@pytest.mark.slow
def test_timings_are_paired():
    ours, full = PairedTimings(LM, length=70, steps=2, repeats=3)("int4")
    assert (ours.variant, full.variant) == ("int4", "none")
    assert len(ours.seconds) == len(full.seconds) == 3 and min(ours.seconds + full.seconds) > 0
    assert (ours.length, full.length) == (70, 70) and ours.cache_bytes < full.cache_bytes


def test_rows(done, tmp_path):
    board = make(done, tmp_path, "none", "nqkv", "kvquant:bits=3,calibration={kvquant}")
    none, nqkv = board["rows"]
    assert board["missing"] == {"kvquant:bits=3,calibration=...": "needs a calibration text"}
    assert (none["stored_bits"], nqkv["stored_bits"]) == (16, 4.25)
    assert nqkv["effective_bits"] > 4.25  # lengths and overflows of a cache for 32 tokens
    np.testing.assert_allclose([none["kl"], nqkv["kl"]], [0.01, 0.01], rtol=1e-9)
    np.testing.assert_allclose(nqkv["perplexity"] / nqkv["full_perplexity"], np.exp(0.1))
    assert (nqkv["tokens_per_second"], nqkv["speed_over_full"], nqkv["spread"]) == (10, 2, 1)
    assert (nqkv["passkey"], nqkv["passkey_samples"], nqkv["tokens"]) == (0, 2, 93)
    assert board["model"] == "tiny" and board["settings"]["window"] == 32
    json.dumps(board)


def test_calibrations_are_made_once(tmp_path, monkeypatch):
    made = []

    def write(lm, text, *, out, samples, seqlen, progress):
        made.append(("kvquant", samples, seqlen))
        out.write_text("{}")

    def learn(lm, text, *, out, bits, samples, seqlen, progress):
        made.append((f"commvq{bits}", samples, seqlen))
        out.write_text("{}")

    class Allocation:
        def save(self, path):
            path.write_text("{}")

    def allocate(lm, tokens, *, budget, score, group_size, progress):
        made.append(("kvq", len(tokens), group_size))
        return Allocation()

    monkeypatch.setattr(boards.kvquant, "calibrate", write)
    monkeypatch.setattr(boards.kvq, "calibrate", allocate)
    monkeypatch.setattr(boards.commvq, "calibrate", learn)
    calibrate = lambda text, **o: boards.calibrations(LM, text, tmp_path / "new", **o)
    text, sizes = "some text " * 200, dict(samples=2, seqlen=64)
    first = calibrate(text, **sizes)
    assert made == [("kvquant", 2, 64), ("commvq1", 2, 64), ("commvq2", 2, 64), ("kvq", 128, 32)]
    assert calibrate(text, **sizes) == first and len(made) == 4
    assert calibrate("another " * 20, **sizes) != first and len(made) == 8
    wanted = calibrate(text, wanted={"kvq"}, samples=3, seqlen=64)
    assert list(wanted) == ["kvq"] and made[8:] == [("kvq", 128, 32)]
    calibrate(text, wanted={"commvq2"}, samples=3, seqlen=600)
    assert made[9:] == [("commvq2", 3, 512)]
    # KVQ reads two windows at once, as far as the model can.
    calibrate("some text " * 500, wanted={"kvq"}, samples=2, seqlen=2000)
    assert made[10:] == [("kvq", 2048, 32)]


def test_calibrations_that_cannot_be_made_fail_first(tmp_path, monkeypatch):
    monkeypatch.setattr(boards.kvquant, "calibrate", lambda *_, **__: pytest.fail("it was begun"))
    with pytest.raises(ValueError, match="at least 128 tokens in all windows; got 64"):
        boards.calibrations(LM, "some text " * 9, tmp_path / "new", samples=2, seqlen=32)
    assert not list(tmp_path.iterdir())


def test_every_registered_scheme_has_a_row():
    entries, missing = boards.resolve(boards.variants(), {})
    assert {s.name for s in entries.values()} | {m.partition(":")[0] for m in missing} == set(
        schemes.names()
    )
    assert all(any(name in m for name in ("kvquant", "kvq:alloc", "commvq")) for m in missing)


def test_scheme_that_does_not_fit_fails_first(done, tmp_path):
    with pytest.raises(ValueError, match="48"):
        make(done, tmp_path, "none", "nqkv:block_size=48")
    assert not done
    with pytest.raises(ValueError, match="unknown scheme"):
        make(done, tmp_path, "nqvk")


def test_all_are_those_that_fit():
    entries, _ = boards.resolve(["none", "nqkv:block_size=48", "kvq"], {})
    found, missing = boards.fitting(LM, entries)
    assert list(found) == ["none"] and set(missing) == {"nqkv:block_size=48", "kvq"}
    assert "48" in missing["nqkv:block_size=48"] and "head_dim=32" in missing["kvq"]


def row(label, **fields):
    return dict(
        label=label, scheme=label, stored_bits=4.0, effective_bits=4.5, kl=0.1, kl_error=0.01,
        kl_p99=1.0, top1=0.9, top1_error=0.01, nll_increase=0.1, nll_increase_error=0.01,
        perplexity=22.0, full_perplexity=20.0, tokens=93, passkey=0.75,
        passkey_interval=[0.3, 0.9], passkey_samples=4, tokens_per_second=20.0, spread=0.1,
        speed_over_full=1.25,
    ) | fields  # fmt: skip


BOARD = dict(
    model="tiny", dtype="float32", text_sha256="", settings=vars(SETTINGS), device="cpu", cores=2,
    processor="a <fast> one", date="2026-01-02", versions={"nqkv-jax": "1", "jax": "2"},
    missing={"kvquant": "because"},
    rows=[
        row("none", kl=1e-11, kl_error=None, perplexity=20.0, stored_bits=16.0),
        row("a&b"), row("a:bits=2", kl=None, kl_error=None, kl_p99=None, perplexity=None),
    ],
)  # fmt: skip


def test_markdown():
    header, rule, none, first, broken = report.markdown(BOARD).splitlines()
    assert header.count("|") == rule.count("|") == none.count("|") == broken.count("|")
    assert first == (
        "| `a&b` | 4.00 | 4.50 | 22.00 | +10.0 % | 0.1 ± 0.01 | 1 | 90.0 % | 75 % | 20.0 | 1.25 |"
    )
    assert "| 1.0e-11 | " in none and "| nan | +nan % | - | - | 90.0 % |" in broken
    assert "93 tokens in windows of 32" in report.caption(BOARD)
    assert "`kvquant` is left out: because." in report.caption(BOARD)
    alone = BOARD | dict(cores=1, settings=BOARD["settings"] | dict(passkey_samples=1))
    assert ". 1 text of 600 tokens" in report.caption(alone)
    assert "a <fast> one, 1 core." in report.caption(alone)


def test_page_needs_nothing_else():
    page = report.page(BOARD, b"\x89PNG")
    found = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

        def handle_data(self, data):
            found.append(("", data))

    Parser().feed(page)
    assert "http" not in page
    sources = [a["src"] for t, a in found if t == "img"]
    assert sources == ["data:image/png;base64,iVBORw=="]
    assert sum(t == "tr" for t, _ in found) == 4 and "a &lt;fast&gt; one" in page
    assert ("", "a&b") in found


def test_figure():
    image = report.png(BOARD)
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    axes = report.figure(BOARD).axes
    named = lambda a: [text.get_text() for text in a.texts]
    assert named(axes[0]) == ["a&b"]  # `none` has no divergence, and "a:bits=2" no finite one
    assert named(axes[1]) == ["a&b", "none"]
    assert len({line.get_color() for line in axes[0].lines}) <= len(report.COLORS) + 1


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf])] * 2)))
def test_front(points):
    finite = [p for p in points if all(map(math.isfinite, p))]
    better = lambda p: any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in finite)
    found = report.front(points)
    assert sorted({points[i] for i in found}) == sorted({p for p in finite if not better(p)})
    assert [points[i][0] for i in found] == sorted({points[i][0] for i in found})


@pytest.mark.parametrize("argv, message", [
    ("--schemes nqvk", "unknown scheme 'nqvk'"),
    ("--schemes none --text ./no.txt", "no.txt"),
    ("--schemes none --calibration-text ./no.txt", "no.txt"),
    ("--schemes commvq:calibration={commvq3}", "kvquant, kvq, commvq1, commvq2; got commvq3"),
    ("--model ./nowhere", "nowhere"),
    ("--schemes none --workers 0", "--workers must be at least 1; got 0"),
])  # fmt: skip
def test_wrong_arguments(capsys, tmp_path, argv, message):
    assert main(["leaderboard", "--out", str(tmp_path / "board"), *argv.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(capsys, tmp_path):
    """Everything, calibrations included, on a real model of a few thousand parameters.

    In two processes; and then again, in one that finds all that they have done.
    """
    (tmp_path / "model").mkdir()
    model = tiny_checkpoint.write(tmp_path / "model", max_position_embeddings=1024)
    text = tmp_path / "text.txt"
    text.write_text("Some words to learn from, and then some more of them. " * 20)
    out = tmp_path / "board"
    argv = ["leaderboard", "--model", model, "--schemes", "none", "int4",
            "kvquant:bits=3,calibration={kvquant}", "kvq:group_size=32,allocation={kvq}",
            "--calibration-text", str(text), "--calibration-samples", "2",
            "--calibration-window", "64", "--max-tokens", "128", "--window", "64",
            "--passkey-samples", "2", "--repeats", "2", "--out", str(out), "--json"]  # fmt: skip
    assert main([*argv, "--workers", "2"]) == 0
    first = capsys.readouterr().out
    board = json.loads(first)
    assert [r["label"] for r in board["rows"]] == [
        "none", "int4", "kvquant:bits=3,calibration=...", "kvq:group_size=32,allocation=...",
    ]  # fmt: skip
    none, int4, kvquant, kvq = (r["kl"] for r in board["rows"])
    assert none < 1e-6 < min(int4, kvquant)
    assert kvq < 1e-6  # in a window of 64 tokens a residual of 128 is all there is
    assert json.loads((out / "leaderboard.json").read_text()) == board
    assert report.markdown(board) in (out / "leaderboard.md").read_text()
    assert {p.suffix for p in out.glob("leaderboard.*")} == {".json", ".md", ".png", ".html"}
    assert main(argv) == 0 and capsys.readouterr().out == first
