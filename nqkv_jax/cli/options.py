"""Arguments that several commands share, and what they stand for."""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("auto", "xla", "mosaic_tpu", "mosaic_gpu", "triton")
MODEL = "smollm2-135m"


class Several(argparse.Action):
    """For `nargs="+"`: `--name A --name B` is `--name A B`; by default only B would count."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else [*given, *values])


def subparser(commands, name: str, summary: str, example: str, notes: str = ""):
    """A command's parser: its summary, an example that works, and --json."""
    parser = commands.add_parser(
        name, help=summary, description=summary + ("\n\n" + notes if notes else ""),
        epilog=f"example:\n  {example}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def add_model(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--model", default=None if required else MODEL, required=required, metavar="NAME",
        help="a hub id, a local folder, a .gguf file (owner/name/FILE.gguf: on the hub), or "
        "smollm2-135m, which comes as a package"
        + ("" if required else f" (default: {MODEL})"),
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="weights and activations (default: float32 on a CPU, else bfloat16)",
    )
    add_progress(parser)


def add_cache_dtype(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--cache-dtype",
        choices=DTYPES,
        default=default,
        help=f"what a cache keeps in full precision (default: {default or 'as the model'})",
    )


def add_implementation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="what decodes with the cache: auto (default), XLA alone, or the kernel of that name; "
        "mosaic_gpu: most schemes, NVIDIA GPUs from Ampere on; triton: nsnquant, any NVIDIA GPU",
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bars on stderr (default: if it is a terminal)",
    )


def load(args: argparse.Namespace, check: Callable[[Any], Any]):
    """The language model that `add_model` asked for.

    `check` gets it first without its weights, to say what is wrong before minutes of reading them.
    """
    from nqkv_jax.models import from_pretrained

    return from_pretrained(
        args.model, dtype=args.dtype, progress=args.progress is not False, check=check
    )


def check_fit(lm: Any, found: Sequence[Any], cache_dtype: Any = None) -> None:
    """Raises ValueError unless all of the schemes fit a model, of which only sizes are read."""
    from nqkv_jax.plan import AbstractCaches

    for scheme in found:
        AbstractCaches(lm.config, scheme, cache_dtype or lm.dtype)(batch=1, max_len=1)


def check_out(path: str, scheme: str | None = None, option: str = "") -> None:
    """Raises ValueError unless `path` can be written to, and named as this option of a scheme."""
    if scheme is not None:
        from nqkv_jax import schemes

        schemes.check_text(scheme, option, path)
    file = pathlib.Path(path).expanduser()
    if file.exists() and not file.is_file():
        raise ValueError(f"--out must be a file, an old or a new one; {path} is something else")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"--out must be in a folder that can be written to; got {path}, and {folder} is none"
        )


def config_of(name: str):
    """The configuration of a preset, a local checkpoint or a hub repository; loads no weights.

    Raises: ValueError or OSError saying which presets there are.
    """
    from nqkv_jax.models import families

    presets = families.presets
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        owner, _, last = name.rpartition("/")
        # Presets are named as the hub names the releases of OPT; no need to ask the hub for those.
        if last in presets and owner in ("", "facebook"):
            return presets[last]
    has_gguf = not (path / "config.json").exists() and any(path.glob("*.gguf"))
    if has_gguf or (path.is_file() and path.suffix != ".json"):
        from nqkv_jax.models.checkpoint import open_checkpoint

        return families.config_from_hf(open_checkpoint(path).config)
    known = f"Presets: {', '.join(presets)}"
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        # What begins with a dot, a slash or a tilde can only have been meant as a path.
        if path.name == "config.json" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise ValueError(
                f"--model: {name!r} must be a preset, a .gguf file, a folder with one or "
                f"with config.json, or a hub id (owner/name); there is none. {known}"
            )
        path = _hub_config(name, known)
    return families.config_from_hf(_read_json(path))


def _hub_config(name: str, known: str) -> pathlib.Path:
    import huggingface_hub

    # Its retries would scroll our own message away.
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, "config.json"))
    # Without a network its own errors come, or those of the transport library that it uses now.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"--model: {name!r} is no folder here, and its config.json could not be had from the "
            f"Hugging Face hub ({type(error).__name__}: {reason}). Without a network, give a local "
            f"folder or a preset. {known}"
        ) from error


def _read_json(path: pathlib.Path) -> dict:
    import json

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file; {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def first_tokens(lm: Any, text: str, limit: int):
    """i32[tokens], of a text as many as --max-tokens allows, and as the model has positions for.

    Raises: ValueError: `limit` is too small, or there is no tokenizer.
    """
    import numpy as np

    from nqkv_jax.evaluation.windows import opened

    if limit < 2:
        raise ValueError(f"--max-tokens must be at least 2; got {limit}")
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} came without a tokenizer, which the text needs")
    limit = min(limit, lm.config.max_positions)
    tokens = opened(lm, lm.tokenizer.encode(text, add_special_tokens=False))
    return np.asarray(tokens[:limit], np.int32)


def read_text(path: str) -> str:
    """A UTF-8 file, or stdin for "-"."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the text {path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text; byte {error.start} is not") from error
