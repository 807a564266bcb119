"""CommVQ: vector quantization of whole tokens, one or two bits a number, with learned codebooks.

Keys, before RoPE, are sums of complex codewords, which commute with RoPE: 12 bits per level and
head. Values are sums of learned vectors that a small network picks. Tokens are encoded 128 at a
time; the latest up to 127 are in full precision, and there are no sinks.

Bits of a token of d = heads * head_dim numbers, L levels: keys 12 L / head_dim + 16 / d, values
bits + 16 / d. At head_dim 128 and d = 1024: 1.05 and 1.02 (L = 11), or 1.98 and 2.02 (L = 21).

Codebooks and the network are arrays of the cache, shared by all sequences: they are among its
bytes, though not among its stored bits. They are not small: for SmolLM2-135M at 2 bits 1.9 MB a
layer, as much as 2,400 tokens in bfloat16.

    nqkv calibrate commvq --model smollm2-135m --text FILE --bits 2 --out smollm2.safetensors
    commvq:bits=2,calibration=smollm2.safetensors

Source: Li et al. (2025), arXiv 2506.18879. The encoder here takes the largest logit, where the
released code still draws noise; keys take 12 bits per code, there 16.
"""

import pathlib
from typing import Literal

from nqkv_jax.calibration import artifact
from nqkv_jax.calibration.commvq import BITS, KIND, expected, quantizers
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import CalibratedLayers, LayerScheme, block_window
from nqkv_jax.schemes.registry import register


@register("commvq")
def commvq(*, bits: Literal[*BITS] = 2, residual: int = 128, calibration: str = ""):
    """Learned additive codebooks of whole tokens; those of keys commute with RoPE."""
    window = block_window("commvq", residual)

    def load() -> tuple[dict, dict]:
        if not calibration:
            raise ValueError(
                "commvq: needs a calibration of the model. Make one with `nqkv calibrate commvq "
                f"--model NAME --text FILE --bits {bits} --out FILE.safetensors`, and give it as "
                f"commvq:bits={bits},calibration=FILE.safetensors"
            )
        return artifact.load(pathlib.Path(calibration), KIND)

    def layer(shape):
        arrays, made = load()
        _check(made, shape, bits)
        artifact.check_arrays(arrays, made, shape.layer, expected(arrays, made))
        key, value = quantizers(arrays, shape.layer)
        return LayerScheme(key=Unrotated(key), value=value, key_window=window, value_window=window)

    return CalibratedLayers(
        layer=layer, check=lambda lm: artifact.check_model("commvq", load()[1], lm)
    )


def _check(made: dict, shape, bits: int) -> None:
    """Raises ValueError if a calibration does not fit a layer, or the options."""
    artifact.check_shape("commvq", made, shape)
    if bits != made["bits"]:
        raise ValueError(
            f"commvq: the calibration was made for bits={made['bits']}; got bits={bits}. Calibrate "
            f"with --bits {bits}"
        )
