"""`nqkv eval kl`: how far the cache moves the model's predictions."""

import functools

from nqkv_jax.cli import measures, options


def add(subcommands) -> None:
    parser = measures.add(
        subcommands, "kl", "KL divergence from full precision, and how often both agree",
        "nqkv eval kl --model smollm2-135m --text README.md --scheme int8 nqkv --max-tokens 2048",
        "KL(full precision || scheme) in nats per token, every token predicted as decoding with\n"
        "the scheme would predict it; the most sensitive measure. Perplexity comes with it, and\n"
        "the error of its increase, which is paired: both read the same windows.",
    )  # fmt: skip
    measures.add_windows(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax.evaluation import divergence

    text = options.read_text(args.text)
    one = functools.partial(
        divergence, text=text, window=args.window, stride=args.stride, max_tokens=args.max_tokens
    )
    results = measures.measure(args, one, measures.check_windows("kl", text, args))
    if args.json:
        return
    print(measures.describe_windows(results[0], args.text))
    print(measures.columns(
        results,
        KL=lambda r: measures.with_error(r.kl, r.kl_error),
        p99=lambda r: f"{r.kl_p99:.3f}",
        same_token=lambda r: measures.percent(r.top1, r.top1_error) + " %",
        perplexity=lambda r: f"{r.perplexity:.3f}",
        NLL_increase=lambda r: measures.with_error(r.nll_increase, r.nll_increase_error),
        stored_bits=lambda r: f"{r.stored_bits:.4f}",
    ))  # fmt: skip
    print(
        "\nKL in nats per token (p99: one token in a hundred is worse), and the share of tokens\n"
        "at which both predict the same one, with standard errors over windows. Perplexity\n"
        f"without a cache: {results[0].full_perplexity:.3f}"
    )
