"""What CommVQ learns about a model: codebooks of keys, encoders and codebooks of values.

The keys and values of a text are recorded once, in float16: 4 bytes for every token, layer, head
and channel, and for `attention` as much again and that of the queries. Then every layer is fitted
alone (see `commvq_keys` and `commvq_values`). Beside the file, while it works, there is a file
FILE.partial with the layers that are done.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nqkv_jax.calibration import artifact
from nqkv_jax.calibration.commvq_keys import default_levels, fit_keys
from nqkv_jax.calibration.commvq_values import train_values
from nqkv_jax.calibration.recorder import AttentionRecorder, Recorder, windows
from nqkv_jax.checks import one_of, whole_numbers
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.commvq import CODEWORDS, CommVQKeys, CommVQValues, Encoder

KIND = "commvq 1"
_PARTIAL = "commvq partial 1"
BITS = (1, 2)
_LEAST = 128  # tokens
_TRIED = 1024  # tokens that the errors are measured on


def calibrate(
    lm: Any,
    text: str | Sequence[int],
    *,
    out: str | os.PathLike,
    bits: int = 2,
    levels: int | None = None,
    samples: int = 16,
    seqlen: int = 512,
    key_steps: int = 5,
    temperature: float = 1e-3,
    value_steps: int = 300,
    batch: int = 512,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.1,
    attention: float = 0.0,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, np.ndarray]:
    """Calibrates a model and writes the file that `commvq:bits=...,calibration=FILE` reads.

    After an interruption the same call goes on with the first layer that is not in FILE.partial.
    The paper has 100 key steps on up to a million tokens, and from 100,000 value steps with a
    learning rate of 1e-3 and attention=1 on; the defaults here are for a small model and some
    minutes.

    Args:
      lm: with the protocol of `nqkv_jax.evaluation`.
      text: a string, or token ids.
      out: the file.
      bits: 1 or 2 per number.
      levels: of the keys' codebooks, 12 bits per head each; None: see `default_levels`.
      samples, seqlen: windows, spread evenly over the text, and tokens of each.
      key_steps, temperature: of the keys' expectation maximisation.
      value_steps, batch, learning_rate, weight_decay: of the values' training.
      attention: weight in its loss of the error of the attention's output (causal, within a
        window), relative like that of the values.
      seed: of all that is drawn.
      progress: a bar on stderr; None: if that is a terminal.

    Returns: "errors" f32[layers, 2]: squared errors of keys and of values on the text, relative to
      their energy; and the arrays of the file.

    Raises:
      ValueError: an argument is wrong, the text is too short, or FILE.partial is of another call.
    """
    config = lm.config
    one_of("calibrate: bits", bits, BITS)
    asked = dict(
        bits=bits, levels=default_levels(bits, config.head_dim) if levels is None else levels,
        samples=samples, seqlen=seqlen, key_steps=key_steps, temperature=temperature,
        value_steps=value_steps, batch=batch, learning_rate=learning_rate,
        weight_decay=weight_decay, attention=attention, seed=seed,
    )  # fmt: skip
    texts = check(lm, text, **asked)
    setting = dict(
        model=lm.name, fingerprint=artifact.fingerprint(lm.params), num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, **asked,
        text_sha256=hashlib.sha256(texts.astype("<i4").tobytes()).hexdigest(),
    )  # fmt: skip
    partial = pathlib.Path(f"{pathlib.Path(out).expanduser()}.partial")
    arrays = _begin(partial, setting)
    done = len(next(iter(arrays.values()), ()))
    bar = tqdm.tqdm(
        total=config.num_layers, initial=done, desc="commvq", unit="layer",
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar:
        recorded = record(lm, texts, attention=attention > 0)
        for layer in range(done, config.num_layers):
            own = _fit_layer([a[layer] for a in recorded], layer, setting)
            before = arrays or {name: a[None][:0] for name, a in own.items()}
            arrays = {name: np.append(before[name], [a], axis=0) for name, a in own.items()}
            artifact.save(partial, _PARTIAL, arrays, dict(setting=setting))
            bar.update()
    artifact.save(out, KIND, arrays, setting)
    partial.unlink()
    return arrays


def check(
    lm: Any,
    text: str | Sequence[int],
    *,
    bits: int,
    samples: int,
    seqlen: int,
    levels: int | None = None,
    **settings: float,
) -> np.ndarray:
    """The windows i32[samples, seqlen] that `calibrate` reads; takes and raises what that does."""
    one_of("calibrate: bits", bits, BITS)
    whole = ("key_steps", "value_steps", "batch", "seed")
    whole_numbers("calibrate", levels=levels, **{name: settings.get(name) for name in whole})
    config = lm.config
    hidden = config.num_kv_heads * config.head_dim
    levels = default_levels(bits, config.head_dim) if levels is None else levels
    if levels < 1 or config.head_dim % 2 or bits * hidden % 8:
        raise ValueError(
            "calibrate: expected levels >= 1, an even head_dim, and bits * heads * head_dim to be "
            f"a multiple of 8; got levels={levels}, bits={bits} and {config.num_kv_heads} heads x "
            f"{config.head_dim}"
        )
    for name, value in settings.items():
        zero = name in ("weight_decay", "attention", "seed")
        if not math.isfinite(value) or not (value >= 0 if zero else value > 0):
            expected = ">= 0" if zero else "> 0"
            raise ValueError(f"calibrate: expected {name} {expected}, and finite; got {value}")
    texts = windows(lm, text, samples, seqlen)
    if texts.size < _LEAST:
        raise ValueError(
            f"calibrate: expected at least {_LEAST} tokens in all windows; got {texts.size}"
        )
    return texts


def _begin(partial: pathlib.Path, setting: Mapping) -> dict[str, np.ndarray]:
    """The layers that an interrupted call has left."""
    if not partial.exists():
        return {}
    return artifact.load_partial(partial, _PARTIAL, setting)[0]


def record(lm: Any, texts: np.ndarray, *, attention: bool = False) -> tuple[np.ndarray, ...]:
    """Keys before RoPE, and values, of texts i32[samples, tokens].

    Args:  attention: queries and keys are wanted too, as they meet: after RoPE, scaled.

    Returns: f16[layers, samples, tokens, heads, head_dim] each.
    """

    @jax.jit
    def run(params, tokens):
        recorder = AttentionRecorder() if attention else Recorder()
        recorder = lm.apply(params, tokens[None], recorder, last_only=True)[1]
        layers = recorder.layers
        if attention:
            pairs = zip(layers, recorder.scores, strict=True)
            layers = tuple((*sides, *scores) for sides, scores in pairs)
        # What a model gives in other ranges than float16 has would be no key of any use.
        return jax.tree.map(lambda a: a[0].astype(jnp.float16), layers)

    shapes = jax.eval_shape(run, lm.params, texts[0])
    arrays = tuple(np.empty((len(shapes), len(texts), *a.shape), a.dtype) for a in shapes[0])
    for i, tokens in enumerate(texts):
        for layer, found in enumerate(run(lm.params, tokens)):
            for array, x in zip(arrays, found, strict=True):
                array[layer, i] = x
    return arrays


def _fit_layer(recorded: Sequence[np.ndarray], layer: int, setting: Mapping) -> dict:
    """The arrays of one layer, of what `record` has found of it."""
    keys, values = (a.reshape(-1, *a.shape[2:]) for a in recorded[:2])
    seed = setting["seed"] + layer
    codebook = fit_keys(
        keys, setting["levels"], steps=setting["key_steps"], temperature=setting["temperature"],
        seed=seed,
    )[0]  # fmt: skip
    names = ("batch", "learning_rate", "weight_decay", "attention")
    value = train_values(
        values, setting["bits"], steps=setting["value_steps"], seed=seed, scores=recorded[2:],
        **{name: setting[name] for name in names},
    )[0]  # fmt: skip
    pairs = (CommVQKeys(jnp.asarray(codebook)), keys), (value, values)
    arrays = {
        "key.codebook": codebook,
        "value.codebook": value.codebook,
        "value.scale": value.scale,
        **{f"encoder.{name}": a for name, a in vars(value.encoder).items()},
        "errors": np.asarray([relative_error(q, x) for q, x in pairs], np.float32),
    }
    return {name: np.asarray(a) for name, a in arrays.items()}


def expected(arrays: Mapping[str, np.ndarray], made: Mapping) -> dict[str, tuple]:
    """What `quantizers` needs: see `artifact.check_arrays`."""
    heads, head_dim, half = made["num_kv_heads"], made["head_dim"], np.float16
    hidden, bits = heads * head_dim, made["bits"] * heads * head_dim
    width = arrays["encoder.inner"].shape[-1:]
    return {
        "key.codebook": (half, (made["levels"], heads, CODEWORDS, head_dim), "finite"),
        "value.codebook": (half, (bits, heads, head_dim), "finite"),
        "value.scale": (np.float32, (heads, head_dim), "positive"),
        "encoder.inner": (half, (hidden, *width), "finite"),
        "encoder.inner_bias": (half, width, "finite"),
        "encoder.outer": (half, (*width, 2 * bits), "finite"),
        "encoder.outer_bias": (half, (2 * bits,), "finite"),
    }


def quantizers(arrays: Mapping[str, np.ndarray], layer: int) -> tuple[CommVQKeys, CommVQValues]:
    """Those of a layer."""
    at = lambda name: jnp.array(arrays[name][layer])
    encoder = {field.name: at(f"encoder.{field.name}") for field in dataclasses.fields(Encoder)}
    value = CommVQValues(
        codebook=at("value.codebook"), scale=at("value.scale"), encoder=Encoder(**encoder)
    )
    return CommVQKeys(at("key.codebook")), value


def relative_error(quantizer: Quantizer, x: np.ndarray) -> float:
    """||decoded - x||^2 / ||x||^2 of tokens [tokens, heads, head_dim], of 1,024 of them at most."""
    group = quantizer.group
    x = x[np.linspace(0, len(x) - 1, min(len(x), _TRIED)).astype(int)].astype(np.float32)
    x = jnp.asarray(x[: len(x) // group * group])
    decoded = _round_trip(quantizer, x.reshape(-1, group, *x.shape[1:])).reshape(x.shape)
    return float(jnp.sum(jnp.square(decoded - x)) / jnp.sum(jnp.square(x)))


@jax.jit
def _round_trip(quantizer: Quantizer, groups: jax.Array) -> jax.Array:
    context = Context()
    decode = lambda x: quantizer.dequantize(quantizer.quantize(x, context), context)
    return jax.vmap(decode)(groups)
