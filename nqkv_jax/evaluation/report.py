"""A leaderboard for readers: Markdown, a page, and a figure."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nqkv_jax.analysis import plots
from nqkv_jax.words import counted

# Of families of schemes; shapes tell apart what shares a colour.
COLORS = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY,
          plots.BLACK)  # fmt: skip
_BITS = (2, 3, 4, 5, 6, 8, 12, 16)  # ticks
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_COLUMNS = (
    ("stored bits", lambda row, full: f"{row['stored_bits']:.2f}"),
    ("effective", lambda row, full: f"{row['effective_bits']:.2f}"),
    ("perplexity", lambda row, full: f"{row['perplexity']:.2f}"),
    ("over full", lambda row, full: f"{100 * (row['perplexity'] / full - 1):+.1f} %"),
    ("KL", lambda row, full: _with_error(row["kl"], row["kl_error"])),
    ("KL p99", lambda row, full: _number(row["kl_p99"])),
    ("same token", lambda row, full: f"{100 * row['top1']:.1f} %"),
    ("pass keys", lambda row, full: f"{100 * row['passkey']:.0f} %"),
    ("tokens/s", lambda row, full: f"{row['tokens_per_second']:.1f}"),
    ("x full", lambda row, full: f"{row['speed_over_full']:.2f}"),
)


def _number(value: float) -> str:
    """Three figures: 0.000123 -> "1.2e-04", 0.01234 -> "0.0123"."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"


def _with_error(value: float, error: float) -> str:
    shown = _number(value)
    # There is none for a single window.
    return shown if not math.isfinite(error) else f"{shown} ± {_number(error)}"


def _rows(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """With NaN again where JSON has null."""
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in board["rows"]
    ]


def _cells(board: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["scheme", *(name for name, _ in _COLUMNS)]
    rows = [
        [row["label"], *(show(row, row["full_perplexity"]) for _, show in _COLUMNS)]
        for row in _rows(board)
    ]
    return header, rows


def markdown(board: Mapping[str, Any]) -> str:
    """The table."""
    header, rows = _cells(board)
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += [f"| `{label}` | " + " | ".join(cells) + " |" for label, *cells in rows]
    return "\n".join(lines)


def caption(board: Mapping[str, Any]) -> str:
    """What was measured, with what, and where, in a few sentences."""
    settings, versions = board["settings"], board["versions"]
    tokens = board["rows"][0]["tokens"] if board["rows"] else 0
    left_out = "".join(f" `{name}` is left out: {why}." for name, why in board["missing"].items())
    return (
        f"{board['model']}, {board['dtype']}. KL(full precision || scheme) in nats per token, with "
        f"its standard error over windows, the share of tokens at which both predict the same one, "
        f"and perplexity, on {counted(tokens, 'token')} in windows of {settings['window']:,}. "
        f"{counted(settings['passkey_samples'], 'text')} of {settings['passkey_length']:,} tokens "
        f"with a pass key. Decoding one sequence after {counted(settings['window'] - 8, 'token')}, "
        f"in turn with full precision, on {board['processor']}, {counted(board['cores'], 'core')}. "
        f"Effective bits add sinks, residual and states of a cache for one window. "
        f"{board['date']}, nqkv-jax {versions['nqkv-jax']}, jax {versions['jax']}.{left_out}"
    )


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Those that no other point is better than in one coordinate and as good in the other.

    Less is better. Returns indices, by the first coordinate; points that are not finite are none.
    """
    order = sorted(
        (i for i, point in enumerate(points) if all(map(math.isfinite, point))),
        key=lambda i: points[i],
    )
    found, best = [], math.inf
    for i in order:
        if points[i][1] < best:
            found.append(i)
            best = points[i][1]
    return found


def figure(board: Mapping[str, Any]):
    """A matplotlib figure: KL and perplexity against stored bits, KL against speed.

    Lines connect the schemes that no other beats in both coordinates; these are named.

    Raises: ImportError if matplotlib is missing.
    """
    rows = _rows(board)
    families = list(dict.fromkeys(row["label"].partition(":")[0] for row in rows))
    style = {
        name: dict(color=COLORS[i % len(COLORS)], marker=MARKERS[(i // len(COLORS)) % len(MARKERS)])
        for i, name in enumerate(families)
    }
    increase = lambda row: 100 * (row["perplexity"] / row["full_perplexity"] - 1)
    points = [dict(row, increase=increase(row)) for row in rows]
    result = plots.new_figure(15, 6.4)
    panels = result.subplots(1, 3)
    charts = (
        ("stored_bits", "kl", "stored bits per element", "KL from full precision, nats/token", 1),
        ("stored_bits", "increase", "stored bits per element", "perplexity over full, %", 1),
        ("tokens_per_second", "kl", "tokens/s, decoding", "KL from full precision, nats/token", -1),
    )
    for axes, (x, y, x_label, y_label, sense) in zip(panels, charts, strict=True):
        # What has no divergence to speak of has no place on a logarithmic axis.
        shown = [p for p in points if y != "kl" or p["kl"] > 1e-7]
        for p in shown:
            axes.plot(
                p[x], p[y], linestyle="none", markersize=8, markeredgecolor="white",
                **style[p["label"].partition(":")[0]],
            )  # fmt: skip
        line = [shown[i] for i in front([(sense * p[x], p[y]) for p in shown])]
        axes.plot([p[x] for p in line], [p[y] for p in line], color="#777777", lw=1, zorder=0)
        for p in line:
            axes.annotate(
                p["label"], (p[x], p[y]), xytext=(6, 7), textcoords="offset points", fontsize=8
            )
        if y == "kl":
            axes.set_yscale("log")
        else:
            # Straight around 0, as some schemes happen to gain a little on a short text.
            axes.set_yscale("symlog", linthresh=1, linscale=0.5)
            axes.axhline(0, color="#777777", linestyle=":", lw=1, zorder=0)
        if x == "stored_bits":
            axes.set_xscale("log", base=2)
            axes.set_xticks(_BITS, map(str, _BITS), minor=False)
            axes.set_xticks([], minor=True)
        axes.margins(x=0.14, y=0.08)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(f"better: down and {'left' if sense > 0 else 'right'}", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.5)
        plots.tidy(axes)
    marks = [
        panels[0].plot([], [], linestyle="none", markersize=8, label=name, **style[name])[0]
        for name in families
    ]
    result.legend(
        handles=marks, loc="outside lower center", ncols=min(len(families), 8), frameon=False,
        fontsize=9,
    )  # fmt: skip
    result.suptitle(f"KV-cache schemes on {board['model']}", fontsize=12)
    return result


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
th { cursor: pointer; background: #f4f4f4; position: sticky; top: 0; }
"""

# A click on a column's name sorts by it, another one the other way round.
_SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = document.querySelector("tbody"), column = head.cellIndex;
  const value = row => {
    const text = row.cells[column].textContent, number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  const sign = head.dataset.sign = head.dataset.sign === "1" ? "-1" : "1";
  [...body.rows]
    .sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0))
    .forEach(row => body.append(row));
};
"""


def page(board: Mapping[str, Any], png: bytes | None) -> str:
    """One HTML file that needs nothing else: the figure, the table, and how it was measured."""
    header, rows = _cells(board)
    line = lambda tag, cells: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    title = html.escape(f"KV-cache schemes on {board['model']}")
    image = ""
    if png is not None:
        image = (
            '<img alt="KL and perplexity against stored bits, and KL against tokens per second" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        )
    body = "\n".join(f"<tr>{line('td', cells)}</tr>" for cells in rows)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n{image}\n"
        f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>\n{body}\n</tbody></table>\n"
        f"<p>{html.escape(caption(board)).replace('`', '')}</p>\n"
        f"<script>{_SORT}</script>\n</body></html>\n"
    )


def png(board: Mapping[str, Any]) -> bytes:
    """`figure` as a PNG."""
    buffer = io.BytesIO()
    figure(board).savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
