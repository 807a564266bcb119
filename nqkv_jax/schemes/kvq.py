"""KVQ: more bits for keys than for values, and more where the norms are larger.

Keys and values of a layer are encoded by the same method at widths of their own: 4 and 2 bits
everywhere (K4V2), or what `nqkv calibrate kvq` has allocated to every layer under a budget. The
method is one of the per-token quantizers with groups of g = 64 channels of a head: a residual of 64
tokens waits in full precision and is encoded as a whole. Costs mean(b_i) + 32 / g bits with two
numbers per group (quanto, hqq), mean(b_i) + 16 / g with one (nqkv).

Source: Hariri et al. (2025), Quantize What Counts, arXiv 2502.15075: residual 64, Quanto or HQQ
(their cache is that of transformers: see `quanto`). Widths are 2, 3, 4 and 8 (nqkv: 2, 3, 4), which
are stored exactly; the paper's 1, 1.58 and 6 bits take more in their containers than they count.
"""

import dataclasses
from typing import Literal

from nqkv_jax.allocation import Allocation
from nqkv_jax.calibration import artifact
from nqkv_jax.quantizers.block import check_hidden_blocks
from nqkv_jax.schemes.base import CalibratedLayers, LayerScheme, LayerShape, ScaleDtype
from nqkv_jax.schemes.hqq import hqq
from nqkv_jax.schemes.nqkv import nqkv
from nqkv_jax.schemes.quanto import quanto
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import check_groups_in_head
from nqkv_jax.words import counted

BACKENDS = {
    "quanto": quanto,
    "hqq": hqq,
    "nqkv": lambda *, group_size, **options: nqkv(block_size=group_size, **options),
}


@register("kvq")
def kvq(
    *,
    k_bits: Literal[2, 3, 4, 8] = 4,
    v_bits: Literal[2, 3, 4, 8] = 2,
    backend: Literal[*BACKENDS] = "quanto",
    group_size: int = 64,
    residual: int = 64,
    sinks: int = 0,
    scale_dtype: ScaleDtype = "float16",
    allocation: str = "",
):
    """More bits for keys than for values (K4V2), or per layer from a file of `calibrate kvq`."""
    options = dict(group_size=group_size, residual=residual, sinks=sinks, scale_dtype=scale_dtype)
    if allocation and (k_bits, v_bits) != (4, 2):
        raise ValueError(
            "kvq: widths come from the allocation or from k_bits and v_bits; got both "
            f"allocation={allocation} and k_bits={k_bits}, v_bits={v_bits}"
        )
    # Read once, when the scheme is made: a scheme of the same name keeps its widths.
    widths = Allocation.load(allocation) if allocation else None
    used = {k_bits, v_bits} if widths is None else {*widths.key_bits, *widths.value_bits}
    layers = {bits: BACKENDS[backend](bits=bits, **options) for bits in sorted(used)}

    def layer(shape: LayerShape) -> LayerScheme:
        # Here, as the backends would speak of themselves, and of options of theirs.
        if backend == "nqkv":
            heads, head_dim = shape.num_kv_heads, shape.head_dim
            check_hidden_blocks("kvq", heads, head_dim, group_size, "group_size")
        else:
            check_groups_in_head("kvq", shape.head_dim, group_size)
        key, value = k_bits, v_bits
        if widths is not None:
            if widths.num_layers != shape.num_layers:
                raise ValueError(
                    f"kvq: {allocation} is for {counted(widths.num_layers, 'layer')} of "
                    f"{widths.model}; this model has {shape.num_layers}. Make one with nqkv "
                    "calibrate kvq"
                )
            key, value = widths.key_bits[shape.layer], widths.value_bits[shape.layer]
        return dataclasses.replace(layers[key](shape), value=layers[value](shape).value)

    if widths is None:
        return layer
    about = dict(model=widths.model, fingerprint=widths.fingerprint)
    return CalibratedLayers(layer=layer, check=lambda lm: artifact.check_model("kvq", about, lm))
