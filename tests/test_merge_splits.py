"""The kernel that merges the splits of a sequence, in the interpreter."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernel and its interpreter need jax 0.11", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu
from merge_splits_cases import CASES, check

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_merge import merge


@pytest.mark.parametrize("splits, head_dim, group", CASES)
def test_splits_merge(splits, head_dim, group):
    check(splits, head_dim, group, plgpu.InterpretGPUParams(detect_races=True))


def test_one_split_is_all_there_is():
    numerator, norm = np.ones((1, 2, 1, 64, 8), np.float32), np.ones((1, 2, 1, 8), np.float32)
    found = merge(numerator, norm, norm)
    assert [a.shape for a in found] == [(1, 2, 64, 8), (1, 2, 8), (1, 2, 8)]
