"""Launches on an H100: for one token, of an append to a layer and of a whole one; and of a flush.

    python tests/aot/launches.py

Of programs as they were compiled: fusions, kernels and copies of a round of the loop over tokens.
"""

import dataclasses
import functools
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import jax
import jax.numpy as jnp
import targets
from flax import nnx
from gpu import append, end_to_end

from nqkv_jax.models import families

LAUNCH = re.compile(r"= .*?\s(?:fusion|custom-call|copy|scatter|gather|dynamic-update-slice)\(")


def loops(compiled, depth: int = 1) -> list[str]:
    """Bodies of the loops of a program; or of `depth` 2, of those within them."""
    computations = re.split(r"\n(?=%|ENTRY)", compiled.as_text())
    found = computations[-1:]
    for _ in range(depth):
        names = [n for body in found for n in re.findall(r" while\(.*?body=(%[\w.]+)", body)]
        found = [c for c in computations for name in names if c.startswith(f"{name} ")]
    return found


def in_loop(compiled) -> int:
    """Of a round of the loop that is the program."""
    (body,) = loops(compiled)
    return len(LAUNCH.findall(body))


def of_append(implementation: str, scheme: str) -> int:
    """Of one token's keys and values, beyond what comes before them."""

    def count(implementation):
        setting = end_to_end.settings()[0]
        new = functools.partial(append.new_layer, setting, implementation, scheme, 32, 4)
        loop = append.loop(implementation, 4)
        return in_loop(targets.compile_for("h100", loop, *jax.eval_shape(new)))

    return count(implementation) - count("nothing")


def decoder(name: str, variant: end_to_end.Variant, num_layers: int):
    """A decoding loop with as many layers of a model, compiled; and its cache."""
    config = dataclasses.replace(families.presets[name], num_layers=num_layers)
    model = nnx.split(families.abstract(config, dtype=jnp.bfloat16))
    cache = end_to_end.abstract_cache(config, variant, 4, 8192)
    token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    loop = end_to_end.decode_loop(model[0], steps=4)
    return targets.compile_for("h100", loop, model[1], token, cache), cache


def variants() -> list[end_to_end.Variant]:
    """Caches whose layers are looked at: bfloat16, the best of codes, as published, and ours."""
    found = end_to_end.variants(cuda=True)[:3]
    return [*found, dataclasses.replace(found[1], scheme="nqkv-plus")]


def of_layer(variant: end_to_end.Variant) -> float:
    """Of Llama-3-8B."""
    few, many = (in_loop(decoder("llama-3-8b", variant, n)[0]) for n in (2, 6))
    return (many - few) / 4


def of_flush(variant: end_to_end.Variant) -> int:
    """Of keys and values of a layer of Llama-3-8B, whose full residuals are encoded: in the loop
    over chunks of a side, in the one that is entered if any is due."""
    sides = loops(decoder("llama-3-8b", variant, 1)[0], depth=3)
    if len(sides) != 2:
        raise RuntimeError(f"expected a loop for keys and one for values; got {len(sides)}")
    return sum(len(LAUNCH.findall(side)) for side in sides)


def of_plain_step(scheme: str) -> int:
    """Of a step over the tokens of a layer of Llama-3-8B without a kernel."""
    variant = end_to_end.Variant(implementation="xla", scheme=scheme)
    (step,) = loops(decoder("llama-3-8b", variant, 1)[0], depth=2)
    if "conditional(" in step or "bf16[4,8,4096,128]" not in step:
        raise RuntimeError("expected a step of 4,096 tokens, for which the host decides nothing")
    return len(LAUNCH.findall(step))


def main() -> None:
    for implementation, scheme in append.ROWS[1:]:
        print(f"append: {implementation} {scheme}: {of_append(implementation, scheme)}")
    for variant in variants():
        name = f"{variant.implementation} {variant.scheme or 'bfloat16'}"
        print(f"layer: {name}: {of_layer(variant):g}")
    print(f"flush of a layer: {of_flush(variants()[1])}")
    print(f"4,096 tokens without a kernel: {of_plain_step(end_to_end.PUBLISHED)}")


if __name__ == "__main__":
    main()
