"""`nqkv eval ppl`: perplexity through the cache."""

import functools

from nqkv_jax.cli import measures, options


def add(subcommands) -> None:
    parser = measures.add(
        subcommands, "ppl",
        "perplexity of a text, every token seen as decoding with the scheme would see it",
        "nqkv eval ppl --model smollm2-135m --text README.md --scheme none nqkv --max-tokens 2048",
        "The text is cut into windows, whose first token is not scored. No BOS token is added,\n"
        "but for Gemma, which breaks down without.",
    )  # fmt: skip
    measures.add_windows(parser)
    parser.add_argument(
        "--through-cache",
        action="store_true",
        help="token by token through a real cache: the same figure, and slow",
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax.evaluation import perplexity

    text = options.read_text(args.text)
    one = functools.partial(
        perplexity, text=text, window=args.window, stride=args.stride, max_tokens=args.max_tokens,
        through_cache=args.through_cache,
    )  # fmt: skip
    results = measures.measure(args, one, measures.check_windows("perplexity", text, args))
    if args.json:
        return
    print(measures.describe_windows(results[0], args.text))
    print(measures.columns(
        results,
        perplexity=lambda r: f"{r.perplexity:.3f}",
        NLL=lambda r: measures.with_error(r.nll, r.standard_error),
        stored_bits=lambda r: f"{r.stored_bits:.4f}",
        seconds=lambda r: f"{r.seconds:.1f}",
    ))  # fmt: skip
    print(
        "\nNLL in nats per token, with its standard error over windows: of the text rather than of "
        "the\ndifference between schemes, for which see `nqkv eval kl`."
    )
