"""What benchmarks/gpu_decode.py times is what it says: programs compiled for an H100."""

import functools
import re

import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
from gpu import ROOT, append, end_to_end, splits, sweep, timing
from gpu.check import KERNEL
from gpu.shapes import Shape, bfloat16_caches, coded_caches, formats
from targets import TRITON, calls, compile_for

from nqkv_jax.pallas_kernels import decode_attention
from nqkv_jax.partial import STEP_BYTES

SHAPE = Shape(batch=2, context=4096, num_heads=32, num_kv_heads=8)
CALLS = {KERNEL: ("mosaic_gpu", "decode_attention"), "jax.nn cudnn": ("__cudnn$fmha",)}
ROWS = [r for r in sweep.rows_of(SHAPE, formats(), 3) if r.implementation != "torch"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_loop_reads_every_cache_in_every_round(row):
    """Nothing is decoded, transposed or copied beforehand: there is no room for it.

    Plain XLA decodes some tokens at a time.
    """
    if row.form.codebook is None:
        run = functools.partial(sweep._dense, implementation=row.implementation.split()[1])
        make = lambda key: bfloat16_caches(key, SHAPE, row.copies, "tokens last" in row.store)
    else:
        run = sweep.by_codes(row, SHAPE)
        make = lambda key: coded_caches(key, SHAPE, row.form, row.copies)
    q = jax.ShapeDtypeStruct((SHAPE.batch, SHAPE.num_heads, SHAPE.head_dim), jnp.bfloat16)
    caches = jax.eval_shape(make, jax.random.key(0))
    compiled = compile_for("h100", timing.chained(run, row.steps), q, caches)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    if row.implementation == "xla":
        assert temporary < STEP_BYTES
    else:
        # Scores in float32 are the largest of what else there is.
        scores = 4 * SHAPE.batch * SHAPE.num_heads * SHAPE.context
        assert temporary < 2 * scores < row.form.nbytes(SHAPE) / 2
    if row.implementation == KERNEL:
        assert (
            decode_attention.unsupported(KERNEL, *sweep.abstract(SHAPE, row.form), SHAPE.group)
            is None
        )
    if row.implementation in CALLS:
        assert calls(compiled, *CALLS[row.implementation]) == row.copies


def test_splits_are_as_many_as_are_tried():
    form = formats()[0]
    chosen, *others = splits.candidates(SHAPE, form)
    assert others and chosen not in others
    for n in (chosen, others[-1]):
        run = splits.program(SHAPE, form, n)
        q = jax.ShapeDtypeStruct((SHAPE.batch, SHAPE.num_heads, SHAPE.head_dim), jnp.bfloat16)
        caches = jax.eval_shape(lambda key: coded_caches(key, SHAPE, form, 1), jax.random.key(0))
        compiled = compile_for("h100", timing.chained(run, 2), q, caches)
        assert f"f32[2,8,{n},128,8]" in compiled.as_text()


@pytest.mark.parametrize("variant", end_to_end.variants(cuda=True)[:3], ids=str)
@pytest.mark.parametrize("name", ["llama-3-8b", "opt-6.7b"])
def test_decoders_attend_by_what_is_said(name, variant):
    compiled, cache = launches.decoder(name, variant, num_layers=2)
    assert calls(compiled, *CALLS.get(variant.implementation, CALLS["jax.nn cudnn"])) == 2
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    # Encoding 128 tokens of every sequence takes some, however long they are.
    assert memory.temp_size_in_bytes < cache.nbytes / 10


@pytest.mark.parametrize("implementation, scheme", append.ROWS)
def test_appends_write_in_place_by_what_is_said(implementation, scheme):
    setting = end_to_end.settings()[0]
    new = functools.partial(append.new_layer, setting, implementation, scheme, 2, 4)
    compiled = compile_for("h100", append.loop(implementation, 4), *jax.eval_shape(new))
    kernels = 2 if implementation == append.BY_KERNEL else 0
    assert calls(compiled, TRITON, "append_token") == kernels
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


def test_launches_are_as_recorded():
    """In benchmarks/RESULTS.md; other compilers may make one more or less of ours."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    table = text[text.index("| launches per token |") :].split("\n\n")[0]
    recorded = [float(n) for n in re.findall(r"\| ([\d.]+) \|$", table, flags=re.MULTILINE)]
    found = [launches.of_append(*row) for row in append.ROWS[1:]]
    variants = launches.variants()
    found += [*map(launches.of_layer, variants), launches.of_flush(variants[1])]
    found.append(launches.of_plain_step(end_to_end.PUBLISHED))
    assert len(found) == len(recorded) and np.abs(np.subtract(found, recorded)).max() <= 1
