"""Fetches a checkpoint from the Hugging Face hub."""

import contextlib
import pathlib

import huggingface_hub
from huggingface_hub import errors

from nqkv_jax.models.checkpoint import embedded
from nqkv_jax.models.checkpoint.base import CheckpointNotFoundError

_SMALL = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
]  # fmt: skip
# By their whole names: "*.safetensors" would also fetch copies in other layouts and subfolders.
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
_PICKLE = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]


def download_config(repo_id: str) -> pathlib.Path:
    """The folder of a repository's config and tokenizer, from the cache if it is there.

    Raises: CheckpointNotFoundError if there is no such repository, it has no config, or the hub
      cannot be reached.
    """
    folder = _snapshot(repo_id, _SMALL)
    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"{repo_id!r} must hold config.json; it does not. If it holds .gguf files, name one: "
            f"{repo_id}/FILE.gguf"
        )
    return folder


def download_file(repo_id: str, file: str) -> pathlib.Path:
    """One file of a repository, from the cache if it is there.

    Raises: CheckpointNotFoundError if there is none, or the hub cannot be reached.
    """
    with _explained(repo_id, file):
        return pathlib.Path(huggingface_hub.hf_hub_download(repo_id, file))


def download(repo_id: str) -> pathlib.Path:
    """That of its weights, too: safetensors if the repository has them, else pytorch_model.bin.

    Raises: CheckpointNotFoundError: likewise, or if it has neither.
    """
    folder = _snapshot(repo_id, _SMALL + _SAFETENSORS)
    if not any(any(folder.glob(pattern)) for pattern in _SAFETENSORS):
        folder = _snapshot(repo_id, _SMALL + _PICKLE)
        if not any(any(folder.glob(pattern)) for pattern in _PICKLE):
            raise CheckpointNotFoundError(
                f"{repo_id!r} must hold model.safetensors or pytorch_model.bin (or their shards); "
                "it has neither. If it holds .gguf files, download one and pass its path"
            )
    return folder


def _snapshot(repo_id: str, patterns: list[str]) -> pathlib.Path:
    with _explained(repo_id):
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))


@contextlib.contextmanager
def _explained(repo_id: str, file: str = ""):
    """Turns the errors of the hub's client into one that says what to do."""
    try:
        yield
    except errors.HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is neither a file or folder here, nor a name the hub allows "
            f"('owner/name'), nor an embedded model {embedded.NAMES}: {error}"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is gated: accept its licence at https://huggingface.co/{repo_id}, and "
            "log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is neither a file or folder here nor a repository on the hub. Check the "
            "spelling; for a private repository, log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # there is no network
        raise _unreachable(repo_id, file, error) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"the repository {repo_id!r} of the hub must hold {file!r}; it does not. See what it "
            f"holds at https://huggingface.co/{repo_id}/tree/main"
        ) from error
    # Without a network the hub's client raises its own errors or those of its transport library,
    # and it has changed that library twice: all that is left is a failure to get the files.
    except Exception as error:
        raise _unreachable(repo_id, file, error) from error


def _unreachable(repo_id: str, file: str, error: Exception) -> CheckpointNotFoundError:
    reason = " ".join(str(error).split())
    name, command = (f"{repo_id}/{file}", f"{repo_id} {file}") if file else (repo_id, repo_id)
    return CheckpointNotFoundError(
        f"{name!r} is no file or folder here, and could not be had from the Hugging Face hub "
        f"({type(error).__name__}: {reason}). Without a network: download it on another machine "
        f"(`hf download {command} --local-dir FOLDER`) and pass the folder's path, or use an "
        f"embedded model: {', '.join(embedded.NAMES)}"
    )
