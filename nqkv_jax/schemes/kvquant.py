"""KVQuant: keys per channel before RoPE, values per token, non-uniform levels, outliers apart.

Keys are encoded before RoPE, where their channels keep to ranges that are found once, by
calibration, and then stay: a token is encoded as it arrives. Values have a range per token, across
all heads. Both take the nearest of 2^bits levels that were placed, for each layer, to cost the
model's loss least ("nuq"). One percent of all elements are outliers and keep a float16 residual:
on each side of a token the m = floor(0.005 * hidden) + 1 largest values, and as many of the keys as
are outside the range of their channel, m at most. The first token stays in full precision.

Bits of a token of h = heads * head_dim channels: keys bits + 2m * 32 / h; values 32 / h more, for
their range. Without outliers, keys store one byte per token that says whether it held a NaN.

    nqkv calibrate kvquant --model smollm2-135m --text FILE --out smollm2.safetensors
    kvquant:bits=3,calibration=smollm2.safetensors

Source: Hooper et al. (2024), arXiv 2401.18079; "nf" is its NormalFloat with a zero point, q_norm is
of its first version. It leaves open how many outliers of a key a fixed number of slots holds; here,
those farthest outside.
"""

import pathlib
from typing import Literal

import jax.numpy as jnp
import numpy as np

from nqkv_jax import codebooks
from nqkv_jax.calibration import artifact
from nqkv_jax.calibration.kvquant import BITS, KIND, SIDES
from nqkv_jax.quantizers.dense_sparse import (
    DenseSparseChannels,
    DenseSparseTokens,
    slots_per_side,
)
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.schemes.base import CalibratedLayers, LayerScheme
from nqkv_jax.schemes.registry import register


@register("kvquant")
def kvquant(
    *,
    bits: Literal[*BITS] = 3,
    outliers: float = 0.01,
    calibration: str = "",
    datatype: Literal["nuq", "nf", "uniform"] = "nuq",
    q_norm: Literal["auto", "on", "off"] = "auto",
    sinks: int = 1,
):
    """Calibrated non-uniform levels: keys per channel before RoPE, values per token, 1 % apart."""
    if q_norm == "on" and datatype != "nuq":
        raise ValueError(f"kvquant: q_norm=on goes with datatype=nuq; got datatype={datatype}")
    normalise = q_norm == "on" or (q_norm == "auto" and bits == 2 and datatype == "nuq")
    # Where the ranges leave no outliers, everything is inside.
    variant = "sparse" if outliers else "full"

    def load() -> tuple[dict[str, np.ndarray], dict]:
        if not calibration:
            raise ValueError(
                "kvquant: needs a calibration of the model. Make one with `nqkv calibrate kvquant "
                "--model NAME --text FILE --out FILE.safetensors`, and give it as "
                "kvquant:calibration=FILE.safetensors"
            )
        return artifact.load(pathlib.Path(calibration), KIND)

    def expected(shape) -> dict:
        """What is read of the file: see `artifact.check_arrays`."""
        channels, names = (
            (shape.num_kv_heads, shape.head_dim),
            ("levels", "q_norm")[: 1 + normalise],
        )
        return {
            f"key.zero.{variant}": (np.float32, channels, "finite"),
            f"key.scale.{variant}": (np.float32, channels, "positive"),
        } | {
            f"{side}.{name}{bits}.{variant}": (np.float32, (2**bits,), "ascending")
            for side in SIDES
            for name in names
            if datatype == "nuq"
        }

    def levels(arrays: dict, side: str, layer: int) -> dict:
        if datatype == "nuq":
            at = lambda name: jnp.array(arrays[f"{side}.{name}{bits}.{variant}"][layer])
            return dict(levels=at("levels"), decoded_levels=at("q_norm") if normalise else None)
        table = np.linspace(-1, 1, 2**bits)
        if datatype == "nf":
            table = codebooks.normal_float(bits).levels
        return dict(levels=jnp.array(table, jnp.float32))

    def layer(shape):
        arrays, made = load()
        _check(made, shape, outliers)
        artifact.check_arrays(arrays, made, shape.layer, expected(shape))
        slots = slots_per_side(outliers, shape.hidden)
        channel = lambda name: jnp.array(arrays[f"key.{name}.{variant}"][shape.layer])
        key = DenseSparseChannels(
            zero=channel("zero"),
            scale=channel("scale"),
            outliers=slots,
            **levels(arrays, "key", shape.layer),
        )
        value = DenseSparseTokens(outliers=slots, **levels(arrays, "value", shape.layer))
        return LayerScheme(key=Unrotated(key), value=value, sinks=sinks)

    return CalibratedLayers(
        layer=layer, check=lambda lm: artifact.check_model("kvquant", load()[1], lm)
    )


def _check(made: dict, shape, outliers: float) -> None:
    """Raises ValueError if a calibration does not fit a layer, or the options."""
    artifact.check_shape("kvquant", made, shape)
    if outliers not in (0, made["outliers"]):
        raise ValueError(
            f"kvquant: the calibration was made for outliers={made['outliers']}, and serves that "
            f"and 0; got outliers={outliers}. Calibrate with --outliers {outliers}"
        )
