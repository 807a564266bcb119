"""`nqkv calibrate kvq`: how many bits every layer's keys and values get."""

from nqkv_jax.cli import options, terminal

SCORES = ("activation", "weight_frobenius", "weight_spectral", "sensitivity")
MAX_TOKENS = {"activation": 1024, "sensitivity": 256}


def add(subcommands) -> None:
    parser = options.subparser(
        subcommands, "kvq", "bits for every layer's keys and values, under a budget",
        "nqkv calibrate kvq --model smollm2-135m --text README.md --budget 3 --out kvq.json",
        "Scores: activation (mean squared norm of keys and values of a text), weight_frobenius\n"
        "and weight_spectral (norms of the projections; no text), sensitivity (how far\n"
        "predictions move if one side of one layer is quantized: minutes, but it is the error\n"
        "itself). Use the result as --scheme kvq:allocation=FILE.",
    )  # fmt: skip
    options.add_model(parser, required=True)
    parser.add_argument("--text", metavar="FILE", help="UTF-8; - for stdin")
    parser.add_argument(
        "--budget", type=float, required=True, metavar="BITS",
        help="average bits per number, without scales and zero points",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="a JSON file")
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help=f"default: {SCORES[0]}")
    parser.add_argument(
        "--law", choices=("measured", "paper"), default="measured",
        help="how errors fall with the width, for the scores that are norms: as measured for the "
        "backend on normal data, or 4^-bits (default: measured)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("quanto", "hqq", "nqkv"), default="quanto", help="default: quanto"
    )
    parser.add_argument(
        "--group-size", type=int, default=64, metavar="N", help="channels per scale (default: 64)"
    )
    parser.add_argument(
        "--ladder", type=int, nargs="+", action=options.Several, metavar="BITS",
        help="widths to choose from (default: 2 3 4 8; nqkv: 2 3 4)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, metavar="TOKENS",
        help="tokens of the text to use (default: 1024; sensitivity: 256)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args) -> None:
    import dataclasses

    from nqkv_jax import schemes
    from nqkv_jax.calibration.kvq import calibrate, check
    from nqkv_jax.plan import AbstractCaches

    options.check_out(args.out, "kvq", "allocation")
    text = None
    if args.score in MAX_TOKENS:
        if args.text is None:
            raise ValueError(f"--score {args.score} is measured on a text; give --text FILE")
        text = options.read_text(args.text)
    asked = dict(
        budget=args.budget, score=args.score, law=args.law, backend=args.backend,
        group_size=args.group_size,
        ladder=args.ladder or ((2, 3, 4) if args.backend == "nqkv" else (2, 3, 4, 8)),
    )  # fmt: skip
    limit = MAX_TOKENS.get(args.score) if args.max_tokens is None else args.max_tokens
    tokens_of = lambda lm: None if text is None else options.first_tokens(lm, text, limit)
    lm = options.load(args, lambda lm: check(lm, tokens_of(lm), **asked))
    tokens = tokens_of(lm)
    allocation = calibrate(lm, tokens, progress=args.progress, **asked)
    allocation.save(args.out)
    scheme = schemes.get(
        "kvq", backend=args.backend, group_size=args.group_size, allocation=args.out
    )
    stored = AbstractCaches(lm.config, scheme, lm.dtype).stored_bits
    if args.json:
        entry = dataclasses.asdict(allocation)
        terminal.print_json(
            dict(**entry, mean_bits=allocation.mean_bits, stored_bits=stored,
                 uniform=allocation.is_uniform, out=args.out, scheme=str(scheme))
        )  # fmt: skip
        return
    read = "" if tokens is None else f" of {tokens.size:,} tokens"
    print(f"{lm.name}: bits per layer by {allocation.score}{read}, budget {args.budget:g}\n")
    print(_show(allocation, terminal.width()))
    print(
        f"\nmean {allocation.mean_bits:.3f} bits, {stored:.3f} stored with scales and zero points"
    )
    if allocation.mean_bits in (min(asked["ladder"]), max(asked["ladder"])):
        print("All layers got the same: the budget is at an end of the ladder.")
    elif allocation.is_uniform:
        print(
            "All layers got the same: they differ by less than a step of the ladder. Another "
            "budget, or\na finer ladder, may tell them apart."
        )
    print(f"\nuse it as --scheme {scheme}")


def _show(allocation, columns: int) -> str:
    """A row of digits per side, under the numbers of the layers; as many lines as it takes."""
    indent, per_line = "layer   ", max(10, (columns - 24) // 10 * 10)
    parts = []
    for start in range(0, allocation.num_layers, per_line):
        layers = range(start, min(start + per_line, allocation.num_layers))
        ruler = "".join(f"{i:<10}" for i in layers[::10]).rstrip()
        lines = [indent + ruler]
        for name, bits in (("keys", allocation.key_bits), ("values", allocation.value_bits)):
            digits = "".join(str(bits[i]) for i in layers)
            mean = sum(bits) / len(bits)
            lines.append(f"{name:<8}{digits}" + (f"   mean {mean:.2f}" if start == 0 else ""))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
