"""Decode tokens/s on this CPU: this library against Hugging Face transformers, in one run.

SmolLM2-135M, float32, batch 1, greedy, the same prompt and the same number of threads for both:
full precision against DynamicCache, and `nqkv` against QuantizedCache (quanto, 4 bits, its
defaults). The last row is our speed where attention costs nothing (a prompt of 16 tokens). Below
it stands the bound for anybody who reads float32 weights once per token: the memory's bandwidth
over the bytes of the weights. Rounds are interleaved, because shared machines drift; medians and
the spread are printed.

    make benchmark          or
    python benchmarks/decode_vs_transformers.py --prompt-tokens 1000 --new-tokens 32 --rounds 3
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings

import numpy as np


def transformers_model(checkpoint):
    """LlamaForCausalLM filled from the tensors of our own reader."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{k: v for k, v in checkpoint.config.items() if k not in ("architectures", "model_type")}
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        name: torch.from_numpy(np.array(array, np.float32)) for name, array in checkpoint.tensors()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"transformers does not take these weights: {missing=}, {unexpected=}")
    model.tie_weights()
    return model


def run_transformers(model, prompt, new_tokens, quantized):
    """Tokens per second after the first new token; the greedy tokens."""
    import torch
    from transformers import DynamicCache, QuantizedCache

    cache = (
        QuantizedCache("quanto", model.config, nbits=4)
        if quantized
        else DynamicCache(config=model.config)
    )
    ids, tokens = torch.tensor([prompt]), []
    with torch.inference_mode():
        for step in range(new_tokens):
            if step == 1:
                start = time.perf_counter()
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return (new_tokens - 1) / (time.perf_counter() - start), tokens


def run_ours(lm, prompt, new_tokens, scheme):
    from nqkv_jax.models import generate

    result = generate(lm, [prompt], scheme=scheme, max_new_tokens=new_tokens)
    return result.tokens_per_second, result.tokens[0]


def memory_bound(lm):
    """Tokens per second if a token only took reading all weights once, at the best speed seen."""
    import jax
    import jax.numpy as jnp

    columns = lm.config.hidden_size
    weights = jnp.ones((lm.num_parameters // columns, columns), jnp.float32)
    read = jax.jit(lambda weights, x: weights @ x)
    x = jnp.ones(columns, jnp.float32)
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        jax.block_until_ready(read(weights, x))
        best = min(best, time.perf_counter() - start)
    return 1 / best


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python benchmarks/decode_vs_transformers.py --new-tokens 32",
    )
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    import jax
    import torch
    import transformers

    from nqkv_jax.models import from_pretrained
    from nqkv_jax.models.checkpoint import open_checkpoint

    warnings.filterwarnings("ignore")
    threads = os.cpu_count()
    torch.set_num_threads(threads)
    lm = from_pretrained("smollm2-135m", dtype="float32")
    peer = transformers_model(open_checkpoint("smollm2-135m"))
    text = "The whale surfaced again, and the crew counted the seconds between its breaths. " * 100
    prompt = lm.tokenizer.encode(text)[: args.prompt_tokens]

    runs = {
        "transformers DynamicCache": lambda: run_transformers(
            peer, prompt, args.new_tokens, quantized=False
        ),
        "ours, none": lambda: run_ours(lm, prompt, args.new_tokens, "none"),
        "transformers QuantizedCache": lambda: run_transformers(
            peer, prompt, args.new_tokens, quantized=True
        ),
        "ours, nqkv": lambda: run_ours(lm, prompt, args.new_tokens, "nqkv"),
        "ours, 16-token prompt": lambda: run_ours(lm, prompt[:16], args.new_tokens, "none"),
    }
    rates, tokens = {name: [] for name in runs}, {}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            rate, tokens[name] = run()
            if round_:  # the first round compiles and warms up
                rates[name].append(rate)
    if tokens["ours, none"] != tokens["transformers DynamicCache"]:
        raise SystemExit(
            "full precision: the two libraries generate different tokens; the speeds mean nothing"
        )

    print(
        f"{platform.processor() or platform.machine()}, {threads} threads, jax {jax.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"SmolLM2-135M float32, {args.prompt_tokens} prompt + {args.new_tokens} new tokens, "
        f"{args.rounds} rounds"
    )
    medians = {name: statistics.median(r) for name, r in rates.items()}
    for name, median in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:30s} {median:7.2f} tokens/s   (from {low:.2f} to {high:.2f})")
    bound = memory_bound(lm)
    print(f"{'bound: all weights read once':30s} {bound:7.2f} tokens/s")
    full = medians["ours, none"] / medians["transformers DynamicCache"]
    quantized = medians["ours, nqkv"] / medians["transformers QuantizedCache"]
    print(f"full precision {full:.2f}x, quantized {quantized:.2f}x")
    print(
        json.dumps(
            {
                "tokens_per_second": rates,
                "memory_bound": bound,
                "full_precision_ratio": full,
                "quantized_ratio": quantized,
            }
        )
    )


if __name__ == "__main__":
    main()
