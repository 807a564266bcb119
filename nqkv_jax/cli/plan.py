"""`nqkv plan`: what fits into a memory."""

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(commands) -> None:
    parser = options.subparser(
        commands, "plan", "the largest batch and context that fit into memory, for every scheme",
        "nqkv plan --model facebook/opt-6.7b --memory 80GiB --context 2048",
        "Bytes are counted from the arrays that would be allocated. Works offline for presets,\n"
        "local folders and .gguf files; of a hub repository only config.json is fetched.",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a preset such as opt-6.7b or llama-3-8b, a folder, a hub id",
    )
    parser.add_argument(
        "--memory",
        required=True,
        metavar="SIZE",
        help="memory of the device: 80GiB (2^30 bytes each), 80GB or 80G (10^9 each)",
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        action=options.Several,
        metavar="TOKENS",
        help="largest batch at these (default: 2048, or the model's limit)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        action=options.Several,
        metavar="N",
        default=[1],
        help="largest context at these (default: 1)",
    )
    parser.add_argument(
        "--scheme", nargs="+", action=options.Several, metavar="SCHEME", help="default: all"
    )
    parser.add_argument(
        "--weights-dtype",
        choices=options.DTYPES,
        default="bfloat16",
        help="dtype of the parameters (default: bfloat16)",
    )
    parser.add_argument(
        "--weights",
        metavar="SIZE",
        help="bytes of the parameters, if they are stored differently",
    )
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        help="kept free for activations and the runtime (default: nothing)",
    )
    options.add_cache_dtype(parser, "bfloat16")
    parser.set_defaults(run=run)


def run(args) -> None:
    import dataclasses

    import jax.numpy as jnp

    from nqkv_jax import schemes
    from nqkv_jax.models import families
    from nqkv_jax.plan import cache_budget, format_size, parse_size, plan

    memory = parse_size(args.memory)
    reserve = parse_size(args.reserve) if args.reserve else 0
    weights = parse_size(args.weights) if args.weights else 0
    # What can be said without a configuration, which may come from the hub, and without schemes.
    cache_budget(memory, weights, reserve, args.context or (), args.batch)
    for name in args.scheme or ():
        schemes.get(name)
    config = options.config_of(args.model)
    if not args.weights:
        weights = families.num_params(config) * jnp.dtype(args.weights_dtype).itemsize
    # Of the list of all, those that do not fit this model (or want a calibration) are left out.
    problems = {} if args.scheme else _problems(config)
    names = args.scheme or [name for name in schemes.names() if name not in problems]
    result = plan(
        config, names, memory=memory, weights=weights, reserve=reserve,
        contexts=args.context or [min(2048, config.max_positions)], batches=args.batch,
        dtype=jnp.dtype(args.cache_dtype),
    )  # fmt: skip
    if args.json:
        terminal.print_json(
            dict(model=args.model, budget=result.budget, left_out=problems)
            | dataclasses.asdict(result)
        )
        return
    limit = result.max_positions
    stored = "given" if args.weights else args.weights_dtype
    reserved = f" - reserve {format_size(reserve)}" if reserve else ""
    print(
        f"{args.model}: {counted(config.num_layers, 'layer')} x 2 x "
        f"{counted(config.num_kv_heads, 'KV head')} x {config.head_dim}; trained for {limit:,} "
        "positions"
    )
    print(
        f"memory {format_size(memory)} - weights {format_size(weights)} ({stored}){reserved} = "
        f"{format_size(result.budget)} for the cache\n"
    )
    first = result.rows[0]
    header = [
        "scheme",
        "bits",
        "bytes/token",
        "+ per sequence",
        *(f"batch at {n:,}" for n in first.largest_batch),
        *(f"context at batch {n:,}" for n in first.largest_context),
    ]
    rows = []
    for row in result.rows:
        # Marked, not cut: how far memory would reach is the answer, and the limit is said below.
        longest = [f"{n:,}{' *' if n > limit else '  '}" for n in row.largest_context.values()]
        rows.append(
            [
                row.scheme,
                f"{row.stored_bits:.4f}",
                f"{row.token_bytes:,.0f}",
                format_size(row.sequence_bytes),
                *(f"{n:,}" for n in row.largest_batch.values()),
                *longest,
            ]
        )
    print(terminal.table(header, rows))
    for name, problem in problems.items():
        print(f"\nleft out: {problem if problem.startswith(name) else f'{name}: {problem}'}")
    if any(n > limit for row in result.rows for n in row.largest_context.values()):
        print(f"\n* fits into memory; the model was trained for {limit:,} positions.")
    beyond = [n for n in first.largest_batch if n > limit]
    if beyond:
        print(f"\nBeyond the model's {limit:,} positions: context {', '.join(map(str, beyond))}.")
    if not reserve:
        print("\nActivations and the runtime need memory as well: --reserve SIZE keeps some free.")


def _problems(config) -> dict[str, str]:
    """Why schemes, with their defaults, cannot be used for a model; by name."""
    from nqkv_jax import schemes

    shape = schemes.LayerShape(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    problems = {}
    for name in schemes.names():
        try:
            schemes.get(name).layer(shape).check(shape)
        except ValueError as error:
            problems[name] = str(error)
    return problems
