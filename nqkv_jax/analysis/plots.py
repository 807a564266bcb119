"""What the figures of all analyses share: colours, and files with the data beside the picture.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; maps are
cividis (Nuñez et al., 2018, doi 10.1371/journal.pone.0199239).
"""

import os
import pathlib
from typing import Any

import numpy as np

from nqkv_jax.extras import missing

BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000",
)  # fmt: skip
MAP = "cividis"
FORMATS = (".png", ".pdf", ".svg")

# name of a side -> (how figures call it, its colour)
SIDES = {
    "keys": ("keys before RoPE", BLUE),
    "rotated_keys": ("keys after RoPE", SKY),
    "values": ("values", ORANGE),
}


def side_label(side: str, sides) -> str:
    """What `side` is called where `sides` are all that a model has."""
    return SIDES[side][0] if "rotated_keys" in sides else side


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, without a window.

    Raises: ImportError, saying what to install, if there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(missing("a figure", "matplotlib", "plots")) from error
    return Figure(figsize=(width, height), layout="constrained")


def check_path(path: str | os.PathLike) -> pathlib.Path:
    """A path that a figure can be saved to; what would fail in the end fails here.

    Raises: ValueError for another suffix or a folder that is not there; ImportError without
      matplotlib.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a figure must be a file {' or '.join(FORMATS)}; got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"a figure must be in a folder that exists; there is no {path.parent}")
    new_figure(1, 1)
    return path


def save(figure: Any, path: str | os.PathLike, data: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes the figure, and what it shows beside it: `name.png` and `name.npz`.

    Returns: the path of the data, which `numpy.load` reads.
    """
    path = check_path(path)
    beside = path.with_suffix(".npz")
    np.savez_compressed(beside, **data)
    figure.savefig(path, dpi=150)
    return beside


def logarithmic(axes: Any) -> bool:
    """Makes the y axis logarithmic, if there is anything positive to show; whether it did."""
    positive = any(np.any(line.get_ydata() > 0) for line in axes.lines)
    if positive:
        # What is 0 has no place on it: a gap, where clipping would draw a line down to the frame.
        axes.set_yscale("log", nonpositive="mask")
    return positive


def by_layer(axes: Any) -> None:
    """What the x axis of lines with a point per layer needs."""
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)


def tidy(axes: Any) -> None:
    """No frame where it says nothing."""
    axes.spines[["top", "right"]].set_visible(False)
