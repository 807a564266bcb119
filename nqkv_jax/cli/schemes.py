"""`nqkv schemes`: what exists, and what it stores."""

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(commands) -> None:
    parser = options.subparser(
        commands, "schemes", "list the schemes, their options and stored bits",
        "nqkv schemes --heads 8 --head-dim 128",
        "A scheme is written as name:option=value,option=value, for example\n"
        "nqkv:bits=3,block_size=64. Stored bits are per element of the encoded part, including\n"
        "scales and all else that is stored; they can depend on the shape of the cache. Effective\n"
        "bits add sinks and residual: all of a cache's bytes, over a context of that length.",
    )  # fmt: skip
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help="only these (default: all)")
    parser.add_argument("--heads", type=int, default=32, help="KV heads (default: 32)")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of each (default: 128)")
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        metavar="TOKENS",
        help="for effective bits (default: 4096)",
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    import types

    from nqkv_jax import schemes
    from nqkv_jax.plan import AbstractCaches

    sizes = (args.heads, args.head_dim, args.context)
    if min(sizes) < 1:
        raise ValueError(f"--heads, --head-dim and --context must be positive; got {sizes}")
    shape = types.SimpleNamespace(num_layers=1, num_kv_heads=args.heads, head_dim=args.head_dim)
    found = []
    for name in args.schemes or schemes.names():
        scheme = schemes.get(name)
        entry = dict(
            name=str(scheme),
            summary=scheme.summary,
            stored_bits=None,
            effective_bits=None,
            problem=None,
            options=schemes.defaults(scheme.name) | dict(scheme.options),
            choices=schemes.choices(scheme.name),
        )
        try:
            caches = AbstractCaches(shape, scheme)
            entry["stored_bits"] = caches.stored_bits
            entry["effective_bits"] = caches(batch=1, max_len=args.context).effective_bits
        except ValueError as error:
            entry["problem"] = str(error)
        found.append(entry)
    if args.json:
        terminal.print_json(
            dict(heads=args.heads, head_dim=args.head_dim, context=args.context, schemes=found)
        )
        return
    print(
        f"Bits per element for {counted(args.heads, 'KV head')} x {args.head_dim}, bfloat16; "
        f"effective bits of a cache for {counted(args.context, 'token')}.\n"
    )
    show = lambda bits: "-" if bits is None else f"{bits:.4f}"
    rows = [
        (e["name"], show(e["stored_bits"]), show(e["effective_bits"]), e["summary"]) for e in found
    ]
    print(terminal.table(("scheme", "stored", "effective", "summary"), rows, right=(1, 2)))
    print("\noptions and their values:")
    for entry in found:
        listed = ",".join(f"{k}={v}" for k, v in entry["options"].items())
        print(f"  {entry['name'].partition(':')[0]}{':' if listed else ''}{listed}")
        if args.schemes:
            for option, valid in entry["choices"].items():
                print(f"    {option}: one of {', '.join(map(str, valid))}")
        if entry["problem"]:
            print(f"    no bits: {entry['problem']}")
    if not args.schemes:
        print("\nnqkv schemes NAME says which values an option takes, where they are a few.")
