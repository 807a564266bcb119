"""`nqkv demo`: one model, two caches, side by side."""

import importlib.resources
import math
import pathlib
import statistics

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted

PROMPT = "Explain in a few sentences why the sky is blue."
CACHE_DTYPE = "bfloat16"
# One for both caches, so that it is the same text and one compilation each.
WINDOW = 512
REPEATS = 3  # of the timed generations


def add(commands) -> None:
    parser = options.subparser(
        commands, "demo", "the same model with a bfloat16 cache and with a quantized one",
        "nqkv demo --scheme nqkv:bits=3 --max-new-tokens 32",
        "Text, cache size, perplexity on a passage of Moby-Dick, and speed. A minute or two on\n"
        "two CPU cores.",
    )  # fmt: skip
    options.add_model(parser)
    parser.add_argument("--scheme", default="nqkv", help="default: nqkv")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument("--prompt", metavar="TEXT", help="default: a question about the sky")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the bars into a PNG, PDF or SVG too, data beside it as .npz",
    )
    parser.set_defaults(run=run)


def passage() -> str:
    """The text on which perplexity is measured, without the comment that says where it is from."""
    text = importlib.resources.files("nqkv_jax.cli").joinpath("passage.txt")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def run(args) -> None:
    import sys

    import jax.numpy as jnp

    from nqkv_jax import schemes
    from nqkv_jax.analysis import plots
    from nqkv_jax.models.requests import prepare

    scheme = schemes.get(args.scheme)
    names = ["none", str(scheme)]
    if args.plot:
        plots.check_path(args.plot)  # what fails after two minutes should have failed at once

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.max_new_tokens < 2:
        raise ValueError(
            f"--max-new-tokens must be at least 2, as the first one is not timed; got "
            f"{args.max_new_tokens}"
        )
    say(f"Loading {args.model} ...")

    def check(lm):
        prepare(lm, **_request(lm, scheme, args))
        options.check_fit(lm, [scheme], CACHE_DTYPE)

    lm = options.load(args, check)
    entries = []
    for name in names:
        say(f"{_label(name)}: generating, then reading a passage ...")
        entries.append(_measure(lm, name, args))
    say("Timing both, in turn ...")
    # In turn, so that whatever else the machine does meets both alike; compiled by now.
    speeds = [
        [_generate(lm, name, args).tokens_per_second for name in names] for _ in range(REPEATS)
    ]
    for entry, speed in zip(entries, zip(*speeds, strict=True), strict=True):
        entry["tokens_per_second"] = statistics.median(speed)
        # None, where the text ends with its first token.
        entry["speed_spread"] = (max(speed) - min(speed)) / (statistics.median(speed) or 1)
    if args.plot:
        say(f"Drawn into {args.plot}, data in {_plot(entries, args.plot)}")
    if args.json:
        terminal.print_json(
            dict(
                model=lm.name,
                dtype=jnp.dtype(lm.dtype).name,
                cache_dtype=CACHE_DTYPE,
                entries=entries,
            )
        )
    else:
        _show(lm, entries, args.prompt or PROMPT, terminal.width())


def _charts() -> tuple:
    """(title, entry, how to write it, what is good) of every chart."""
    from nqkv_jax.plan import format_size

    return (
        ("cache bytes per token", "bytes_per_token", format_size, "less is better"),
        ("perplexity", "perplexity", "{:.2f}".format, "less is better"),
        ("tokens per second", "tokens_per_second", "{:.1f}".format, "more is better"),
    )


def _plot(entries: list[dict], path: str) -> pathlib.Path:
    """The bars of the terminal, side by side; returns where their data are."""
    from nqkv_jax.analysis import plots

    figure, data = plots.new_figure(9, 2.6), {}
    for axes, (title, key, form, sense) in zip(figure.subplots(1, 3), _charts(), strict=True):
        values = [entry[key] for entry in entries]
        names = [_label(entry["scheme"]) for entry in entries]
        bars = axes.barh(names, values, color=[plots.BLUE, plots.ORANGE])
        data |= {f"{name}.{key}": value for name, value in zip(names, values, strict=True)}
        axes.bar_label(bars, [form(value) for value in values], padding=3)
        axes.set_title(f"{title}\n({sense})", fontsize=10)
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.invert_yaxis()
        if axes.get_subplotspec().colspan.start:
            axes.set_yticks([])
    return plots.save(figure, path, data)


def _label(scheme: str) -> str:
    return "bf16 cache" if scheme == "none" else f"{scheme} cache"


def _request(lm, scheme, args) -> dict:
    """The arguments of `generate`."""
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} came without a tokenizer, which the texts need")
    prompt, template = args.prompt or PROMPT, lm.tokenizer.chat_template
    if template:
        prompt = lm.tokenizer.chat([{"role": "user", "content": prompt}])
    return dict(
        prompts=[prompt], scheme=scheme, max_new_tokens=args.max_new_tokens,
        cache_dtype=CACHE_DTYPE, add_special_tokens=not template,
    )  # fmt: skip


def _generate(lm, scheme: str, args):
    from nqkv_jax.models import generate

    return generate(lm, **_request(lm, scheme, args))


def _measure(lm, scheme: str, args) -> dict:
    from nqkv_jax.evaluation import perplexity
    from nqkv_jax.plan import AbstractCaches
    from nqkv_jax.schemes import get

    result = _generate(lm, scheme, args)
    window = min(WINDOW, lm.config.max_positions)
    quality = perplexity(
        lm, passage(), scheme=scheme, window=window, cache_dtype=CACHE_DTYPE, progress=args.progress
    )
    caches = AbstractCaches(lm.config, get(scheme), CACHE_DTYPE)
    return dict(
        scheme=scheme, text=result.texts[0], tokens=len(result.tokens[0]),
        cache_bytes=result.cache_bytes, cache_tokens=result.cache.max_len,
        bytes_per_token=caches.token_bytes, stored_bits=caches.stored_bits,
        perplexity=quality.perplexity, scored_tokens=quality.tokens, window=quality.window,
    )  # fmt: skip


def _show(lm, entries: list[dict], prompt: str, columns: int) -> None:
    import jax.numpy as jnp

    full, coded = entries
    config = lm.config
    print(
        f"\n{lm.name}: {counted(config.num_layers, 'layer')}, "
        f"{counted(config.num_kv_heads, 'KV head')} x {config.head_dim}; weights and arithmetic in "
        f"{jnp.dtype(lm.dtype).name}\n"
    )
    print(f"> {prompt}\n")
    print(
        terminal.side_by_side(
            *((_label(e["scheme"]), e["text"].strip()) for e in entries), columns=columns
        )
    )
    same = full["text"] == coded["text"]
    print("\nThe texts are the same.\n" if same else "")
    print(terminal.table(
        ("", "bytes/token", "stored bits", "perplexity", "tokens/s"),
        [(_label(e["scheme"]), f"{e['bytes_per_token']:,.0f}", f"{e['stored_bits']:.4f}",
          f"{e['perplexity']:.2f}", f"{e['tokens_per_second']:.1f}") for e in entries],
    ))  # fmt: skip
    for title, key, form, sense in _charts():
        print(f"\n{title} ({sense})")
        print(
            terminal.bars(
                [(_label(e["scheme"]), e[key], form(e[key])) for e in entries], columns=columns
            )
        )
    smaller = full["bytes_per_token"] / coded["bytes_per_token"]
    change = coded["perplexity"] / full["perplexity"] - 1
    speed = coded["tokens_per_second"] / (full["tokens_per_second"] or math.nan)
    print(
        f"\n{coded['scheme']} stores a token in {1 / smaller:.0%} of the bytes ({smaller:.1f} x "
        f"smaller), at {change:+.1%} perplexity and {speed:.2f} x the speed."
    )
    print(
        f"Speed: median of {REPEATS} generations in turn, spread "
        f"{max(e['speed_spread'] for e in entries):.0%}; at lengths like these the weights cost "
        "more\nthan the cache, see nqkv bench cache for longer ones."
    )
    print(
        f"Perplexity: {full['scored_tokens']:,} tokens of Moby-Dick in windows of "
        f"{full['window']}, each seen through the cache."
    )
