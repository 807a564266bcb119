"""Attention of one token over caches of many shapes: bfloat16, and codes, by every implementation.

Baselines and kernels are timed in one process and in turn, on the same queries. Baselines see a
cache that is full, without lengths or masks, which is the best case for them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpu import timing, torch_sdpa
from gpu.check import KERNEL, why_not
from gpu.journal import Unit, reason_of
from gpu.shapes import Format, Shape, bfloat16_caches, coded_caches, sides
from nqkv_jax.pallas_kernels.decode_attention import TiledCodes, decode_attention

BFLOAT16 = ("jax.nn xla", "jax.nn cudnn", "torch")
LOOP_SECONDS = 0.01  # of one run, about
DIFFERENCE = 1e-2  # of outputs in bfloat16, relative to the largest
MEMORY = 0.8  # of the device, that caches of one shape may take together


def abstract(shape: Shape, form: Format) -> tuple[TiledCodes, TiledCodes]:
    """Shapes of keys and values."""
    make = lambda key: coded_caches(key, shape, form, 1)[0]
    return sides(jax.eval_shape(make, jax.random.key(0)), form)


def attend(q, cache, form: Format, shape: Shape, attention: Callable):
    """Like `dot_product_attention`, from codes: q and the result are [B, Hq, D].

    Args:  attention: (q, key, value, lengths) -> what `decode_attention` returns.
    """
    key, value = sides(cache, form)
    lengths = jnp.full(shape.batch, shape.context, jnp.int32)
    grouped = q.reshape(shape.batch, shape.num_kv_heads, shape.group, shape.head_dim)
    scale = jnp.asarray(shape.head_dim**-0.5 / np.nanmax(key.codebook.levels), q.dtype)
    grouped = grouped * scale
    if key.waves is not None:
        grouped = jnp.concatenate([grouped, grouped], axis=-1)  # what meets them
    numerator, denominator, _ = attention(grouped, key, value, lengths)
    return (numerator / denominator[..., None]).reshape(q.shape)


def by_codes(row: "Row", shape: Shape) -> Callable:
    """(q, cache) -> the result, of a row of codes."""
    attention = functools.partial(decode_attention, implementation=row.implementation)
    return functools.partial(attend, form=row.form, shape=shape, attention=attention)


def _dense(q, cache, implementation: str):
    k, v = (jnp.moveaxis(a, 3, 1) for a in cache) if implementation == "xla" else cache
    with jax.numpy_dtype_promotion("standard"):  # which jax.nn counts on
        return jax.nn.dot_product_attention(q[:, None], k, v, implementation=implementation)[:, 0]


def _compile(jitted, *arguments):
    return jitted.lower(*arguments).compile()


@dataclasses.dataclass
class Row:
    """One implementation at one shape: its fields, and how it is run once it could be made."""

    implementation: str
    form: Format
    copies: int
    steps: int
    skipped: str | None = None  # why it is not run
    failure: str | None = None
    seconds: Callable[[], float] | None = None
    out: np.ndarray | None = None

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.form.name}"

    @property
    def store(self) -> str:
        """Rows of one store share their arrays."""
        # XLA moves tokens last before it multiplies. As this could be done once for all tokens, it
        # is done beforehand.
        tokens_last = self.implementation == "jax.nn xla"
        shared = f", scales of {self.form.shared}" if self.form.shared else ""
        return f"{self.form.bits} bits" + shared + ", tokens last" * tokens_last


def rows_of(shape: Shape, wanted: Sequence[Format], most_copies: int) -> list[Row]:
    """bfloat16; the codes' formats by the kernel, and the first of each width in plain XLA."""

    def row(implementation, form, slow=False):
        nbytes = form.nbytes(shape)
        copies = timing.copies_for(nbytes, most_copies)
        launch = nbytes / 1e12 + 1e-5
        steps = int(min(max(LOOP_SECONDS / launch / copies, 1), 64))
        return Row(implementation, form, copies, 1 if slow else steps)

    found = [row(name, Format()) for name in BFLOAT16]
    plain = set()
    for form in wanted:
        if form.bits not in plain:
            plain.add(form.bits)
            found.append(row("xla", form, slow=True))
        found.append(row(KERNEL, form))
    return found


class Measurement:
    """All rows of one shape.

    Args:
      no_torch: why torch is left out, or None.
      room: bytes that the caches may take.
      note, fatal: see `Unit`.
    """

    def __init__(self, shape, rows, *, repeats, no_torch, room, note, fatal):
        self.shape, self.rows = shape, rows
        self._repeats, self._note = repeats, note
        for row in self.rows:
            row.failure = fatal.get(row.name)
        self._leave_out(no_torch, room)
        key = jax.random.key(0)
        q = jax.random.normal(key, (shape.batch, shape.num_heads, shape.head_dim), jnp.bfloat16)
        self.q = jax.block_until_ready(q)
        self._caches = {}
        for row in self._live:
            if row.store not in self._caches:
                self._caches[row.store] = jax.block_until_ready(self._new_caches(row))

    @property
    def _live(self) -> list[Row]:
        return [row for row in self.rows if row.skipped is None and row.failure is None]

    def _copies(self, row: Row) -> int:
        return max(other.copies for other in self.rows if other.store == row.store)

    def _new_caches(self, row: Row):
        key, copies = jax.random.key(row.form.bits), self._copies(row)
        if row.form.codebook is None:
            return bfloat16_caches(key, self.shape, copies, "tokens last" in row.store)
        return coded_caches(key, self.shape, row.form, copies)

    def _leave_out(self, no_torch: str | None, room: int) -> None:
        taken: dict[str, int] = {}
        cuda = jax.default_backend() == "gpu"
        for row in self._live:
            if row.implementation == "torch":
                row.skipped = no_torch
            elif row.implementation == "jax.nn cudnn" and not cuda:
                row.skipped = f"needs a GPU; this is {jax.default_backend()}"
            elif row.implementation == KERNEL:
                row.skipped = why_not(KERNEL, *abstract(self.shape, row.form), self.shape.group)
            if row.skipped is None and row.store not in taken:
                with_zeros = dataclasses.replace(row.form, zero=True)
                size = self._copies(row) * with_zeros.nbytes(self.shape)
                if sum(taken.values()) + size > room:
                    row.skipped = f"{size:,} bytes do not fit beside those of this shape's others"
                else:
                    taken[row.store] = size

    def _program(self, row: Row) -> tuple:
        if row.form.codebook is None:
            run = functools.partial(_dense, implementation=row.implementation.split()[1])
        else:
            run = by_codes(row, self.shape)
        return timing.chained(run, row.steps), self.q, self._caches[row.store][: row.copies]

    def prepare(self) -> None:
        """Compiles side by side, then runs everything once."""
        jitted = [row for row in self._live if row.implementation != "torch"]
        programs = {row.name: self._program(row) for row in jitted}
        compiled = timing.side_by_side(
            {name: functools.partial(_compile, *program) for name, program in programs.items()}
        )
        for row in self._live:
            self._note(row.name)
            try:
                if row.implementation == "torch":
                    caches = self._caches[row.store][: row.copies]
                    row.seconds = torch_sdpa.Program(self.q, caches, row.steps).seconds
                    row.seconds()
                    continue
                program = compiled[row.name]
                if isinstance(program, Exception):
                    raise program
                run = functools.partial(program, *programs[row.name][1:])
                _, out = jax.block_until_ready(run())
                row.out = np.asarray(out, np.float64)
                launches = row.steps * row.copies
                row.seconds = lambda run=run, n=launches: timing.seconds(run) / n
            except Exception as error:
                timing.examine(error)
                if row.implementation == KERNEL:
                    row.failure = reason_of(error)
                else:  # a baseline that this machine does not have
                    row.skipped = reason_of(error)

    def records(self, copy_bytes_per_s: float | None) -> list[dict]:
        self._note("timing")
        times = timing.in_turn({row.name: row.seconds for row in self._live}, self._repeats)
        best = min(
            (np.median(times[r.name]) for r in self._live if r.implementation in BFLOAT16),
            default=None,
        )
        return [self._record(row, times.get(row.name), best, copy_bytes_per_s) for row in self.rows]

    def _record(self, row: Row, times, best, copy_bytes_per_s) -> dict:
        record = fields(self.shape, row)
        if row.failure is not None:
            return record | dict(failure=row.failure)
        if times is None:
            return record | dict(skipped=row.skipped)
        record |= timing.summary(times)
        median = record["median_us"] / 1e6
        if copy_bytes_per_s is not None:
            record["copy_fraction"] = record["bytes_read"] / median / copy_bytes_per_s
        record["ratio_to_best_bf16"] = None if best is None else float(best / median)
        # The last cache of the loop, after the same queries but for the last bits.
        plain = [r for r in self.rows if r.name == f"xla {row.form.name}" and r.out is not None]
        if row.implementation == KERNEL and plain:
            difference = np.abs(row.out - plain[0].out).max() / np.abs(plain[0].out).max()
            record["difference_to_xla"] = float(difference)
            if not difference <= DIFFERENCE:
                record["failure"] = f"expected what XLA gives, within {DIFFERENCE}"
        return record


def fields(shape: Shape, row: Row) -> dict:
    """What a record says of a row whatever comes of it."""
    return dict(
        part="sweep", spec=shape.name, implementation=row.implementation, codebook=row.form.name,
        bits=row.form.bits, batch=shape.batch, context=shape.context, num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        bytes_read=row.form.nbytes(shape), footprint_bytes=row.copies * row.form.nbytes(shape),
        flops=4 * shape.elements * shape.group, median_us=None, spread=None, n=0,
        copy_fraction=None, ratio_to_best_bf16=None,
    )  # fmt: skip


def units(
    grid: Sequence[Shape], wanted: Sequence[Format], *, repeats: int, most_copies: int, room: int,
    no_torch: Callable[[], str | None], copy_bytes_per_s: Callable[[], float | None],
) -> list[Unit]:  # fmt: skip
    """One for each shape; see `Measurement`."""

    def unit(shape: Shape) -> Unit:
        def run(note, fatal) -> list[dict]:
            if "timing" in fatal:
                return failed(fatal["timing"])
            measured = Measurement(
                shape, rows_of(shape, wanted, most_copies), repeats=repeats, no_torch=no_torch(),
                room=room, note=note, fatal=fatal,
            )  # fmt: skip
            measured.prepare()
            return measured.records(copy_bytes_per_s())

        def failed(reason: str) -> list[dict]:
            rows = rows_of(shape, wanted, most_copies)
            return [fields(shape, row) | dict(failure=reason) for row in rows]

        return Unit(f"sweep/{shape.name}", run, failed)

    return [unit(shape) for shape in grid]
