"""Quantizers: what a scheme encodes keys and values with. See `base` for the contract."""

from nqkv_jax.quantizers.base import Context as Context
from nqkv_jax.quantizers.base import Quantizer as Quantizer
from nqkv_jax.quantizers.block import BlockPayload as BlockPayload
from nqkv_jax.quantizers.block import BlockQuantizer as BlockQuantizer
from nqkv_jax.quantizers.commvq import CommVQKeys as CommVQKeys
from nqkv_jax.quantizers.commvq import CommVQValues as CommVQValues
from nqkv_jax.quantizers.dense_sparse import DenseSparseChannels as DenseSparseChannels
from nqkv_jax.quantizers.dense_sparse import DenseSparsePayload as DenseSparsePayload
from nqkv_jax.quantizers.dense_sparse import DenseSparseTokens as DenseSparseTokens
from nqkv_jax.quantizers.digits import DigitQuantizer as DigitQuantizer
from nqkv_jax.quantizers.full_precision import FullPrecision as FullPrecision
from nqkv_jax.quantizers.hqq import HQQQuantizer as HQQQuantizer
from nqkv_jax.quantizers.nsn import NSNKeys as NSNKeys
from nqkv_jax.quantizers.nsn import NSNQuantizer as NSNQuantizer
from nqkv_jax.quantizers.outlier_tokens import OutlierTokens as OutlierTokens
from nqkv_jax.quantizers.ranked import RankedQuantizer as RankedQuantizer
from nqkv_jax.quantizers.ranked import widths_by_rank as widths_by_rank
from nqkv_jax.quantizers.squat import QueryAware as QueryAware
from nqkv_jax.quantizers.transforms import Centre as Centre
from nqkv_jax.quantizers.transforms import Hadamard as Hadamard
from nqkv_jax.quantizers.transforms import Rotation as Rotation
from nqkv_jax.quantizers.transforms import Standardise as Standardise
from nqkv_jax.quantizers.transforms import Transform as Transform
from nqkv_jax.quantizers.transforms import Transformed as Transformed
from nqkv_jax.quantizers.turboquant import ResidualSketch as ResidualSketch
