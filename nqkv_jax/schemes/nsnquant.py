"""NSNQuant: tokens brought to a normal distribution, coded in vectors of 8 by one fixed codebook.

In windows of 64 tokens every token of a head is divided by its root mean square, loses the mean of
the window, and is divided by what its root mean square is then. Keys go through this before RoPE,
then RoPE and a Hadamard transform; values after a Hadamard transform. Numbers are now so close to
independent and normal that one codebook of 256 words of 8, made from random numbers, serves every
layer, head and side: an 8-bit code for 8 channels at 1 bit, and 8 signs more at 2. Nothing is
calibrated. The last scale makes each token's error orthogonal to it (`quantizers/nsn.py`).

The query is transformed once, and meets the mean in a second product; values are transformed back
once, on the output, in place of the folding into the weights of the model.

Tokens wait in full precision, keys before RoPE, until there are `residual` (64 at 2 bits, 128 at
1), and are then encoded, window by window: at 2 bits, of 255 tokens 192 are encoded.

A token of D channels costs per side bits + (16 + 4 + 32 / 64 + (4 D + D) / 64) / D: bits + 0.238
for D = 128, bits + 0.398 for 64.

Each step can be switched off, to see what it buys.

Source: Son et al. (2025), arXiv 2505.18231. It leaves open by which distance magnitudes are coded
(here Euclidean), and what fills the longer residual at 1 bit (here two windows that are encoded
together).
"""

from typing import Literal

from nqkv_jax.quantizers.nsn import NSNKeys, NSNQuantizer
from nqkv_jax.quantizers.transforms import Hadamard, Transformed
from nqkv_jax.schemes.base import LayerScheme
from nqkv_jax.schemes.registry import register
from nqkv_jax.schemes.shapes import any_rotation, check_hadamard, next_multiple
from nqkv_jax.side import Window

RESIDUAL = {1: 128, 2: 64}


@register("nsnquant")
def nsnquant(
    *,
    bits: Literal[*RESIDUAL] = 2,
    window: int = 64,
    residual: int | None = None,
    normalise: bool = True,
    hadamard: bool = True,
    adjust: bool = True,
):
    """Normalised, shifted, normalised and rotated tokens, in vectors of 8 by one fixed codebook."""
    if window < 2 or window % 2:
        raise ValueError(
            f"nsnquant: window must be an even number of tokens; got {window}. Take "
            f"window={next_multiple(window, 2) if window > 2 else 64}"
        )
    if residual is None:
        residual = -(-RESIDUAL[bits] // window) * window
    if residual < window or residual % window:
        raise ValueError(
            "nsnquant: residual, the tokens that wait in full precision to be encoded together, "
            f"must be a positive multiple of window={window}; got {residual}. Take "
            f"residual={next_multiple(residual, window)}"
        )
    settings = dict(bits=bits, window=window, normalise=normalise, adjust=adjust)
    key = NSNKeys(hadamard=hadamard, **settings)
    value = NSNQuantizer(**settings)
    if hadamard:
        value = Transformed(value, (Hadamard(),))
    waiting = Window(chunk=residual)
    scheme = LayerScheme(key=key, value=value, key_window=waiting, value_window=waiting)

    def layer(shape):
        if hadamard:
            check_hadamard("nsnquant", shape.head_dim, any_rotation(bits))
        return scheme

    return layer
