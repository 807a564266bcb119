"""`nqkv analyze`: what a model's keys and values look like. One module per analysis."""

from nqkv_jax.cli import (
    analyze_error,
    analyze_heatmap,
    analyze_normality,
    analyze_report,
    analyze_spectra,
)

ANALYSES = (analyze_normality, analyze_heatmap, analyze_spectra, analyze_error, analyze_report)


def add(commands) -> None:
    group = commands.add_parser(
        "analyze",
        help="look at a model's keys and values",
        description="look at a model's keys and values",
        epilog="example:\n  nqkv analyze normality --help",
    )
    subcommands = group.add_subparsers(title="analyses", metavar="ANALYSIS", required=True)
    for analysis in ANALYSES:
        analysis.add(subcommands)
