"""`nqkv generate`: text from a quantized cache."""

import sys

from nqkv_jax.cli import options, terminal
from nqkv_jax.words import counted


def add(commands) -> None:
    parser = options.subparser(
        commands, "generate", "continue a prompt, and stream the tokens",
        'nqkv generate --model smollm2-135m --prompt "The capital of France is" --scheme nqkv',
        "Text streams to stdout; a summary goes to stderr.",
    )  # fmt: skip
    options.add_model(parser)
    options.add_cache_dtype(parser)
    options.add_implementation(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument("--chat", metavar="TEXT", help="message to answer, in the chat format")
    source.add_argument("--file", metavar="FILE", help="prompt in UTF-8; - for stdin")
    parser.add_argument("--scheme", default="nqkv", help="cache scheme (default: nqkv)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--max-len", type=int, metavar="N",
        help="room in the cache (default: for the prompt and the new tokens, in steps of 128)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 always takes the likeliest token (default)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest that make up the probability P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="leave out tokens less likely than P times the likeliest",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that came before become less likely",
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling (default: 0)")
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations; several are shown once all are done",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the text; may be given more than once",
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    from nqkv_jax import schemes
    from nqkv_jax.models import Sampling, generate, stream
    from nqkv_jax.models.requests import prepare

    scheme = schemes.get(args.scheme)
    sampling = Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )  # fmt: skip
    text = options.read_text(args.file) if args.file is not None else args.prompt
    settings = dict(
        scheme=scheme, max_new_tokens=args.max_new_tokens, max_len=args.max_len, sampling=sampling,
        seed=args.seed, stop=args.stop, cache_dtype=args.cache_dtype,
        implementation=args.implementation, add_special_tokens=args.chat is None,
    )  # fmt: skip

    def prompt_of(lm) -> str:
        if lm.tokenizer is None:
            raise ValueError(
                f"{lm.name} came without a tokenizer, so there is no text to make. Put "
                "its tokenizer.json into the folder"
            )
        if args.chat is None:
            return text
        return lm.tokenizer.chat([{"role": "user", "content": args.chat}])

    def check(lm):
        prepare(lm, [prompt_of(lm)], num_samples=args.num_samples, **settings)
        options.check_fit(lm, [scheme], args.cache_dtype)

    lm = options.load(args, check)
    prompt = prompt_of(lm)
    if args.json or args.num_samples != 1:
        result = generate(lm, [prompt], num_samples=args.num_samples, **settings)
        if args.json:
            terminal.print_json(_record(lm, result))
            return
        for i, text in enumerate(result.texts):
            print(f"[{i + 1}]{text}" if text[:1].isspace() else f"[{i + 1}] {text}")
    else:
        pieces = stream(lm, prompt, **settings)
        # Shown with its prompt, except where that is a page of markup or of text.
        if args.prompt is not None:
            print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        result = pieces.result
    print(summary(result), file=sys.stderr)


def _record(lm, result) -> dict:
    names = (
        "texts",
        "tokens",
        "finish_reasons",
        "scheme",
        "cache_bytes",
        "stored_bits",
        "prefill_seconds",
        "decode_seconds",
        "compile_seconds",
        "tokens_per_second",
    )
    record = {name: getattr(result, name) for name in names}
    record["tokens"] = [[int(token) for token in tokens] for tokens in record["tokens"]]
    return dict(model=lm.name, prompt_tokens=len(result.prompt_tokens[0]), **record)


def summary(result) -> str:
    """One line: what was made, how fast, and what the cache took."""
    from nqkv_jax.plan import format_size

    bits = f"{result.stored_bits:.4g} bits per encoded element"
    if not result.stored_bits:
        bits = "all of it still in full precision"
    speed = f"{result.tokens_per_second:.1f} tokens/s"
    if not result.tokens_per_second:
        speed = "no decoding"
    return (
        f"[{result.scheme}: {counted(sum(map(len, result.tokens)), 'token')}, {speed} (+ "
        f"{result.prefill_seconds:.1f} s for the prompt, {result.compile_seconds:.1f} s "
        "compiling), cache "
        f"{format_size(result.cache_bytes)}, {bits}]"
    )
