"""Cases of `append_token`, shared by its tests and by the execution of its instructions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nqkv_jax import codebooks
from nqkv_jax.quantizers import BlockQuantizer
from nqkv_jax.quantizers.base import Context
from nqkv_jax.quantizers.tiled import TiledPayload, TiledQuantizer
from nqkv_jax.tiles import TOKENS

NUM_TILES = 2
TOKEN = (0, 77, 131, 255, 200)  # where the token of each sequence goes
KEEP = (True, True, True, True, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppendCase:
    name: str
    quantizer: BlockQuantizer
    heads: int = 2
    head_dim: int = 128
    dtype: np.dtype = jnp.bfloat16

    def __str__(self):
        return self.name

    @property
    def options(self) -> dict:
        """Of `append_token`."""
        quantizer = self.quantizer
        return dict(
            encode=quantizer.encode_blocks, bits=quantizer.codebook.bits,
            block_size=quantizer.block_size,
        )  # fmt: skip


def _case(name, codebook, block_size, scale="absmax", scale_dtype="float16", **options):
    quantizer = BlockQuantizer(
        codebook, block_size=block_size, scale=scale, scale_dtype=scale_dtype
    )
    return AppendCase(name=name, quantizer=quantizer, **options)


_nf, _uniform, _integer = codebooks.normal_float, codebooks.uniform, codebooks.integer
CASES = {
    case.name: case
    for case in [
        _case("nf4", _nf(4), 256, heads=8),
        _case("nf4-d64", _nf(4), 192, heads=3, head_dim=64),
        _case("nf4-several-warps", _nf(4), 1024, heads=8),
        _case("nf3-d80", _nf(3), 240, heads=6, head_dim=80),
        _case("cubic3-d256", codebooks.cubic_normal(3, 64), 64, head_dim=256, dtype=jnp.float32),
        _case("cubic4-signed", codebooks.cubic_normal(4, 128, signed=True), 128, "signed_absmax"),
        _case("cubic2-bfloat16", codebooks.cubic_normal(2, 128), 128, scale_dtype="bfloat16"),
        _case("integer8", _integer(8), 128, scale_dtype="float32"),
        _case("float8", codebooks.Float8(), 128),
        _case("float8-e5m2-d64", codebooks.Float8("e5m2"), 64, head_dim=64, dtype=jnp.float32),
        _case("integer4-signed-d112", _integer(4, signed=True), 112, "signed_absmax", head_dim=112),
        _case("uniform4-minmax", _uniform(4), 128, "minmax", dtype=jnp.float16),
        _case("uniform2-minmax-parts", _uniform(2), 32, "minmax"),
        _case("uniform3-minmax-d96", _uniform(3), 96, "minmax", "float32", head_dim=96),
    ]
}


def tokens(case: AppendCase, seed: int = 0) -> jax.Array:
    """[sequences, heads, head_dim]; the first blocks hold what is rare."""
    shape = (len(TOKEN), case.heads, case.head_dim)
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    # Scales in float16 saturate. Above 1e30 some quotients are subnormal: XLA takes them as 0 on a
    # CPU, but not on a GPU.
    x[0, 0, :3] = 0.0, -0.0, min(1e30, float(jnp.finfo(case.dtype).max))
    x[1] *= 1e-6  # scales are subnormal
    x[2] = -np.abs(x[2])
    x[2, 0] = 0
    x[3, 0, 7], x[3, -1, 9] = np.nan, -np.inf
    return jnp.asarray(x).astype(case.dtype)


def body(case: AppendCase, seed: int = 0) -> TiledPayload:
    """[sequences, tiles, ...], with random bits."""
    tiled = TiledQuantizer(case.quantizer)
    x = jax.ShapeDtypeStruct((TOKENS, case.heads, case.head_dim), case.dtype)
    rng = np.random.default_rng(seed)

    def fill(a):
        shape = (len(TOKEN), NUM_TILES, *a.shape)
        if a.dtype.kind == "i":
            return jnp.asarray(rng.integers(-(2**15), 2**15, shape).astype(a.dtype))
        return jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(a.dtype)

    return jax.tree.map(fill, jax.eval_shape(lambda x: tiled.quantize(x, Context()), x))


def expected(case: AppendCase, before: TiledPayload, x: jax.Array) -> TiledPayload:
    """By XLA."""
    tiled, first = TiledQuantizer(case.quantizer), jnp.asarray(TOKEN, jnp.int32)
    last = first + jnp.asarray(KEEP, jnp.int32)
    splice = lambda *a: tiled.splice(*a, Context())
    return jax.jit(jax.vmap(splice))(before, x[:, None], first, last)
