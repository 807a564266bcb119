"""`nqkv eval passkey`, `needle`, `kv`, `variables` and `words`: answers from a long text."""

import functools

from nqkv_jax.cli import measures, options, terminal
from nqkv_jax.words import counted

# Name, what is asked; kept here too, so that --help imports nothing. A test compares.
TASKS = {
    "passkey": "a number of five digits in a text about nothing",
    "needle": "one of four named numbers in a text about nothing",
    "kv": "the value of a key among many keys and values",
    "variables": "which variables a number was handed on to",
    "words": "the words that come most often in a list",
}


def add(subcommands) -> None:
    for task, summary in TASKS.items():
        parser = measures.add(
            subcommands, task, f"greedy generation finds {summary}",
            f"nqkv eval {task} --model smollm2-135m --scheme none nqkv --length 256 512 --depths 5 "
            f"--samples 2 --plot {task}.png",
            "Texts are generated, the same for every scheme, and read in chunks that see earlier\n"
            "ones through the cache. A text counts if all its answers are found.",
        )  # fmt: skip
        whole = functools.partial(parser.add_argument, type=int, metavar="N")
        parser.add_argument(
            "--length", type=int, nargs="+", action=options.Several, default=[512],
            metavar="TOKENS", help="length of the texts (default: 512)",
        )  # fmt: skip
        whole("--depths", default=1, help="ranges of depth, a row each (default: 1)")
        whole("--samples", default=8, help="texts per length and range of depth (default: 8)")
        whole("--seed", default=0, help="for the texts (default: 0)")
        whole("--prefill-chunk", default=128, help="tokens read at a time (default: 128)")
        parser.add_argument(
            "--plot", metavar="FILE", help="draw a PNG, PDF or SVG too, with the data beside it"
        )
        parser.set_defaults(run=functools.partial(run, task))


def run(task: str, args) -> None:
    from nqkv_jax.evaluation import retrieval
    from nqkv_jax.evaluation.retrieval import check
    from nqkv_jax.models import generate

    if args.plot:
        from nqkv_jax.analysis import plots

        plots.check_path(args.plot)  # what fails in the end should have failed at once
    asked = dict(
        task=task, lengths=args.length, depths=args.depths, samples=args.samples, seed=args.seed,
        prefill_chunk=args.prefill_chunk,
    )  # fmt: skip
    results = measures.measure(
        args,
        functools.partial(retrieval, generate=generate, **asked),
        lambda lm: check(lm, **asked),
    )
    if args.plot:
        _plot(results, args.plot)
    if args.json:
        return
    first = results[0]
    print(
        f"{first.model} ({first.dtype}, cache {first.cache_dtype}), {task}: "
        f"{counted(first.samples, 'text')}, read {first.prefill_chunk} tokens at a time\n"
    )
    print(measures.columns(
        results,
        accuracy=lambda r: measures.percent(r.accuracy, r.accuracy_error),
        interval=lambda r: measures.interval(r.accuracy_interval),
        answers_found=lambda r: f"{100 * r.recall:.1f}",
    ))  # fmt: skip
    if len(first.cells) > 1:
        print()
        print(_grid(results))
    print("\nPer cent, with standard errors; intervals of 95 % confidence (Wilson).")


def _grid(results) -> str:
    """Right texts of every cell, a row per scheme and length."""
    depths = sorted({cell.depth for cell in results[0].cells})
    rows = []
    for result in results:
        for length in sorted({cell.length for cell in result.cells}):
            cells = [cell for cell in result.cells if cell.length == length]
            shown = [f"{cell.correct}/{cell.samples}" for cell in cells]
            rows.append([result.scheme, f"{length:,}", *shown])
    return terminal.table(("scheme", "tokens", *(f"depth {d:.0%}" for d in depths)), rows)


def _plot(results, path: str) -> None:
    """A heat map per scheme: depth down, length across."""
    import numpy as np

    from nqkv_jax.analysis import plots

    lengths = sorted({cell.length for cell in results[0].cells})
    depths = sorted({cell.depth for cell in results[0].cells})
    columns = min(len(results), 3)
    lines = -(-len(results) // columns)
    size = (2.2 + columns * (1.0 + 0.75 * len(lengths)), 1.2 + lines * (1.0 + 0.45 * len(depths)))
    figure, data = plots.new_figure(*size), dict(lengths=lengths, depths=depths)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    for axes, result in zip(panels.flat, results, strict=False):
        found = {(cell.depth, cell.length): cell for cell in result.cells}
        grid = np.array([[found[d, n].accuracy for n in lengths] for d in depths])
        data[result.scheme] = grid
        image = axes.imshow(grid, cmap=plots.MAP, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            cell = found[depths[row], lengths[column]]
            axes.text(
                column, row, f"{cell.correct}/{cell.samples}", ha="center", va="center", fontsize=9,
                color="black" if value > 0.5 else "white",
            )  # fmt: skip
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axes.set_xlabel("tokens")
        axes.set_title(f"{result.scheme}: {result.accuracy:.0%}", fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel("depth of the answer")
    figure.colorbar(image, ax=panels, label="share of texts that were right")
    figure.suptitle(f"{results[0].task}, {results[0].model}", fontsize=11)
    plots.save(figure, path, {name: np.asarray(values) for name, values in data.items()})
