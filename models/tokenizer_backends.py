"""The part of a tokenizer that cuts text into tokens, from a model's folder or a GGUF file.

A byte-level BPE (GPT-2's kind) spells every byte as a character and merges within words. That of
SentencePiece (Llama 2, Mistral, Gemma) spells spaces as U+2581, merges across words too, and falls
back to bytes for characters that it lacks.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from nqkv_jax.models.checkpoint.base import CheckpointFileError, CheckpointNotFoundError

# How Llama 3 and Qwen 2 split text before merging; from the tokenizer.json that each publishes.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# Values of tokenizer.ggml.pre that mean the same.
_GPT2_PRE = ("gpt-2", "gpt2")
_DIGITS_PRE = ("smollm",)
_LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
_QWEN2_PRE = ("qwen2",)

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
_ENDS_OF_TURNS = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>", "<|end|>")
_SPACE = "\u2581"  # as SentencePiece spells it


def backend_from_folder(folder: pathlib.Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not path.is_file() and not (vocab.is_file() and merges.is_file()):
        raise CheckpointNotFoundError(
            f"{folder} must hold tokenizer.json, or vocab.json and merges.txt; it has neither. "
            "Copy them there from where the model came from"
        )
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        model = models.BPE.from_file(str(vocab), str(merges))
    # The Rust library raises plain Exceptions.
    except Exception as error:
        source = path if path.is_file() else f"{vocab} with {merges}"
        raise CheckpointFileError(f"{source} must be a tokenizer's files; got: {error}") from error
    backend = _byte_level(model, add_prefix_space=settings.get("add_prefix_space", False))
    # Tokens in angle brackets are not made by merging: written in a text, they are meant as one.
    known = json.loads(vocab.read_text(encoding="utf-8"))
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
    backend.add_special_tokens([token for token in special if token in known])
    return backend


def _byte_level(model: models.BPE, *, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's: splits words by its regular expression, and spells every byte as a character."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def backend_from_gguf(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer in the metadata of a GGUF file, and whether texts begin with its BOS token.

    The latter is what llama.cpp does where the file says nothing.

    Raises:
      NotImplementedError: if it is of neither kind, or a byte-level one that splits text in a way
        that is not known here.
      CheckpointFileError: if tokens lack scores or types that they need.
    """
    get = functools.partial(_ggml, metadata)
    kind, pre = get("model"), get("pre", "gpt-2")
    advice = "Use the tokenizer.json of the Hugging Face checkpoint: Tokenizer.from_folder(folder)"
    if not get("tokens"):
        raise CheckpointFileError("a GGUF tokenizer must have tokenizer.ggml.tokens; it has none")
    if kind not in ("gpt2", "llama"):
        raise NotImplementedError(
            "a GGUF tokenizer (tokenizer.ggml.model) must be 'gpt2', a byte-level BPE, or 'llama', "
            f"that of SentencePiece; got {kind!r}. {advice}"
        )
    known = _GPT2_PRE + _DIGITS_PRE + _LLAMA3_PRE + _QWEN2_PRE
    if kind == "gpt2" and pre not in known:
        raise NotImplementedError(
            f"a GGUF tokenizer's pre-tokenizer must be one of {known}; got {pre!r}. {advice}"
        )
    backend = _bytes_from_gguf(metadata, pre) if kind == "gpt2" else _pieces_from_gguf(metadata)
    types = get("token_type") or []
    for add, wanted in (
        (backend.add_special_tokens, _CONTROL),
        (backend.add_tokens, _USER_DEFINED),
    ):
        add(
            [
                tokenizers.AddedToken(token, normalized=False, special=wanted == _CONTROL)
                for token, type_ in zip(get("tokens"), types, strict=False)
                if type_ == wanted
            ]
        )
    return backend, kind == "llama" or pre in _LLAMA3_PRE


def ends_of_turns(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of tokens that end what an assistant says. Files need not name them; llama.cpp, too, goes
    by how they are written."""
    get = functools.partial(_ggml, metadata)
    tokens = enumerate(zip(get("tokens"), get("token_type") or [], strict=False))
    special = (_CONTROL, _USER_DEFINED)
    return [i for i, (token, type_) in tokens if token in _ENDS_OF_TURNS and type_ in special]


def _ggml(metadata: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def _bytes_from_gguf(metadata: Mapping[str, Any], pre: str) -> tokenizers.Tokenizer:
    get = functools.partial(_ggml, metadata)
    tokens, merges = get("tokens"), [tuple(merge.split(" ")) for merge in get("merges")]
    # Llama 3 takes a whole word that is in the vocabulary even where merging would not lead to it.
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre in _LLAMA3_PRE
    )
    backend = _byte_level(model)
    if pre in _DIGITS_PRE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    elif pre in _LLAMA3_PRE + _QWEN2_PRE:
        split = tokenizers.Regex(_QWEN2_SPLIT if pre in _QWEN2_PRE else _LLAMA3_SPLIT)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if pre in _QWEN2_PRE:
            backend.normalizer = normalizers.NFC()
    return backend


def _pieces_from_gguf(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, which merges whatever two neighbours make the piece of highest score."""
    get = functools.partial(_ggml, metadata)
    tokens, unknown = get("tokens"), get("unknown_token_id")
    if unknown is not None and not 0 <= unknown < len(tokens):
        raise CheckpointFileError(
            f"tokenizer.ggml.unknown_token_id must be that of one of {len(tokens)} tokens; got "
            f"{unknown}"
        )
    lists = {name: get(name) or [] for name in ("scores", "token_type")}
    for name, values in lists.items():
        if len(values) != len(tokens):
            raise CheckpointFileError(
                f"a GGUF tokenizer of SentencePiece must have tokenizer.ggml.{name} for each of "
                f"its {len(tokens)} tokens; got {len(values)}"
            )
    scored = zip(tokens, *lists.values(), strict=True)
    scores = {token: score for token, score, type_ in scored if type_ == _NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    # Most, but not Gemma's, put a space before the text, and take it away again.
    prefix = get("add_space_prefix", True)
    spaces = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Decoder.custom(_PieceDecoder(prefix=prefix))
    return backend


class _PieceDecoder:
    """From SentencePiece's pieces to text.

    `decoders.ByteFallback` gives nothing but U+FFFD for a run of bytes of which one is wrong or the
    last are still to come; here characters that are whole stay whole, as a stream needs them.
    """

    _BYTE = re.compile("<0x([0-9A-F]{2})>")

    def __init__(self, *, prefix: bool):
        self._prefix = prefix

    def decode_chain(self, tokens: list[str]) -> list[str]:
        """Called by the package `tokenizers`."""
        matches = ((token, self._BYTE.fullmatch(token)) for token in tokens)
        text = b"".join(
            bytes.fromhex(match[1]) if match else token.replace(_SPACE, " ").encode()
            for token, match in matches
        ).decode(errors="replace")
        return [text.removeprefix(" ") if self._prefix else text]
