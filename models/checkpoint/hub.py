"""Fetches a checkpoint from the Hugging Face hub."""

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


def download(repo_id: str) -> pathlib.Path:
    """The folder of a repository's config, tokenizer and weights, from the cache if it is there.

    Takes safetensors if the repository has them, else pytorch_model.bin.

    Raises: CheckpointNotFoundError if there is no such repository, or the hub cannot be reached.
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
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
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
    # Without a network the hub's client raises its own errors or those of its transport library,
    # and it has changed that library twice: all that is left is a failure to get the files.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointNotFoundError(
            f"{repo_id!r} is no file or folder here, and could not be had from the Hugging Face "
            f"hub ({type(error).__name__}: {reason}). Without a network: download it on another "
            f"machine (`hf download {repo_id} --local-dir FOLDER`) and pass the folder's path, "
            f"or use an embedded model: {', '.join(embedded.NAMES)}"
        ) from error
