"""`nqkv leaderboard`: quality, bytes and speed of every scheme on a model."""

from nqkv_jax.cli import demo, options

ALL = "all"


def add(commands) -> None:
    parser = options.subparser(
        commands, "leaderboard", "measure quality, bytes and speed of every scheme on a model",
        "nqkv leaderboard --model smollm2-135m --schemes none int8 nqkv --text README.md "
        "--max-tokens 1024 --out leaderboard",
        "KL divergence, perplexity and agreement, pass keys, counted bits and tokens/s, as\n"
        "Markdown, JSON, HTML and a figure. Results are kept in the folder: an interrupted run\n"
        "resumes, and a new one measures only what has changed. All schemes, with a calibration\n"
        "text and --workers 2, take about two hours for smollm2-135m on two cores.",
    )  # fmt: skip
    options.add_model(parser)
    parser.add_argument(
        "--schemes", nargs="+", action=options.Several, default=[ALL], metavar="SCHEME",
        help="all: every registered scheme at 4, 3 and 2 bits where it has them (default); "
        "{kvquant}, {kvq}, {commvq1} and {commvq2} in a name stand for calibration files",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FILE",
        help="for KL and perplexity, UTF-8; - for stdin (default: a short passage of Moby-Dick)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-text", metavar="FILE",
        help="calibrate kvquant, kvq and commvq on it first; without it their rows are left out",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for tables and records")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes, each with its own model, that calibrate and measure quality in parallel; "
        "speed is measured afterwards, in one (default: 1; each can use a core)",
    )  # fmt: skip
    numbers = (
        ("--max-tokens", 4096, "TOKENS", "of the text that are used"),
        ("--window", 1024, "TOKENS", "read at once"),
        ("--passkey-length", 512, "TOKENS", "length of texts with a pass key"),
        ("--passkey-samples", 8, "N", "texts with a pass key"),
        ("--repeats", 5, "N", "per timing"),
        ("--calibration-samples", 16, "N", "windows that kvquant and commvq are calibrated on"),
        ("--calibration-window", 1024, "TOKENS", "per window"),
    )
    for name, default, unit, text in numbers:
        parser.add_argument(
            name, type=int, default=default, metavar=unit, help=f"{text} (default: {default:,})"
        )
    parser.set_defaults(run=run)


def run(args) -> None:
    import functools
    import json
    import pathlib

    from nqkv_jax import schemes
    from nqkv_jax.analysis import plots
    from nqkv_jax.cli import terminal
    from nqkv_jax.evaluation import leaderboard as boards
    from nqkv_jax.evaluation import side_by_side
    from nqkv_jax.models import from_pretrained, generate

    out = pathlib.Path(args.out).expanduser()
    if out.is_file():
        raise ValueError(f"--out must be a folder; {args.out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    plots.check_path(out / "leaderboard.png")  # what fails in the end should have failed at once
    every = [n for g in args.schemes for n in (boards.variants() if g == ALL else [g])]
    wanted = boards.placeholders(every)
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1; got {args.workers}")
    # Only to see what is wrong with them: the calibrations are made later.
    boards.resolve(every, dict.fromkeys(boards.CALIBRATIONS, ""))
    if args.calibration_text is None and not boards.resolve(every, {})[0]:
        raise ValueError("--schemes: all of them need calibrations; give --calibration-text FILE")
    text = demo.passage() if args.text is None else options.read_text(args.text)
    other = None if args.calibration_text is None else options.read_text(args.calibration_text)
    settings = boards.Settings(
        window=args.window, max_tokens=args.max_tokens, passkey_length=args.passkey_length,
        passkey_samples=args.passkey_samples, repeats=args.repeats,
    )  # fmt: skip
    windows = dict(samples=args.calibration_samples, seqlen=args.calibration_window)
    if other is None:
        wanted = set()
    elif wanted:
        schemes.check_text("leaderboard", "out", str(out))

    def check(lm):
        boards.check(lm, text, settings)
        if ALL not in args.schemes:
            options.check_fit(lm, boards.resolve(every, {})[0].values())
        if wanted:
            boards.check_calibrations(lm, other, wanted, **windows)

    lm = options.load(args, check)
    calibrate = functools.partial(
        boards.calibrations, text=other, folder=out / "calibration", **windows
    )
    measure = functools.partial(
        boards.quality, text=text, generate=generate, folder=out, settings=settings
    )

    def resolved(files):
        entries, missing = boards.resolve(every, files)
        if ALL in args.schemes:
            # Those that nobody asked for by name need not fit every model.
            entries, misfits = boards.fitting(lm, entries)
            missing |= misfits
        return entries, missing

    def ahead(tasks):
        load = functools.partial(from_pretrained, args.model, dtype=args.dtype, progress=False)
        side_by_side.run(load, tasks, workers=args.workers, progress=args.progress)

    def measures(entries):
        return {label: functools.partial(measure, scheme=str(s)) for label, s in entries.items()}

    entries, missing = resolved({})
    if args.workers > 1:
        # The longest first.
        tasks = {
            f"{name}, calibration": functools.partial(calibrate, wanted={name}, progress=False)
            for name in boards.CALIBRATIONS
            if name in wanted
        }
        ahead(tasks | measures(entries))
    if wanted:
        # Of those that are there already, the names.
        files = calibrate(lm, wanted=wanted, progress=args.progress)
        early, (entries, missing) = entries, resolved(files)
        if args.workers > 1:
            ahead(measures({label: s for label, s in entries.items() if label not in early}))
    board = boards.leaderboard(
        lm, entries, text, generate=generate, folder=out, settings=settings, missing=missing,
        progress=args.progress,
    )  # fmt: skip
    # As it will be read again: without NaN.
    board = json.loads(terminal.to_json(board))
    table = _write(board, out)
    print(terminal.to_json(board) if args.json else f"{table}\nwrote {out}/leaderboard.*")


def _write(board: dict, out) -> str:
    """The board as JSON, Markdown, a figure, and a page with both; returns the Markdown."""
    import json

    from nqkv_jax.evaluation import report

    image = report.png(board)
    table = f"{report.markdown(board)}\n\n{report.caption(board)}\n"
    (out / "leaderboard.json").write_text(json.dumps(board, indent=1) + "\n", encoding="utf-8")
    (out / "leaderboard.md").write_text(table, encoding="utf-8")
    (out / "leaderboard.png").write_bytes(image)
    (out / "leaderboard.html").write_text(report.page(board, image), encoding="utf-8")
    return table
