"""`nqkv eval drift`: how long a generation stays what it would be in full precision."""

import functools

from nqkv_jax.cli import measures, options
from nqkv_jax.words import counted


def add(subcommands) -> None:
    parser = measures.add(
        subcommands, "drift", "tokens until greedy generation departs from that of full precision",
        "nqkv eval drift --model smollm2-135m --text README.md --scheme int8 nqkv --prompts 4 "
        "--length 128",
        "Prompts are spread over the text. KL(full precision || scheme) is taken along the\n"
        "full-precision continuation, which both read, by position.",
    )  # fmt: skip
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - for stdin")
    whole = functools.partial(parser.add_argument, type=int)
    whole("--prompts", default=8, metavar="N", help="default: 8")
    whole("--prompt", default=128, metavar="TOKENS", help="per prompt (default: 128)")
    whole("--length", default=256, metavar="TOKENS", help="per continuation (default: 256)")
    whole("--buckets", default=4, metavar="N", help="ranges of positions (default: 4)")
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax.evaluation import drift
    from nqkv_jax.evaluation.drift import prompts_of
    from nqkv_jax.models import generate

    asked = dict(
        text=options.read_text(args.text), prompts=args.prompts, prompt=args.prompt,
        length=args.length, buckets=args.buckets,
    )  # fmt: skip
    results = measures.measure(
        args,
        functools.partial(drift, generate=generate, **asked),
        lambda lm: prompts_of(lm, **asked),
    )
    if args.json:
        return
    first = results[0]
    print(
        f"{first.model} ({first.dtype}, cache {first.cache_dtype}): "
        f"{counted(first.prompts, 'prompt')} of {counted(first.prompt, 'token')}, continued by up "
        f"to {first.length:,}\n"
    )
    ranges = {
        f"KL_at_{bucket.start}..{bucket.stop - 1}": (
            lambda r, i=i: measures.with_error(r.buckets[i].kl, r.buckets[i].kl_error)
        )
        for i, bucket in enumerate(first.buckets)
    }
    print(measures.columns(
        results,
        tokens_in_common=lambda r: measures.with_error(r.common, r.common_error, 1),
        median=lambda r: f"{r.common_median:g}",
        parted=lambda r: f"{r.parted}/{r.prompts}",
        **ranges,
    ))  # fmt: skip
    print(
        "\nTokens before the continuations part (those that never do count with their length),\n"
        "and KL in nats per token along that of full precision, by position; with standard errors\n"
        "over prompts."
    )
