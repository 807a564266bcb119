"""The kernel that appends a token, as it was compiled, executed on the CPU: the bits are XLA's.

    python tests/aot/execute_append.py [GPU] [CASE ...]

For one of `targets.GPUS` (h100). Every instruction, of every thread (see `ptx`), with the first
warp ahead and with the last. Divisions are rounded once here, as on the CPU to which this is
compared; on a GPU, XLA and the kernel divide by the same instruction, which may be off by two units
in the last place.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dump  # first: see there
import jax
import jax.numpy as jnp
import numpy as np
from append_token_cases import CASES, KEEP, TOKEN, body, expected, tokens
from execute import TARGET, aligned, chosen, finish, started
from ptx import machine
from ptx.memory import Global

from nqkv_jax.pallas_kernels.append_token import append_token


def compiled(case):
    """The kernel, and how it is started but for its parameters."""

    def append(words, scale, zero, x, token, keep):
        return append_token(words, scale, zero, x, token, keep, **case.options)

    before = body(case)
    arguments = before.words, before.scale, before.zero, tokens(case)
    arguments += jnp.asarray(TOKEN, jnp.int32), jnp.asarray(KEEP)
    return dump.triton_kernel(
        TARGET, "append_token", jax.vmap(append), *arguments, donated=(0, 1, 2)
    )


def executed(case, schedule, program, options):
    """The body of every sequence after it, from `body`."""
    before = body(case)
    places = np.where(KEEP, np.asarray(TOKEN, np.int32), np.int32(-1))
    inputs = [aligned(a) for a in (places, np.asarray(tokens(case)))]
    state = [aligned(np.asarray(a)) for a in jax.tree.leaves(before)]  # read and written
    launch = started(options, inputs + state + state)
    machine.run(program, launch, Global(inputs + state), schedule)
    return jax.tree.unflatten(jax.tree.structure(before), state)


def check(case) -> None:
    """
    Raises: AssertionError if a bit differs from XLA's.
    """
    program, options = compiled(case)
    order = tuple(range(options["threads"] // 32))
    for warps in {order, order[::-1]}:
        found = executed(case, machine.Schedule(warps=warps), program, options)
        for name, a in vars(expected(case, body(case), tokens(case))).items():
            if a is not None:
                a, b = (np.asarray(x).view(np.uint8) for x in (a, getattr(found, name)))
                np.testing.assert_array_equal(a, b, err_msg=name)


def main() -> None:
    planned = [(name, functools.partial(check, CASES[name])) for name in chosen(CASES)]
    finish(planned, "to the bit as XLA has them")


if __name__ == "__main__":
    main()
