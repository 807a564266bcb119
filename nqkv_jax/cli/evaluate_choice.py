"""`nqkv eval choice` and `nqkv eval lambada`: zero-shot tasks through the cache."""

import functools
import pathlib

from nqkv_jax.cli import measures
from nqkv_jax.words import counted

_TASK = "the task, JSON lines"


def add(subcommands) -> None:
    choice = measures.add(
        subcommands, "choice", "accuracy on multiple-choice tasks, by log-likelihood",
        "nqkv eval choice --model smollm2-135m --task piqa.jsonl --scheme none nqkv --limit 200",
        "Items are {query, choices, gold} or {context_options, continuation, gold}. Every token\n"
        "of a choice is predicted as decoding with the scheme would predict it. acc_norm divides\n"
        "log-likelihoods by the characters of the choice.",
    )  # fmt: skip
    choice.set_defaults(run=run_choice)
    word = measures.add(
        subcommands, "lambada", "accuracy and perplexity of the last word of a passage",
        "nqkv eval lambada --model smollm2-135m --task lambada_openai.jsonl --limit 200",
        "Items are {context, continuation}. A word is right if greedy decoding with the scheme\n"
        "would make all its tokens.",
    )  # fmt: skip
    word.set_defaults(run=run_lambada)
    for parser in (choice, word):
        parser.add_argument("--task", required=True, metavar="FILE", help=_TASK)
        parser.add_argument(
            "--limit", type=int, metavar="N", help="take the first N items (default: all)"
        )


def run_choice(args) -> None:
    from nqkv_jax.evaluation import multiple_choice
    from nqkv_jax.evaluation.choice import choice_pairs

    _run(
        args, multiple_choice, choice_pairs,
        acc=lambda r: measures.percent(r.accuracy, r.accuracy_error),
        interval=lambda r: measures.interval(r.accuracy_interval),
        acc_norm=lambda r: measures.percent(r.accuracy_norm, r.accuracy_norm_error),
        norm_interval=lambda r: measures.interval(r.accuracy_norm_interval),
    )  # fmt: skip


def run_lambada(args) -> None:
    from nqkv_jax.evaluation import last_word
    from nqkv_jax.evaluation.choice import word_pairs

    _run(
        args, last_word, word_pairs,
        accuracy=lambda r: measures.percent(r.accuracy, r.accuracy_error),
        interval=lambda r: measures.interval(r.accuracy_interval),
        perplexity=lambda r: f"{r.perplexity:.2f}",
        NLL=lambda r: measures.with_error(r.nll, r.nll_error),
    )  # fmt: skip


def _run(args, function, check, **cells) -> None:
    from nqkv_jax.evaluation.choice import read_items

    items = read_items(args.task, args.limit)
    results = measures.measure(
        args, functools.partial(function, items=items), lambda lm: check(lm, items)
    )
    if args.json:
        return
    first = results[0]
    print(
        f"{first.model} ({first.dtype}, cache {first.cache_dtype}): "
        f"{counted(first.items, 'item')} of {pathlib.Path(args.task).name}\n"
    )
    print(measures.columns(results, **cells))
    print("\nPer cent, with standard errors; intervals of 95 % confidence (Wilson).")
