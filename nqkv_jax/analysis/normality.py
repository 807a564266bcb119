"""Are keys and values normally distributed? NQKV's codebook supposes it, block by block.

Three ways to cut a text's keys or values [tokens, channels] into blocks:

    tokens         `block_size` neighbouring channels of one token: what NQKV gives one scale
    standardised   the same, after every channel has lost its mean and standard deviation
    channels       `stretch` neighbouring tokens of one channel: what per-channel schemes scale

and the blocks of the first after what NSNQuant does to make them normal, without its rounding of
norms and means to 4 bits:

    nsn            each head of a token divided by its root mean square, less the mean over a window
                   of `stretch` tokens, and divided by its root mean square again
    nsn_hadamard   then RoPE, if these are keys before it, and a Hadamard transform of each head

The test of D'Agostino and Pearson does not change under affine maps of a block, so standardising
channels would change nothing along a channel. Of normal blocks 95 % pass at a level of 5 %; and the
longer a block, the smaller the deviations that are found.

Source: D'Agostino and Pearson (1973), Biometrika 60, 613; as applied to OPT by Cai et al. (2025),
NQKV, arXiv 2505.16210. Last two: Son et al. (2025), NSNQuant, arXiv 2505.18231.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from scipy import stats

from nqkv_jax.analysis import plots
from nqkv_jax.analysis.activations import LayerActivations, check_tokens, record
from nqkv_jax.evaluation.protocol import LanguageModel
from nqkv_jax.hadamard import largest_hadamard, matrix
from nqkv_jax.schemes.base import largest_divisor

LEVEL = 0.05  # of the test
STRETCH = 64
VIEWS = ("tokens", "standardised", "channels", "nsn", "nsn_hadamard")
# Below 20 the approximation behind the test for kurtosis does not hold (Anscombe and Glynn, 1983).
SHORTEST = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStatistics:
    """How normal blocks of equal length are.

    Attributes:
      passing: share of the blocks with p > `LEVEL`; a constant block does not pass.
      skewness, excess_kurtosis: medians over blocks; 0 for a normal distribution. NaN if all blocks
        are constant.
      ordered: f64[block_size], the smallest to the largest element of a block, in standard
        deviations from its mean; averaged over blocks.
      blocks, block_size: how many, and how long.
    """

    passing: float
    skewness: float
    excess_kurtosis: float
    ordered: np.ndarray = dataclasses.field(repr=False)
    blocks: int
    block_size: int


def block_statistics(blocks: np.ndarray) -> BlockStatistics:
    """Of blocks [blocks, block_size], any real dtype.

    Raises: ValueError if there is none, or they are shorter than `SHORTEST`.
    """
    x = np.asarray(blocks, np.float64)
    if x.ndim != 2 or not len(x) or x.shape[1] < SHORTEST:
        raise ValueError(
            f"normality: expected blocks [blocks, block_size] of at least {SHORTEST} elements, "
            f"which the test needs; got shape {x.shape}"
        )
    centred = x - x.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    # What is left of a constant after its mean is rounding, and no distribution.
    varies = deviation[:, 0] > 1e-12 * np.abs(x).max(axis=1)
    z = centred[varies] / deviation[varies]
    if len(z):
        passed = np.sum(stats.normaltest(z, axis=1).pvalue > LEVEL)
        skewness = np.median(stats.skew(z, axis=1))
        kurtosis = np.median(stats.kurtosis(z, axis=1))
        ordered = np.sort(z, axis=1).mean(axis=0)
    else:
        passed, skewness, kurtosis = 0, np.nan, np.nan
        ordered = np.full(x.shape[1], np.nan)
    return BlockStatistics(
        passing=float(passed / len(x)),
        skewness=float(skewness),
        excess_kurtosis=float(kurtosis),
        ordered=ordered,
        blocks=len(x),
        block_size=x.shape[1],
    )


def views(
    x: np.ndarray,
    *,
    block_size: int,
    stretch: int = STRETCH,
    head_dim: int | None = None,
    rotate: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, BlockStatistics]:
    """The five views (see above) of `x` [tokens, channels].

    Tokens that do not fill a stretch are left out of the last three.

    Args:
      head_dim: channels that are normalised together; default: `block_size`. If it is no power of
        two, the Hadamard transform is of its largest parts that are.
      rotate: RoPE, [tokens, heads, head_dim] from the first token on; None for none.

    Raises: ValueError unless `block_size` divides the channels and a stretch fits into the tokens.
    """
    tokens, channels = x.shape
    check_sizes(tokens, channels, block_size, stretch)
    x = np.asarray(x, np.float64)
    deviation = x.std(axis=0)
    # A channel that never changes becomes 0, and is no reason for a division by zero.
    standardised = (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    stretches = x[: tokens // stretch * stretch].reshape(-1, stretch, channels)
    heads = stretches.reshape(*stretches.shape[:2], -1, head_dim or block_size)
    normal = normalise_shift_normalise(heads).reshape(-1, *heads.shape[2:])
    turned = _hadamard(normal if rotate is None else rotate(normal))
    return dict(
        tokens=block_statistics(x.reshape(-1, block_size)),
        standardised=block_statistics(standardised.reshape(-1, block_size)),
        channels=block_statistics(stretches.transpose(0, 2, 1).reshape(-1, stretch)),
        nsn=block_statistics(normal.reshape(-1, block_size)),
        nsn_hadamard=block_statistics(turned.reshape(-1, block_size)),
    )


def check_sizes(tokens: int, channels: int, block_size: int, stretch: int) -> None:
    """Raises ValueError as `views` does."""
    if not SHORTEST <= block_size <= channels or channels % block_size:
        raise ValueError(
            f"normality: block_size must divide the {channels} channels of a token and be at least "
            f"{SHORTEST}; got {block_size}"
        )
    if not SHORTEST <= stretch <= tokens:
        raise ValueError(
            f"normality: stretch must be at least {SHORTEST} and at most the number of tokens, "
            f"{tokens}; got {stretch}. Give a longer text, or another stretch"
        )


def normalise_shift_normalise(x: np.ndarray) -> np.ndarray:
    """Of f64[windows, tokens, heads, head_dim]; a head of zeros stays as it is."""

    def normalise(x):
        size = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
        return x / np.where(size > 0, size, 1)

    x = normalise(x)
    return normalise(x - x.mean(axis=1, keepdims=True))


def _hadamard(x: np.ndarray) -> np.ndarray:
    size = largest_hadamard(x.shape[-1])
    return (x.reshape(-1, size) @ matrix(size).T).reshape(x.shape) / np.sqrt(size)


def normality(
    lm: LanguageModel,
    tokens: np.ndarray,
    *,
    block_size: int | None = None,
    stretch: int = STRETCH,
    progress: bool | None = None,
) -> list[dict[str, dict[str, BlockStatistics]]]:
    """Per layer, {"keys", "rotated_keys", "values"} -> view -> statistics, on a text i32[tokens].

    "keys" are before RoPE; a model without RoPE has no "rotated_keys".

    Args:
      block_size: channels of a block; default: what NQKV would take, the largest divisor of a
        token's channels up to 256.
      stretch: tokens of a block in the view "channels", and of a window in the last two.
      progress: a bar on stderr; None: if that is a terminal.

    Raises: ValueError if the text is too short or too long, or a size does not fit.
    """
    size = check(lm, tokens, block_size=block_size, stretch=stretch)
    sizes = dict(block_size=size, stretch=stretch, head_dim=lm.config.head_dim)
    layers = record(lm, tokens)
    disable = None if progress is None else not progress
    return [
        {
            side: views(x, rotate=_rotation(layer) if side == "keys" else None, **sizes)
            for side, x in layer.sides.items()
        }
        for layer in tqdm.tqdm(layers, desc="normality", disable=disable)
    ]


def check(
    lm: LanguageModel, tokens: np.ndarray, *, block_size: int | None = None, stretch: int = STRETCH
) -> int:
    """The channels of a block; takes and raises what `normality` does, and reads no weights."""
    channels = lm.config.num_kv_heads * lm.config.head_dim
    size = largest_divisor(channels, 256) if block_size is None else block_size
    check_sizes(len(check_tokens(lm, tokens)), channels, size, stretch)
    return size


def _rotation(layer: LayerActivations) -> Callable[[np.ndarray], np.ndarray] | None:
    """RoPE as the layer does it."""
    if layer.rotary is None:
        return None
    return lambda x: np.asarray(
        layer.rotary(jnp.asarray(x, jnp.float32), jnp.arange(len(x))), np.float64
    )


def expected_order(size: int) -> np.ndarray:
    """f64[size]: where the elements of a normal block are expected, smallest first (Blom, 1958)."""
    return stats.norm.ppf((np.arange(1, size + 1) - 0.375) / (size + 0.25))


def draw(layers: list[dict[str, dict[str, BlockStatistics]]], title: str) -> tuple[Any, dict]:
    """(figure, what it shows): shares that pass, by layer; and Q-Q plots, averaged over layers.

    Arrays are named side.view.what, such as "keys.tokens.passing" f64[layers]. Layers whose blocks
    are all constant have NaN in "ordered", and no part in what is drawn of it.
    """
    colors = dict(
        tokens=plots.VERMILION, standardised=plots.BLUE, channels=plots.GREEN, nsn=plots.SKY,
        nsn_hadamard=plots.PURPLE,
    )  # fmt: skip
    markers = dict(tokens="o", standardised="s", channels="^", nsn="v", nsn_hadamard="D")
    sides = list(layers[0])
    figure = plots.new_figure(3.6 * len(sides), 6.4)
    grid = figure.subplots(2, len(sides), sharey="row", squeeze=False)
    data: dict[str, np.ndarray] = {}
    for column, side in enumerate(sides):
        shares, order = grid[:, column]
        for view in VIEWS:
            found = [layer[side][view] for layer in layers]
            size = found[0].block_size
            label = dict(
                tokens=f"{size} channels of a token",
                standardised=f"{size} channels, standardised",
                channels=f"{size} tokens of a channel",
                nsn=f"{size} channels, normalised, shifted, normalised (NSN)",
                nsn_hadamard=f"{size} channels, NSN and Hadamard",
            )[view]
            passing = np.array([s.passing for s in found])
            ordered = np.stack([s.ordered for s in found])
            expected = expected_order(size)
            style = dict(color=colors[view], label=label)
            shares.plot(100 * passing, marker=markers[view], markersize=3.5, linewidth=1.2, **style)
            varies = ordered[np.isfinite(ordered[:, 0])]
            if len(varies):
                order.plot(expected, varies.mean(axis=0), linewidth=1.5, **style)
                low, high = varies.min(axis=0), varies.max(axis=0)
                order.fill_between(expected, low, high, color=colors[view], alpha=0.2, linewidth=0)
            name = f"{side}.{view}"
            data |= {f"{name}.passing": passing, f"{name}.ordered": ordered,
                     f"{name}.expected": expected}  # fmt: skip
        shares.axhline(95, color=plots.BLACK, linewidth=0.8, linestyle=":")
        shares.set_title(plots.side_label(side, sides), fontsize=11)
        plots.by_layer(shares)
        shares.set_ylim(-3, 103)
        order.axline((0, 0), slope=1, color=plots.BLACK, linewidth=0.8, linestyle=":")
        order.set_xlabel("expected, if normal")
        for axes in (shares, order):
            plots.tidy(axes)
    grid[0, 0].set_ylabel(f"blocks that pass, % (p > {LEVEL})")
    grid[1, 0].set_ylabel("found: mean of layers, and range\n(standard deviations)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"{title}: are blocks normal? (dotted: as normal blocks would be)", fontsize=11)
    return figure, data
