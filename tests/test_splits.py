"""Into how many splits GPUs cut the tokens of a head."""

import hypothesis
import hypothesis.strategies as st
import pytest

from nqkv_jax.pallas_kernels.decode_attention.splits import number_of_splits


@pytest.mark.parametrize(
    "heads, units, splits",
    [
        (8, 8, 8),  # a unit each, as all run at a time
        (64, 128, 6),  # 384 programs; with 7 splits 52 of 448 would be a round of their own
        (8, 512, 47),  # 11 units each; so are 49 splits, for which more is merged
        (1024, 8, 1),  # more splits would not save a round
        (1024, 512, 5),  # 13 rounds for 5 times as many programs, not 3
        (1, 1, 1),
    ],
)
def test_splits_on_an_h100(heads, units, splits):
    assert number_of_splits(heads, units, slots=3 * 132) == splits


@hypothesis.given(st.integers(1, 4096), st.integers(1, 1024), st.integers(1, 700))
def test_it_is_no_slower_than_one_round(heads, units, slots):
    """Of as many splits as fit into one; but for a unit's time, which a merge is given."""
    splits = number_of_splits(heads, units, slots)
    assert 1 <= splits <= units
    rounds, each = -(-heads * splits // slots), -(-units // splits)
    if fitting := min(slots // heads, units):
        assert rounds * each <= -(-units // fitting) + 1
