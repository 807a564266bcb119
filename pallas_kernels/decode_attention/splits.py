"""Into how many splits GPUs cut the tokens of a head (flash-decoding)."""

# In the time that a program takes for a unit of its tokens. Not measured: estimates from the
# latency of memory and of a launch.
START = 0.5  # until its first unit is there, and to leave its results
MERGE = 1.0  # another launch


def number_of_splits(heads: int, units: int, slots: int) -> int:
    """The fewest that are done soonest.

    Programs run in rounds: one program more than there are slots makes it two, of which the second
    leaves most of the GPU idle.

    Args:
      heads: KV heads of all sequences, as often as programs read them.
      units: of tokens, of a head; what a program takes at a time.
      slots: programs that run at a time.
    """

    def time(splits: int) -> float:
        rounds, each = -(-heads * splits // slots), -(-units // splits)
        return rounds * (each + START) + MERGE * (splits > 1)

    return min(range(1, max(units, 1) + 1), key=time)
