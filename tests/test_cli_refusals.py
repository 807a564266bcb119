"""What is wrong with a command's arguments is said before the weights of its model are read."""

import pytest
import tiny_checkpoint

from nqkv_jax.cli import main
from nqkv_jax.models.checkpoint import Checkpoint

CHOICE = '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'
WORD = '{"context": "a b", "continuation": "c"}\n'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by their names; the model has 256 positions, the text 200 tokens."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    paths = dict(model=tiny_checkpoint.write(folder / "model"), folder=folder)
    contents = dict(text="so many words, " * 13 + ".....", short="x", choice=CHOICE, word=WORD)
    for name, content in contents.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(content)
    return paths


@pytest.fixture
def refuses(capsys, monkeypatch, files):
    """Runs a command, {names} of files in it; the one line on stderr."""

    def read(checkpoint):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Checkpoint, "tensors", read)

    def run(command: str) -> str:
        status = main(command.format(**files).split())
        out, err = capsys.readouterr()
        *before, last = err.splitlines()
        assert status == 2 and not out and last.startswith("nqkv: error: ")
        assert all(line.startswith("Loading") for line in before)
        return last

    return run


GENERATE = "generate --model {model} --prompt x"
PPL, KL = (f"eval {name} --model {{model}} --text {{text}}" for name in ("ppl", "kl"))
DRIFT = "eval drift --model {model} --text {text}"
PASSKEY = "eval passkey --model {model}"
BENCH = "bench cache --model {model}"
KVQUANT, KVQ, COMMVQ = (
    f"calibrate {name} --model {{model}} --text {{text}} --out {{folder}}/{file}"
    for name, file in (("kvquant", "a.safetensors"), ("kvq --group-size 32", "a.json"),
                       ("commvq", "b.safetensors"))
)  # fmt: skip
ANALYZE = "analyze {} --model {{model}} --text {{text}}"
NORMALITY, HEATMAP, SPECTRA, ERROR, REPORT = map(
    ANALYZE.format, ("normality", "heatmap", "spectra", "error", "report --out {{folder}}/report")
)
BOARD = "leaderboard --model {model} --schemes none --text {text} --out {folder}/board"
SMALL = BOARD + " --window 64 --passkey-length 230"
BOARD_CALIBRATED = SMALL.replace(
    "none", "none kvquant:calibration={{kvquant}} commvq:calibration={{commvq2}}"
) + " --calibration-text {text}"  # fmt: skip

REFUSED = [
    (GENERATE + " --max-new-tokens 0", "max_new_tokens must be a whole number >= 1; got 0"),
    (GENERATE + " --max-new-tokens 256", "must fit into the 256 positions"),
    (GENERATE + " --max-len 5", "must fit into max_len=5"),
    (GENERATE + " --num-samples 0", "num_samples must be a whole number >= 1; got 0"),
    (GENERATE + " --seed -1", "seed must be a whole number in"),
    (GENERATE + " --temperature nan", "temperature must be a finite number"),
    (GENERATE + " --stop=", "stop must be strings that are not empty"),
    (GENERATE + " --scheme nqkv:block_size=48", "block_size must divide"),
    (GENERATE + " --scheme kvquant", "kvquant: needs a calibration"),
    (GENERATE + " --implementation triton", "triton needs a GPU"),
    ("demo --model {model} --max-new-tokens 1", "--max-new-tokens must be at least 2"),
    ("demo --model {model} --max-new-tokens 256", "must fit into the 256 positions"),
    ("demo --model {model} --scheme nqkv:block_size=48", "block_size must divide"),
    (PPL + " --window 1", "window must be between 2 and 256"),
    (PPL + " --window 300", "window must be between 2 and 256"),
    (PPL + " --window 64 --stride 65", "stride must be between 1 and window=64; got 65"),
    (PPL + " --window 64 --max-tokens 1", "max_tokens must be at least 2"),
    (PPL + " --window 64 --scheme nqkv:block_size=48", "block_size must divide"),
    (PPL + " --window 64 --resume {folder}", "--resume must be a file, in a folder that exists"),
    (PPL + " --window 64 --resume {folder}/no/a.jsonl", "--resume must be a file"),
    (PPL.replace("{text}", "{short}") + " --window 64", "text must have at least 2 tokens"),
    (KL + " --window 1", "window must be between 2 and 256"),
    (DRIFT + " --prompts 0", "must be positive"),
    (DRIFT + " --prompt 128 --length 129", "prompt + length at most 256"),
    (DRIFT + " --prompt 50 --length 8 --buckets 9", "buckets must be between 1 and length=8"),
    (DRIFT + " --prompt 50 --length 8", "at least 400 tokens, prompts=8 of prompt=50 each"),
    (PASSKEY + " --length 255", "lengths must be between 1 and 244"),
    (PASSKEY + " --length 20", "passkey: length must be at least"),
    (PASSKEY + " --length 240 --samples 0", "depths and samples must be positive"),
    (PASSKEY + " --length 240 --prefill-chunk 1", "prefill_chunk must be at least 2; got 1"),
    ("eval choice --model {model} --task {word}", "Use `lambada` for it"),
    ("eval lambada --model {model} --task {choice}", "Use `choice` for it"),
    (BENCH + " --lengths 0", "lengths must be between 1 and 248"),
    (BENCH + " --lengths 32 --repeats 0", "batch, steps and repeats must be positive"),
    (BENCH + " --lengths 32 --scheme nqkv:block_size=48", "block_size must divide"),
    (KVQUANT + " --samples 0", "samples >= 1 and seqlen >= 2; got 0"),
    (KVQUANT + " --seqlen 257", "seqlen must be at most 256"),
    (KVQUANT + " --seqlen 64", "samples=16 of seqlen=64 tokens each need 1,024 tokens"),
    (KVQUANT + " --samples 1 --seqlen 32", "at least 32 tokens in all windows, without"),
    (KVQUANT + " --outliers 0.5", "expected 0 < outliers < 0.5"),
    (KVQUANT + " --out {folder}", "--out must be a file"),
    (KVQUANT + " --out {text}/a.safetensors", "--out must be in a folder"),
    (KVQUANT + " --out a,b.safetensors", "cannot be written in a scheme's name"),
    (KVQ + " --budget 1", "budget must be at least the narrowest width, 2; got 1.0"),
    (KVQ + " --budget nan", "budget must be at least the narrowest width, 2; got nan"),
    (KVQ + " --budget 3 --ladder 2 2", "ladder must be different positive widths"),
    (KVQ + " --budget 3 --ladder 2 5", "expected one of 2, 3, 4, 8; got 5"),
    (KVQ + " --budget 3 --group-size 48", "group_size to divide head_dim=32"),
    (KVQ + " --budget 3 --max-tokens 0", "--max-tokens must be at least 2; got 0"),
    (KVQ + " --budget 3 --max-tokens -5", "--max-tokens must be at least 2; got -5"),
    (KVQ.replace("{text}", "{short}") + " --budget 3", "expected 2 to 256 tokens"),
    (KVQ + " --budget 3 --out {folder}", "--out must be a file"),
    (COMMVQ + " --levels 0", "expected levels >= 1"),
    (COMMVQ + " --samples 2 --seqlen 90 --learning-rate inf", "expected learning_rate > 0, and"),
    (COMMVQ + " --samples 2 --seqlen 90 --weight-decay -1", "expected weight_decay >= 0, and"),
    (COMMVQ + " --samples 2 --seqlen 90 --seed -1", "expected seed >= 0, and finite; got -1"),
    (COMMVQ + " --samples 2 --seqlen 60", "at least 128 tokens in all windows; got 120"),
    (NORMALITY + " --stretch 201", "at most the number of tokens, 200; got 201"),
    (NORMALITY + " --block-size 31", "must divide the 32 channels"),
    (NORMALITY + " --max-tokens 1", "--max-tokens must be at least 2; got 1"),
    (HEATMAP + " --layers 2", "layers must be in 0..1; got [2]"),
    (SPECTRA.replace("{text}", "{short}"), "expected 2 to 256 token ids"),
    (ERROR + " --scheme nqkv:block_size=48", "block_size must divide"),
    (ERROR + " --scheme kivi --max-tokens 99", "encodes no keys of a text of 99 tokens"),
    (REPORT + " --scheme kivi --max-tokens 99", "encodes no keys of a text of 99 tokens"),
    (REPORT.replace("{text}", "{short}"), "expected 2 to 256 token ids"),
    (SMALL.replace("64", "8"), "lengths must be between 1 and 248"),
    (SMALL + " --max-tokens -9", "max_tokens must be at least 2"),
    (BOARD + " --window 64 --passkey-length 20", "passkey: length must be at least"),
    (BOARD + " --window 64", "lengths must be between 1 and 244"),
    (SMALL.replace("none", "nqkv:block_size=48"), "block_size must divide"),
    (BOARD_CALIBRATED + " --calibration-window 80", "samples=16 of seqlen=80 tokens each need"),
    (BOARD.replace("none", "kvquant:calibration={{kvquant}}"), "give --calibration-text FILE"),
    (BOARD.replace("none", "kvqant:calibration={{kvquant}}"), "unknown scheme 'kvqant'"),
    (BOARD.replace("none", "nqkv:{{x"), "expected {NAME} to be one of the calibrations"),
    (BOARD.replace("none", "nqkv:{{}}"), "expected {NAME} to be one of the calibrations"),
    (BOARD.replace("{folder}/board", "{text}"), "--out must be a folder"),
    (BOARD_CALIBRATED.replace("/board", "/a,b"), "cannot be written in a scheme's name"),
]  # fmt: skip


@pytest.mark.parametrize("command, message", REFUSED, ids=[c for c, _ in REFUSED])
def test_refused_before_weights_are_read(refuses, command, message):
    assert message in refuses(command)


def test_a_codebook_is_not_made_for_nothing(refuses, monkeypatch):
    monkeypatch.setattr("nqkv_jax.calibration.codebook.write", lambda *_, **__: pytest.fail("made"))
    assert "--out must be a file" in refuses("codebook --out {folder}")


def test_what_is_not_refused_reads_weights(refuses):
    """The stand-in is where the weights come from."""
    assert "the weights were read" in refuses(PPL + " --window 64")


def test_a_plan_says_what_is_wrong_before_it_asks_for_a_configuration(refuses):
    plan = "plan --model no/such --memory 1GiB"
    assert "contexts and batches must be positive; got [0]" in refuses(plan + " --batch 0")
    assert "unknown scheme" in refuses(plan + " --scheme nqvk")
    assert "must leave memory" in refuses(plan + " --weights 2GiB")
