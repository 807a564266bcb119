"""`nqkv eval`: quality through the cache. One module per measure."""

from nqkv_jax.cli import (
    evaluate_choice,
    evaluate_drift,
    evaluate_kl,
    evaluate_ppl,
    evaluate_retrieval,
)

MEASURES = (evaluate_kl, evaluate_ppl, evaluate_drift, evaluate_retrieval, evaluate_choice)


def add(commands) -> None:
    group = commands.add_parser(
        "eval",
        help="measure quality through the cache",
        description="measure quality through the cache",
        epilog="example:\n  nqkv eval kl --help",
    )
    measures = group.add_subparsers(title="measures", metavar="MEASURE", required=True)
    for measure in MEASURES:
        measure.add(measures)
