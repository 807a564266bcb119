"""`nqkv bench cache`: what a cache is worth, and what quantizing it costs or saves."""

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(commands) -> None:
    group = commands.add_parser(
        "bench",
        help="measure speed",
        description="measure speed",
        epilog="example:\n  nqkv bench cache --help",
    )
    parser = options.subparser(
        group.add_subparsers(title="measures", metavar="MEASURE", required=True),
        "cache", "seconds per token: no cache at all, full-precision caches, a quantized one",
        "nqkv bench cache --model smollm2-135m --scheme nqkv --lengths 64 128 256",
        "All of them in one run and in turn. Without a cache the whole text is read again for\n"
        "every token. Medians of the repeats; the spread is (longest - shortest) / median.",
    )  # fmt: skip
    options.add_model(parser)
    parser.add_argument("--scheme", default="nqkv", help="default: nqkv")
    options.add_implementation(parser)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        action=options.Several,
        default=[64, 128, 256, 512, 1024],
        metavar="TOKENS",
        help="of the text (default: 64 128 256 512 1024)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--steps", type=int, default=8, metavar="TOKENS", help="decoded per repeat (default: 8)"
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    import jax
    import jax.numpy as jnp

    from nqkv_jax import schemes
    from nqkv_jax.evaluation.throughput import NO_CACHE, cache_timings, check_timings
    from nqkv_jax.pallas_kernels import decode_attention

    scheme = schemes.get(args.scheme)
    decode_attention.check_backend(args.implementation)
    sizes = dict(lengths=args.lengths, batch=args.batch, steps=args.steps, repeats=args.repeats)

    def check(lm):
        check_timings(lm, **sizes)
        options.check_fit(lm, [scheme])

    lm = options.load(args, check)
    own = jnp.dtype(lm.dtype).name
    caches = list(dict.fromkeys([("none", "bfloat16"), ("none", own), (str(scheme), own)]))
    timings = cache_timings(
        lm,
        caches,
        **sizes,
        implementation=args.implementation,
        progress=args.progress,
    )
    device = jax.tree.leaves(lm.params)[0].devices().pop()
    machine = dict(
        model=lm.name,
        dtype=own,
        device=device.device_kind,
        jax=jax.__version__,
        batch=args.batch,
        implementation=args.implementation,
    )
    found = {(t.variant, t.cache_dtype, t.length): t for t in timings}
    lengths = sorted(set(args.lengths))
    bf16, quantized = ("none", "bfloat16"), (str(scheme), own)
    ratios = []
    for length in lengths:
        mine = found[*quantized, length].median
        ratios.append(
            dict(
                length=length,
                no_cache=found[NO_CACHE, "", length].median / mine,
                full_bfloat16=found[*bf16, length].median / mine,
            )
        )
    if args.json:
        records = [
            dict(
                variant=t.variant,
                cache_dtype=t.cache_dtype,
                length=t.length,
                seconds=t.median,
                spread=t.spread,
                repeats=len(t.seconds),
                cache_bytes=t.cache_bytes,
            )
            for t in timings
        ]
        terminal.print_json(
            dict(**machine, scheme=str(scheme), timings=records, speedup_over=ratios)
        )
        return
    _show(
        machine,
        [(NO_CACHE, ""), *caches],
        found,
        lengths,
        ratios,
        str(scheme),
        terminal.width(),
    )


def _label(variant: str, dtype: str) -> str:
    short = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}.get(dtype, dtype)
    return f"{variant}, {short}" if variant == "none" else variant


def _show(machine, variants, found, lengths, ratios, scheme, columns) -> None:
    from nqkv_jax.plan import format_size

    repeats = len(next(iter(found.values())).seconds)
    print(
        f"{machine['model']} ({machine['dtype']}) on {machine['device']}, batch "
        f"{machine['batch']}: seconds per token, median of {repeats} (spread)\n"
    )
    rows = []
    for length in lengths:
        cells = (found[*v, length] for v in variants)
        rows.append(
            [f"{length:,}", *(f"{terminal.seconds(t.median)} ({t.spread:3.0%})" for t in cells)]
        )
    print(
        terminal.table(
            ["tokens", *(_label(*v) for v in variants)], rows, right=range(1 + len(variants))
        )
    )
    last = lengths[-1]
    print(f"\nSpeed-up of {scheme} over no cache at all\n")
    print(
        terminal.bars(
            [(f"{r['length']:>6,}", r["no_cache"], f"{r['no_cache']:.2f} x") for r in ratios],
            columns=columns,
        )
    )
    print(f"\nSpeed-up of {scheme} over a full-precision cache in bfloat16\n")
    print(
        terminal.bars(
            [
                (f"{r['length']:>6,}", r["full_bfloat16"], f"{r['full_bfloat16']:.2f} x")
                for r in ratios
            ],
            columns=columns,
        )
    )
    print(f"\nCache for {counted(last, 'token')}\n")
    print(
        terminal.bars(
            [
                (_label(*v), found[*v, last].cache_bytes, format_size(found[*v, last].cache_bytes))
                for v in variants[1:]
            ],
            columns=columns,
        )
    )
    lost = {
        "no cache at all": [r["length"] for r in ratios if r["no_cache"] < 1],
        "the bfloat16 cache": [r["length"] for r in ratios if r["full_bfloat16"] < 1],
    }
    print()
    for other, where in lost.items():
        at = ", ".join(f"{n:,}" for n in where[:-1]) + ", " * (len(where) > 1)
        print(
            f"{scheme} is slower than {other} at {at}{counted(where[-1], 'token')}."
            if where
            else f"{scheme} is never slower than {other} here."
        )
