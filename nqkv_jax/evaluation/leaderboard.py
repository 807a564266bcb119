"""Every scheme on one model: quality, bytes and speed, through the same cache and the same code.

    board = leaderboard(lm, variants(), text, generate=generate, folder="board", max_tokens=4096)

Each measurement keeps a record in the folder, under a name that depends on everything that its
figures depend on: model, weights, scheme, settings, text and versions. What was measured already is
not measured again, whatever else has changed, and a run that was killed goes on where it was.
What does not need the machine for itself, `quality`, can be measured before, in several processes.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax import schemes
from nqkv_jax.calibration import commvq, kvq, kvquant
from nqkv_jax.checks import whole_numbers
from nqkv_jax.evaluation.divergence import divergence
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.evaluation.record import Record, describe, tokens_sha256
from nqkv_jax.evaluation.retrieval import Generate, retrieval
from nqkv_jax.evaluation.retrieval import check as check_retrieval
from nqkv_jax.evaluation.throughput import PairedTimings, check_timings
from nqkv_jax.evaluation.windows import encode, opened, windows
from nqkv_jax.plan import AbstractCaches

# Every published setting that is worth a row, by nominal width. {kvquant} and the like are
# calibration files (`CALIBRATIONS`); these rows are left out where there are none.
VARIANTS = (
    "none", "int8", "fp8",
    "nqkv-plus", "nqkv", "nqkv:block_size=64", "int4", "kivi:bits=4", "quanto", "hqq", "quarot",
    "turboquant", "kvquant:bits=4,calibration={kvquant}",
    "nqkv-plus:bits=3", "nqkv:bits=3,block_size=64", "kivi:bits=3", "quanto:bits=3", "hqq:bits=3",
    "turboquant:bits=3", "kvquant:bits=3,calibration={kvquant}",
    "kvquant:bits=3,outliers=0.0,calibration={kvquant}",
    "kvquant:bits=3,outliers=0.0,datatype=uniform,calibration={kvquant}",
    "kvq", "kvq:k_bits=2,v_bits=4", "kvq:allocation={kvq}",
    "nqkv-plus:bits=2", "int2", "kivi", "squat", "ott", "quanto:bits=2", "hqq:bits=2",
    "turboquant:bits=2", "kvquant:bits=2,calibration={kvquant}",
    "kvquant:bits=2,outliers=0.0,calibration={kvquant}", "nsnquant",
    "commvq:calibration={commvq2}", "nsnquant:bits=1", "turboquant:bits=1",
    "commvq:bits=1,calibration={commvq1}",
)  # fmt: skip

CALIBRATIONS = ("kvquant", "kvq", "commvq1", "commvq2")

_PLACEHOLDER = re.compile(r"\{\w*\}")
_STEPS = 8  # tokens per timed repeat
_COMMVQ_WINDOW = 512  # tokens of a window, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of all measurements of a board.

    Attributes:
      window, max_tokens: of the text for KL and perplexity.
      passkey_length, passkey_samples: tokens of the texts with a pass key, and how many.
      repeats: of timing `_STEPS` tokens after a text of `window` less those.
    """

    window: int = 1024
    max_tokens: int = 4096
    passkey_length: int = 512
    passkey_samples: int = 8
    repeats: int = 5


def variants() -> tuple[str, ...]:
    """`VARIANTS`, and the defaults of registered schemes that are not among them."""
    listed = {name.partition(":")[0] for name in VARIANTS}
    return VARIANTS + tuple(name for name in schemes.names() if name not in listed)


def calibrations(
    lm: LanguageModel,
    text: str,
    folder: str | os.PathLike,
    wanted: Collection[str] = CALIBRATIONS,
    *,
    samples: int = 16,
    seqlen: int = 1024,
    progress: bool | None = None,
) -> dict[str, str]:
    """Makes the files that {kvquant} and the like stand for, where they are not there yet.

    Args:
      text: to calibrate on: another one than is measured.
      folder: of the files, whose names depend on the model, the text and the sizes.
      wanted: among `CALIBRATIONS`; the digit is the bits of CommVQ.
      samples, seqlen: windows of KVQuant, and their tokens; KVQ reads two windows, CommVQ the first
        512 tokens of each.
    """
    check_calibrations(lm, text, wanted, samples=samples, seqlen=seqlen)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(lm, schemes.get("none"), lm.dtype, samples=samples, seqlen=seqlen)
    key = _hash(dict(about, text_sha256=hashlib.sha256(text.encode()).hexdigest()))
    kinds = dict.fromkeys(CALIBRATIONS, "safetensors") | dict(kvq="json")
    files = {
        name: folder / f"{name}-{key}.{kinds[name]}" for name in CALIBRATIONS if name in wanted
    }
    missing = [name for name, path in files.items() if not path.exists()]
    if "kvquant" in missing:
        kvquant.calibrate(
            lm, text, out=files["kvquant"], samples=samples, seqlen=seqlen, progress=progress
        )
    for bits in (bits for bits in commvq.BITS if f"commvq{bits}" in missing):
        commvq.calibrate(
            lm, text, out=files[f"commvq{bits}"], bits=bits, samples=samples,
            seqlen=min(seqlen, _COMMVQ_WINDOW), progress=progress,
        )  # fmt: skip
    if "kvq" in missing:
        length = min(2 * seqlen, lm.config.max_positions)
        tokens = opened(lm, encode("leaderboard", lm, text))[:length]
        allocation = kvq.calibrate(
            lm, tokens, budget=3, score="activation", progress=progress,
            # That of the scheme, where heads are large enough for it.
            group_size=math.gcd(64, lm.config.head_dim),
        )  # fmt: skip
        allocation.save(files["kvq"])
    return {name: str(path) for name, path in files.items()}


def check_calibrations(
    lm: LanguageModel, text: str, wanted: Collection[str], *, samples: int, seqlen: int
) -> None:
    """Raises ValueError if `calibrations` would: before the first of them, which take hours."""
    if "kvquant" in wanted:
        kvquant.check(lm, text, samples=samples, seqlen=seqlen)
    for bits in (bits for bits in commvq.BITS if f"commvq{bits}" in wanted):
        commvq.check(lm, text, bits=bits, samples=samples, seqlen=min(seqlen, _COMMVQ_WINDOW))


def placeholders(names: Sequence[str]) -> set[str]:
    """Which of `CALIBRATIONS` the names of schemes ask for.

    Raises: ValueError: there is no such calibration.
    """
    found = {found for name in names for found in re.findall(r"\{(\w*)\}", name)}
    rest = {mark for name in names for mark in re.findall("[{}]", _PLACEHOLDER.sub("", name))}
    if unknown := (found - set(CALIBRATIONS)) | rest:
        raise ValueError(
            f"leaderboard: expected {{NAME}} to be one of the calibrations "
            f"{', '.join(CALIBRATIONS)}; got {', '.join(sorted(unknown))}"
        )
    return found


def resolve(
    names: Sequence[str], files: Mapping[str, str]
) -> tuple[dict[str, schemes.Scheme], dict[str, str]]:
    """The schemes by their labels, and why others are left out.

    Raises: ValueError: a name is wrong.
    """
    found, missing = {}, {}
    for name in names:
        label = _PLACEHOLDER.sub("...", name)
        if placeholders([name]) <= set(files):
            found[label] = schemes.get(name.format(**files))
        else:
            missing[label] = "needs a calibration text"
    return found, missing


def fitting(
    lm: LanguageModel, entries: Mapping[str, schemes.Scheme]
) -> tuple[dict[str, schemes.Scheme], dict[str, str]]:
    """Those of the schemes that the model's shape allows, and why others are left out."""
    found, missing = {}, {}
    for label, scheme in entries.items():
        try:
            AbstractCaches(lm.config, scheme)(batch=1, max_len=1)
        except ValueError as error:
            missing[label] = str(error)
        else:
            found[label] = scheme
    return found, missing


def check(
    lm: LanguageModel, text: str | Sequence[int], settings: Settings = Settings()
) -> np.ndarray:
    """The tokens that are used of a text, i32[tokens].

    Raises: ValueError: a setting is wrong, or the text too short.
    """
    whole_numbers("leaderboard", **dataclasses.asdict(settings))
    check_timings(lm, lengths=[settings.window - _STEPS], steps=_STEPS, repeats=settings.repeats)
    lengths, samples = [settings.passkey_length], settings.passkey_samples
    check_retrieval(lm, "passkey", lengths=lengths, samples=samples)
    return windows(
        "leaderboard", lm, text, size=settings.window, stride=None, max_tokens=settings.max_tokens
    ).tokens


def quality(
    lm: LanguageModel,
    scheme: schemes.Scheme | str,
    text: str | Sequence[int],
    *,
    generate: Generate,
    folder: str | os.PathLike,
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """All but the bits and the speed of a row; takes and raises what `leaderboard` does."""
    scheme, records = schemes.get(scheme), pathlib.Path(folder) / "records"
    records.mkdir(parents=True, exist_ok=True)
    tokens = encode("leaderboard", lm, text)[: settings.max_tokens]
    found = _divergence(lm, scheme, tokens, settings, records)
    return found | _passkey(lm, scheme, settings, records, generate)


def leaderboard(
    lm: LanguageModel,
    entries: Mapping[str, schemes.Scheme],
    text: str | Sequence[int],
    *,
    generate: Generate,
    folder: str | os.PathLike,
    settings: Settings = Settings(),
    missing: Mapping[str, str] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measures every scheme.

    Args:
      lm: the model.
      entries: schemes by the labels of their rows.
      text: for KL and perplexity.
      generate: `nqkv_jax.models.generate`.
      folder: of the records; made if it is not there.
      settings: of all measurements.
      missing: labels that are left out, with the reason.
      progress: a bar on stderr; None: if that is a terminal.

    Returns: a JSON object: "rows", "missing", "settings", and with what, where and when it was put
      together. A row has the scheme and its label; stored and effective bits (the latter of a cache
      for a window, with bfloat16 beside the codes); figures of `DivergenceResult`; the share of
      pass keys that were found, and its interval; tokens per second, their spread, and their ratio
      to full precision, timed in turn with it.

    Raises: ValueError: a setting is wrong, or a scheme does not fit the model.
    """
    records = pathlib.Path(folder) / "records"
    tokens = check(lm, text, settings)
    # A scheme that does not fit fails now, not after the others were measured.
    bits = {label: _bits(lm, scheme, settings.window) for label, scheme in entries.items()}
    timer = PairedTimings(
        lm, length=settings.window - _STEPS, steps=_STEPS, repeats=settings.repeats
    )
    records.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm.tqdm(
        total=2 * len(entries),
        unit="measurement",
        disable=None if progress is None else not progress,
    ) as bar:
        for label, scheme in entries.items():
            row = dict(label=label, scheme=str(scheme), **bits[label])
            bar.set_description(f"{label}, quality")
            row |= quality(lm, scheme, tokens, generate=generate, folder=folder, settings=settings)
            bar.update()
            bar.set_description(f"{label}, speed")
            row |= _speed(lm, scheme, settings, records, timer)
            bar.update()
            rows.append(row)
            # A program per scheme and measure stays in memory otherwise.
            jax.clear_caches()
    device = jax.tree.leaves(lm.params)[0].devices().pop()
    return dict(
        model=lm.name, dtype=jnp.dtype(lm.dtype).name, text_sha256=tokens_sha256(tokens),
        settings=dataclasses.asdict(settings), device=device.device_kind, cores=os.cpu_count(),
        processor=_processor(), date=datetime.date.today().isoformat(),
        versions={"nqkv-jax": importlib.metadata.version("nqkv-jax"), "jax": jax.__version__},
        rows=rows, missing=dict(missing or {}),
    )  # fmt: skip


def _bits(lm: LanguageModel, scheme: schemes.Scheme, window: int) -> dict[str, float]:
    scheme.check_model(lm)
    caches = AbstractCaches(lm.config, scheme, jnp.bfloat16)
    return dict(
        stored_bits=caches.stored_bits,
        effective_bits=caches(batch=1, max_len=window).effective_bits,
    )


def _divergence(lm, scheme, tokens, settings, records) -> dict[str, Any]:
    own = dict(window=settings.window)
    path = _path(records, "kl", lm, scheme, **own, text_sha256=tokens_sha256(tokens))
    result = divergence(lm, tokens, scheme=scheme, resume=path, progress=False, **own)
    names = ("kl", "kl_error", "kl_p99", "top1", "top1_error", "nll_increase",
             "nll_increase_error", "perplexity", "full_perplexity", "tokens")  # fmt: skip
    return {name: getattr(result, name) for name in names}


def _passkey(lm, scheme, settings, records, generate) -> dict[str, Any]:
    own = dict(lengths=[settings.passkey_length], samples=settings.passkey_samples)
    path = _path(records, "passkey", lm, scheme, **own)
    result = retrieval(
        lm, "passkey", generate=generate, scheme=scheme, resume=path, progress=False, **own
    )
    return dict(
        passkey=result.accuracy, passkey_interval=result.accuracy_interval,
        passkey_samples=result.samples,
    )  # fmt: skip


def _speed(lm, scheme, settings, records, timer) -> dict[str, Any]:
    own = dict(length=settings.window - _STEPS, steps=_STEPS, repeats=settings.repeats,
               processor=_processor(), cores=os.cpu_count())  # fmt: skip
    record = Record(
        _path(records, "speed", lm, scheme, **own), kind="speed", unit="run", count=1,
        setting=lambda: describe(lm, scheme, lm.dtype, **own),
    )  # fmt: skip
    for _ in record:
        ours, full = timer(scheme)
        record.add(seconds=ours.median, spread=ours.spread, full_seconds=full.median)
    (run,) = record.entries
    return dict(
        tokens_per_second=1 / run["seconds"], spread=run["spread"],
        speed_over_full=run["full_seconds"] / run["seconds"],
    )  # fmt: skip


def _path(records: pathlib.Path, kind: str, lm, scheme, **setting: Any) -> pathlib.Path:
    """Of a record, whose name says what it is and depends on all that it depends on."""
    name = re.sub("[^A-Za-z0-9._=-]", "_", str(scheme))[-60:]
    return records / f"{kind}-{name}-{_hash(describe(lm, scheme, lm.dtype, **setting))}.jsonl"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _processor() -> str:
    """The name of the CPU, as far as the system tells."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
