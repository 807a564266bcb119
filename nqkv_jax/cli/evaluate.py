"""`nqkv eval ppl`: perplexity through the cache."""

import pathlib
import re

from nqkv_jax.cli import options, terminal


def add(commands) -> None:
    group = commands.add_parser(
        "eval",
        help="measure quality through the cache",
        description="measure quality through the cache",
        epilog="example:\n  nqkv eval ppl --help",
    )
    parser = options.subparser(
        group.add_subparsers(title="measures", metavar="MEASURE", required=True),
        "ppl", "perplexity of a text, every token seen as decoding with the scheme would see it",
        "nqkv eval ppl --model smollm2-135m --text README.md --scheme none nqkv --max-tokens 2048",
        "The text is cut into windows; no BOS token is added, and the first token of a window is\n"
        "not scored.",
    )  # fmt: skip
    options.add_model(parser, required=True)
    options.add_cache_dtype(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument(
        "--scheme",
        nargs="+",
        default=["none"],
        metavar="SCHEME",
        help="one or several (default: none)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="the model reads so many at once (default: 1024)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="from one window to the next (default: the window)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="TOKENS", help="use so much of the text")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="keep finished windows there, and go on from what it holds; with "
        "several schemes one file each, with the scheme in its name",
    )
    parser.add_argument(
        "--through-cache",
        action="store_true",
        help="token by token through a real cache: the same figure, and slow",
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    import dataclasses

    from nqkv_jax import schemes
    from nqkv_jax.evaluation import perplexity

    # What is wrong with the arguments should be said before minutes of loading.
    names = [str(schemes.get(name)) for name in args.scheme]
    text = options.read_text(args.text)
    lm = options.load(args)
    results = []
    for name in names:
        result = perplexity(
            lm, text, scheme=name, window=args.window, stride=args.stride,
            max_tokens=args.max_tokens, cache_dtype=args.cache_dtype,
            through_cache=args.through_cache, progress=args.progress,
            resume=_resume_path(args.resume, name, len(names)),
        )  # fmt: skip
        results.append(result)
        if args.json:
            terminal.print_json(dataclasses.asdict(result))
    if args.json:
        return
    first = results[0]
    print(
        f"{first.model} ({first.dtype}, cache {first.cache_dtype}): {first.tokens:,} tokens of "
        f"{pathlib.Path(args.text).name} scored in {first.windows:,} windows of {first.window:,}"
        + (f", stride {first.stride:,}" if first.stride != first.window else "")
        + "\n"
    )
    print(terminal.table(
        ("scheme", "perplexity", "NLL", "+-", "stored bits", "seconds"),
        [(r.scheme, f"{r.perplexity:.3f}", f"{r.nll:.4f}", f"{r.standard_error:.4f}",
          f"{r.stored_bits:.4f}", f"{r.seconds:.1f}") for r in results],
    ))  # fmt: skip
    print(
        "\nNLL in nats per token; +- its standard error over windows, of the text rather than of "
        "the\ndifference between schemes."
    )


def _resume_path(path: str | None, scheme: str, count: int) -> pathlib.Path | None:
    if path is None or count == 1:
        return None if path is None else pathlib.Path(path)
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}.{re.sub('[^A-Za-z0-9._=-]', '_', scheme)}{path.suffix}")
