"""`nqkv schemes`: what exists, and what it stores."""

from nqkv_jax.cli import options, terminal


def add(commands) -> None:
    parser = options.subparser(
        commands, "schemes", "list the schemes, their options and stored bits",
        "nqkv schemes --heads 8 --head-dim 128",
        "A scheme is written as name:option=value,option=value, for example\n"
        "nqkv:bits=3,block_size=64. Stored bits are per element of the encoded part, scales and\n"
        "all else that is stored counted, and can depend on the shape of the cache.",
    )  # fmt: skip
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help="only these (default: all)")
    parser.add_argument("--heads", type=int, default=32, help="KV heads (default: 32)")
    parser.add_argument("--head-dim", type=int, default=128, help="channels a head (default: 128)")
    parser.set_defaults(run=run)


def run(args) -> None:
    import types

    from nqkv_jax import schemes
    from nqkv_jax.plan import AbstractCaches

    if args.heads < 1 or args.head_dim < 1:
        raise ValueError(
            f"--heads and --head-dim must be positive; got {args.heads} and {args.head_dim}"
        )
    shape = types.SimpleNamespace(num_layers=1, num_kv_heads=args.heads, head_dim=args.head_dim)
    found = []
    for name in args.schemes or schemes.names():
        scheme = schemes.get(name)
        entry = dict(
            name=str(scheme),
            summary=scheme.summary,
            stored_bits=None,
            problem=None,
            options=schemes.defaults(scheme.name) | dict(scheme.options),
        )
        try:
            entry["stored_bits"] = AbstractCaches(shape, scheme).stored_bits
        except ValueError as error:
            # Of those that were asked for that is an error; in the list of all it is a fact.
            if args.schemes:
                raise
            entry["problem"] = str(error)
        found.append(entry)
    if args.json:
        terminal.print_json(dict(heads=args.heads, head_dim=args.head_dim, schemes=found))
        return
    print(f"Stored bits for {args.heads} KV heads x {args.head_dim}, bfloat16.\n")
    rows = [
        (e["name"], "-" if e["stored_bits"] is None else f"{e['stored_bits']:.4f}", e["summary"])
        for e in found
    ]
    print(terminal.table(("scheme", "bits", "summary"), rows, right=(1,)))
    print("\noptions and their values:")
    for entry in found:
        listed = ",".join(f"{k}={v}" for k, v in entry["options"].items())
        print(f"  {entry['name'].partition(':')[0]}{':' if listed else ''}{listed}")
        if entry["problem"]:
            print(f"    does not fit this shape: {entry['problem']}")
