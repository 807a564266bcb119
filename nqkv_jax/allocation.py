"""Which layer's keys and values get how many bits, under a budget.

Every matrix (the keys or the values of one layer) has an error at every width of a ladder; the
widths are raised greedily, always where a bit buys most.

    errors = error_table(norms**2)               # err_i(b) = n_i^2 4^-b, the law of the paper
    bits = allocate(errors, budget=3)            # bits per matrix, 3 on average

Source: Hariri et al. (2025), Quantize What Counts, arXiv 2502.15075. Two things differ: ties are
told by the ratio of gains (the published absolute tolerance makes the result depend on the units of
the norms), and the ladder is of widths that the cache stores exactly.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

LADDER = (2, 3, 4, 8)

_TIE = 1e-6  # gains that are closer than this, relative to the larger, are equal

_RECORD = "nqkv allocation 2"  # kind and version of the file


def paper_error(bits: float) -> float:
    """The error of a uniform quantizer relative to that at 0 bits: 4^-bits."""
    return 4.0**-bits


def error_table(
    weights, ladder: Sequence[float] = LADDER, error: Callable[[float], float] = paper_error
) -> np.ndarray:
    """err_i(b) = weights[i] * error(b): f64[matrices, widths].

    Args:    weights: >= 0, [matrices]: squared norms.  ladder: the widths, in the order of the
             columns.  error: of data of unit norm at a width: the paper's law or a measured one.
    """
    return np.asarray(weights, np.float64)[:, None] * np.array([error(b) for b in ladder])


def check_budget(budget: float, ladder: Sequence[float]) -> None:
    """Raises ValueError unless `allocate` can keep to the budget with widths of the ladder."""
    if len(set(ladder)) < len(ladder) or not len(ladder) or min(ladder) <= 0:
        raise ValueError(f"allocate: ladder must be different positive widths; got {tuple(ladder)}")
    if not budget >= min(ladder):
        raise ValueError(
            f"allocate: budget must be at least the narrowest width, {min(ladder)}; got {budget}"
        )


def allocate(errors, *, budget: float, ladder: Sequence[float] = LADDER) -> list[float]:
    """Bits per matrix, of least total error as far as the greedy rule finds it.

    All matrices begin at the narrowest width. Of those that can go up one step within the budget,
    the one that gains most per bit does; the first of equals. It stops when no step fits.

    Args:
      errors: f64[matrices, widths], finite, >= 0, the columns in the order of `ladder`.
      budget: bits per matrix on average, at least the narrowest width.
      ladder: different positive widths, in any order.

    Returns: one width of `ladder` per matrix; their mean is at most `budget`.
    """
    check_budget(budget, ladder)
    errors, order = np.asarray(errors, np.float64), np.argsort(ladder)
    widths = [ladder[i] for i in order]
    if errors.ndim != 2 or not errors.shape[0] or errors.shape[1] != len(widths):
        raise ValueError(
            f"allocate: errors must be [matrices, {len(widths)}], a column for each width of "
            f"{tuple(ladder)}; got shape {errors.shape}"
        )
    if not np.all(np.isfinite(errors)) or np.any(errors < 0):
        raise ValueError("allocate: errors must be finite and >= 0; some are not")
    errors = errors[:, order]
    gain = (errors[:, :-1] - errors[:, 1:]) / np.diff(widths)
    # A sum of widths such as 1.58 may miss the total by roundings.
    total = len(errors) * budget * (1 + 1e-12)
    level = [0] * len(errors)
    while True:
        spent = math.fsum(widths[at] for at in level)
        open_ = [
            i
            for i, at in enumerate(level)
            if at + 1 < len(widths) and spent - widths[at] + widths[at + 1] <= total
        ]
        if not open_:
            return [widths[at] for at in level]
        best = max(gain[i, level[i]] for i in open_)
        level[next(i for i in open_ if gain[i, level[i]] >= best - _TIE * abs(best))] += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits of every layer's keys and values, as `nqkv calibrate kvq` finds them.

    Attributes:
      model: its name.
      fingerprint: of its weights.
      score: what the errors were taken from.
      budget: bits per number that were asked for.
      ladder: the widths that were allowed.
      key_bits, value_bits: per layer.
    """

    model: str
    fingerprint: str
    score: str
    budget: float
    ladder: tuple[int, ...]
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.key_bits)

    @property
    def mean_bits(self) -> float:
        """Nominal: scales and zero points come on top."""
        return float(np.mean(self.key_bits + self.value_bits))

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are cached alike, so that there was nothing to allocate."""
        return len(set(self.key_bits)) == len(set(self.value_bits)) == 1

    @classmethod
    def of_errors(cls, errors, *, budget: float, ladder: Sequence[int], **about) -> "Allocation":
        """From f64[layers, 2, widths], keys before values; `about`: the other fields."""
        errors = np.asarray(errors, np.float64)
        if errors.ndim != 3 or errors.shape[1] != 2:
            raise ValueError(
                f"Allocation: errors must be [layers, 2, widths]; got shape {errors.shape}"
            )
        bits = allocate(errors.reshape(-1, errors.shape[2]), budget=budget, ladder=ladder)
        return cls(
            budget=budget,
            ladder=tuple(sorted(ladder)),
            key_bits=tuple(bits[::2]),
            value_bits=tuple(bits[1::2]),
            **about,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes a small JSON file, in folders that are made."""
        fields = dataclasses.asdict(self) | dict(num_layers=self.num_layers)
        content = json.dumps(dict(record=_RECORD, **fields), indent=1)
        path = pathlib.Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Allocation":
        """Raises ValueError, saying what is wrong, for anything that `save` did not write."""
        how = "Make one with nqkv calibrate kvq"
        try:
            entry = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"allocation: {path} cannot be read: {error.strerror}. {how}"
            ) from error
        except ValueError as error:
            raise ValueError(f"allocation: {path} must be a JSON file; {error}. {how}") from error
        if not isinstance(entry, dict) or entry.pop("record", None) != _RECORD:
            raise ValueError(f'allocation: {path} must hold "record": "{_RECORD}". {how}')
        fields = {field.name for field in dataclasses.fields(cls)} | {"num_layers"}
        if set(entry) != fields:
            raise ValueError(
                f"allocation: {path} must hold {', '.join(sorted(fields))}; got "
                f"{', '.join(sorted(entry))}. {how}"
            )
        texts = ("model", "fingerprint", "score")
        if not all(isinstance(entry[name], str) for name in texts):
            raise ValueError(
                f"allocation: {path} must hold a text as each of {', '.join(texts)}; got "
                f"{[entry[name] for name in texts]}. {how}"
            )
        layers, ladder = entry.pop("num_layers"), entry["ladder"]
        for side in ("key_bits", "value_bits"):
            bits = entry[side]
            if not isinstance(bits, list) or len(bits) != layers or not bits:
                raise ValueError(
                    f"allocation: {path} must hold {side} for each of num_layers={layers} layers; "
                    f"got {bits}. {how}"
                )
            if not isinstance(ladder, list) or not all(
                type(b) is int and b in ladder for b in bits
            ):
                raise ValueError(
                    f"allocation: {path} must hold {side} of the ladder {ladder}; got {bits}. {how}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
