"""Text to token ids and back, over the `tokenizers` package.

    tokenizer = Tokenizer.from_folder(folder, config)          # or Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("The capital of France is")
    tokenizer.decode(ids)
    prompt = tokenizer.chat([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)   # the template has put them in

Files that are read: tokenizer.json, or vocab.json with merges.txt; tokenizer_config.json,
generation_config.json and chat_template.jinja where they are; or the metadata of a GGUF file.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from nqkv_jax.extras import missing
from nqkv_jax.models.checkpoint.base import read_json
from nqkv_jax.models.tokenizer_backends import (
    backend_from_folder,
    backend_from_gguf,
    ends_of_turns,
)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A tokenizer and what belongs to it: special tokens, and the chat template.

    Args:
      backend: from the `tokenizers` package; its post-processor may add special tokens.
      bos_token, eos_token, pad_token: as they are written in the vocabulary, or None.
      add_bos: whether prompts begin with `bos_token`; None leaves it to the post-processor.
      eos_ids: further ids that end a generation.
      chat_template: Jinja source, or None.

    Raises: ValueError if a special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        add_bos: bool | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ):
        self._backend = backend
        # Padding and truncation are the caller's business; a tokenizer.json may switch them on.
        backend.no_padding()
        backend.no_truncation()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._tokens = {name: token for name, token in self._tokens.items() if token is not None}
        unknown = {
            name: token
            for name, token in self._tokens.items()
            if backend.token_to_id(token) is None
        }
        if unknown:
            raise ValueError(f"special tokens must be in the vocabulary; these are not: {unknown}")
        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        eos_id = self._special_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | (set() if eos_id is None else {eos_id})
        self.chat_template = chat_template
        # Asked, not assumed: releases of one model differ in whether the post-processor adds it.
        self._processor_adds_bos = self.bos_id is not None and backend.encode("a").ids[:1] == [
            self.bos_id
        ]
        self.add_bos = self._processor_adds_bos if add_bos is None else add_bos
        if self.add_bos and self.bos_id is None:
            raise ValueError("add_bos needs a bos_token; got None")

    def _special_id(self, name: str) -> int | None:
        token = self._tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @classmethod
    def from_folder(
        cls, folder: str | pathlib.Path, config: Mapping[str, Any] | None = None
    ) -> "Tokenizer":
        """The tokenizer of a Hugging Face model folder.

        Args:
          folder: with tokenizer.json, or with vocab.json and merges.txt (byte-level BPE: GPT-2,
            OPT).
          config: content of config.json; its model_type and token ids fill what the other files
            leave out.

        Raises:
          CheckpointNotFoundError: if the folder has neither.
          CheckpointFileError: if a file is corrupt.
        """
        folder, config = pathlib.Path(folder), config or {}
        settings = _optional_json(folder / "tokenizer_config.json")
        generation = _optional_json(folder / "generation_config.json")
        special = _optional_json(folder / "special_tokens_map.json") | settings
        backend = backend_from_folder(folder, settings)
        # OPT's ids 1 and 2; older releases have no tokenizer_config.json that says so.
        is_opt = config.get("model_type") == "opt"
        defaults = {}
        if is_opt:
            defaults = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = _token_text(special.get(name)) or _token_text(defaults.get(name))
            token_id = config.get(name.replace("token", "token_id"))
            if token is None and isinstance(token_id, int) and token_id >= 0:
                token = backend.id_to_token(token_id)
            tokens[name] = token
        # Some publish a padding token that they never added; generation can do without one.
        if tokens["pad_token"] and backend.token_to_id(tokens["pad_token"]) is None:
            tokens["pad_token"] = None
        template = folder / "chat_template.jinja"
        return cls(
            backend,
            **tokens,
            add_bos=settings.get("add_bos_token", True if is_opt else None),
            eos_ids=_id_list(generation.get("eos_token_id")) + _id_list(config.get("eos_token_id")),
            chat_template=(
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _default_template(settings.get("chat_template"))
            ),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer inside a GGUF file.

        Args:    metadata: the file's keys and values.
        Raises:  NotImplementedError if it is neither a byte-level BPE with a known pre-tokenizer
          nor one of SentencePiece's; CheckpointFileError if it lacks what that needs.
        """
        get = metadata.get
        backend, begins_with_bos = backend_from_gguf(metadata)
        ids = {name: get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        ids["pad"] = get("tokenizer.ggml.padding_token_id")
        names = {
            f"{name}_token": None if ids[name] is None else backend.id_to_token(ids[name])
            for name in ("bos", "eos", "pad")
        }
        add_bos = get("tokenizer.ggml.add_bos_token", begins_with_bos)
        return cls(
            backend,
            **names,
            add_bos=bool(add_bos) and names["bos_token"] is not None,
            eos_ids=_id_list(ids["eot"]) + ends_of_turns(metadata),
            chat_template=get("tokenizer.chat_template"),
        )

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this; the model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens that are written in it are recognised.

        With `add_special_tokens`, a model that wants its prompts to begin with a BOS token gets it
        exactly once: if the text begins with one already, none is added.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for every text; no padding."""
        if isinstance(texts, str):
            raise ValueError("encode_batch: texts must be a sequence of strings; got one string")
        wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"encode: text must be a string; got {', '.join(sorted(set(wrong)))}")
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        batch = [encoding.ids for encoding in encodings]
        return [self._with_bos_once(ids) for ids in batch] if add_special_tokens else batch

    def _with_bos_once(self, ids: list[int]) -> list[int]:
        bos = [self.bos_id]
        if self.add_bos and ids[:1] != bos:
            return bos + ids
        # The text began with a BOS, and the post-processor put another one before it.
        doubled = self._processor_adds_bos and ids[:2] == bos * 2
        unwanted = self._processor_adds_bos and not self.add_bos and ids[:1] == bos
        return ids[1:] if doubled or unwanted else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:    ids: integers in the vocabulary; a NumPy or JAX array of one axis will do.
        Raises:  ValueError if an id is negative.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"decode: ids must not be negative; got {min(ids)}")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for one sequence whose tokens come one after another."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, rendered from the model's chat template.

        Encode it with `add_special_tokens=False`: the template writes the special tokens itself.

        Args:
          messages: of the form {"role": "system" | "user" | "assistant", "content": text}.
          add_generation_prompt: ends the prompt where the assistant is to go on.

        Raises:
          ValueError: if the model has no chat template, or the template refuses the messages.
          ImportError: if the package `jinja2` is missing.
        """
        if not self.chat_template:
            raise ValueError(
                "chat: the model's tokenizer must have a chat template; this one has none, as is "
                "usual for models that are not tuned for conversation. Use a plain prompt"
            )
        wrong = [m for m in messages if not isinstance(m, Mapping) or "role" not in m]
        if wrong:
            raise ValueError(
                f"chat: messages must be mappings with 'role' and 'content'; got {wrong[0]!r}"
            )
        template, errors = _compile_template(self.chat_template)
        try:
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except errors as error:
            raise ValueError(f"chat: the model's template refuses the messages: {error}") from error


class StreamDecoder:
    """Decodes a sequence as it grows. All that was given, put together, is `decode` of all ids.

    A character may be spread over several tokens: what is not complete yet is held back.

        stream = tokenizer.stream()
        for token in tokens:
            print(stream.push(token), end="", flush=True)
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        # Decoding starts at the beginning of a character, one step before the latest: the text of
        # a token may depend on the one before it (leading spaces), never on earlier ones.
        self._ids: list[int] = []
        self._settled = 0  # ids of the step before, whose text was given
        self._given = ""  # what was given of the text of self._ids

    def push(self, *ids: int) -> str:
        """Takes the next token or tokens; gives the text that is certain now, perhaps none."""
        self._ids.extend(int(i) for i in ids)
        text = self._decode(self._ids)
        # Either the beginning of a character, or one that really is U+FFFD: the next token tells.
        complete = not text.endswith(_REPLACEMENT)
        certain = text if complete else text[: -len(_REPLACEMENT)]
        new = certain[len(self._given) :]
        self._given = certain if new else self._given
        if complete:
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
            self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """The text that was held back, at the end of the sequence."""
        new = self._decode(self._ids)[len(self._given) :]
        self._ids, self._settled, self._given = [], 0, ""
        return new


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(token: Any) -> str | None:
    """A special token is a string, or an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _id_list(ids: Any) -> list[int]:
    return [] if ids is None else [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]


def _default_template(template: Any) -> str | None:
    """Of several named templates, the one named so."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


@functools.lru_cache(maxsize=8)
def _compile_template(source: str):
    """The template, and the errors that rendering it may raise.

    Templates come with checkpoints from anywhere: the sandbox keeps them from reaching Python
    objects, and from changing the messages.
    """
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(missing("chat: rendering a chat template", "jinja2", "chat")) from error

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    # As templates are written for transformers: its whitespace rules, its helpers, its plain JSON
    # (jinja2's own escapes HTML).
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    errors = (jinja2.exceptions.TemplateError, TypeError, AttributeError)
    try:
        return environment.from_string(source), errors
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"chat: the model's chat template is not valid Jinja: {error}") from error
