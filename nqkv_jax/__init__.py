"""KV-cache quantization for JAX: every scheme behind one cache, one `jit`, and honest bytes.

    import nqkv_jax as nq

    codes = nq.quantize(kv, nq.BlockQuantizer(nq.codebooks.normal_float(4), block_size=256))
    kv2 = nq.dequantize(codes)

    sizes = dict(num_layers=32, batch=8, max_len=4096, num_kv_heads=32, head_dim=128)
    cache = nq.schemes.get("nqkv").init(**sizes)
    out, cache = nq.attend(q, k, v, cache, layer=0)

Decoders, weights and generation are in `nqkv_jax.models`, which alone needs Flax.
"""

from nqkv_jax import codebooks, packing, schemes
from nqkv_jax.attention import attend
from nqkv_jax.cache import KVCache, LayerCache
from nqkv_jax.decoded import DecodedView
from nqkv_jax.quantize import QuantizedArray, dequantize, quantize, stored_bits
from nqkv_jax.quantizers.base import Context, Quantizer
from nqkv_jax.quantizers.block import BlockQuantizer
from nqkv_jax.quantizers.full_precision import FullPrecision
from nqkv_jax.quantizers.transforms import Centre, Hadamard, Rotation, Standardise, Transformed
from nqkv_jax.quantizers.unrotated import Unrotated
from nqkv_jax.rotary import Rotary
from nqkv_jax.saving import load_cache, save_cache
from nqkv_jax.side import Window

__all__ = [
    "BlockQuantizer",
    "Centre",
    "Context",
    "DecodedView",
    "FullPrecision",
    "Hadamard",
    "KVCache",
    "LayerCache",
    "QuantizedArray",
    "Quantizer",
    "Rotary",
    "Rotation",
    "Standardise",
    "Transformed",
    "Unrotated",
    "Window",
    "attend",
    "codebooks",
    "dequantize",
    "load_cache",
    "packing",
    "quantize",
    "save_cache",
    "schemes",
    "stored_bits",
]
