"""The executor of a GPU's instructions, which `tests/aot/execute.py` runs kernels in."""

import itertools
import struct

import numpy as np
import pytest
from ptx import arithmetic, tensor_core
from ptx.machine import Launch, Schedule, run
from ptx.memory import Global, TensorMap, conflicts
from ptx.program import parse

SCHEDULES = [
    Schedule(warps=warps, late=late)
    for warps, late in itertools.product(((0, 1, 2, 3), (3, 2, 1, 0)), (False, True))
]
# %rd0, %rd1: the two arrays; %r0: the thread; %r1: its lane; %rd3: 4 bytes for each in the second.
# %p0: of one thread.
BEGIN = """
.version 9.0
.visible .entry test_kernel(.param .u64 test_0, .param .u64 test_1, .param .b8 test_2[128])
{
  .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
  .shared .align 16 .b8 __dynamic_shmem__0;
  ld.param.b64 %rd0, [test_0];
  ld.param.b64 %rd1, [test_1];
  mov.b64 %rd2, test_2;
  mov.u32 %r0, %tid.x;
  and.b32 %r1, %r0, 31;
  mul.wide.u32 %rd3, %r0, 4;
  add.s64 %rd4, %rd0, %rd3;
  add.s64 %rd3, %rd1, %rd3;
  setp.eq.u32 %p0, %r0, 0;
  mov.b64 %rd5, __dynamic_shmem__0;
  cvt.u32.u64 %r2, %rd5;
"""


def execute(body, source, result, schedule=SCHEDULES[0], tensor=None):
    """Runs it in one block of four warps; returns `result`, a copy that was written to."""
    program = parse(BEGIN + body + "\n  ret;\n}")
    source, result = np.ascontiguousarray(source), np.ascontiguousarray(result).copy()
    pointers = [struct.pack("<Q", a.ctypes.data) for a in (source, result)]
    maps = {} if tensor is None else {0: TensorMap(source.ctypes.data, *tensor)}
    launch = Launch((1, 1, 1), 128, 8192, (*pointers, bytes(128)), maps)
    run(program, launch, Global([source, result]), schedule)
    return result


NUMBERS = np.arange(128, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(7)
OTHER = np.uint32(0x12345678)
as_signed = lambda a: a.view(np.int32)
as_halves = lambda a: np.asarray(a, np.uint32).reshape(-1).view(np.float16)


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("add.s32 %r4, %r3, %r5", lambda a: a + OTHER),
        ("sub.s32 %r4, %r3, %r5", lambda a: a - OTHER),
        ("mul.lo.s32 %r4, %r3, %r5", lambda a: a * OTHER),
        ("mul.hi.u32 %r4, %r3, %r5", lambda a: a.astype(np.uint64) * OTHER >> 32),
        ("min.s32 %r4, %r3, -5", lambda a: np.minimum(as_signed(a), -5).view(np.uint32)),
        ("shr.s32 %r4, %r3, 9", lambda a: (as_signed(a) >> 9).view(np.uint32)),
        ("shr.u32 %r4, %r3, 32", np.zeros_like),
        ("shr.s32 %r4, %r3, 40", lambda a: (as_signed(a) >> 31).view(np.uint32)),
        ("shl.b32 %r4, %r3, 33", np.zeros_like),
        ("shf.r.wrap.b32 %r4, %r3, %r3, 37", lambda a: a >> 5 | a << 27),
        ("shf.l.wrap.b32 %r4, %r3, %r3, 37", lambda a: a << 5 | a >> 27),
        ("shf.l.wrap.b32 %r4, %r5, %r3, 32", lambda a: a),
        ("xor.b32 %r4, %r3, %r5", lambda a: a ^ OTHER),
        ("bfe.u32 %r4, %r3, 7, 12", lambda a: a >> 7 & 0xFFF),
        ("bfe.s32 %r4, %r3, 7, 12",
         lambda a: (as_signed(a >> 7 & 0xFFF) << 20 >> 20).view(np.uint32)),
        ("shfl.sync.bfly.b32 %r4, %r3, 4, 31, -1", lambda a: a[np.arange(128) ^ 4]),
        ("shfl.sync.idx.b32 %r4, %r3, 3, 31, -1", lambda a: a[np.arange(128) // 32 * 32 + 3]),
        ("cvt.rn.f32.s32 %r4, %r3", lambda a: as_signed(a).astype(np.float32).view(np.uint32)),
        ("and.b32 %r3, %r3, 0x3BFF3BFF; add.f16x2 %r4, %r3, %r5", lambda a: (
            as_halves(a & 0x3BFF3BFF) + np.tile(as_halves(OTHER), 128)
        ).view(np.uint32)),
        ("redux.sync.min.s32 %r4, %r3, -1", lambda a: (
            as_signed(a).reshape(4, 32).min(1).repeat(32).view(np.uint32)
        )),
        ("redux.sync.max.f32 %r4, %r3, -1", lambda a: (
            np.fmax.reduce(a.view(np.float32).reshape(4, 32), 1).repeat(32).view(np.uint32)
        )),
        ("redux.sync.max.NaN.f32 %r4, %r3, -1", lambda a: (
            np.maximum.reduce(a.view(np.float32).reshape(4, 32), 1).repeat(32).view(np.uint32)
        )),
        ("cvt.u16.u32 %rs1, %r3; setp.num.bf16 %p1, %rs1, %rs1; selp.b32 %r4, 5, %r3, %p1",
         lambda a: np.where((a & 0x7FFF) > 0x7F80, a, 5)),
        ("setp.leu.f32 %p1, %r3, 0f3F800000; selp.b32 %r4, 5, %r3, %p1",
         lambda a: np.where(a.view(np.float32) > 1, a, 5)),
        ("cvt.sat.f32.f32 %r4, %r3", lambda a: np.clip(
            np.nan_to_num(a.view(np.float32)), 0, 1
        ).view(np.uint32)),
        ("fma.rm.f32 %r4, 0fBF800001, 0f3F800001, 0fC0000000",  # -3 - 2^-22 - 2^-46
         lambda a: np.full(128, np.float32(-3 - 2**-21)).view(np.uint32)),
        ("max.NaN.f32 %r4, 0f3F800000, 0f40400000, 0f40000000",
         lambda a: np.full(128, np.float32(3)).view(np.uint32)),
        ("min.f32 %r4, 0f40400000, 0f40000000, 0f3F800000",
         lambda a: np.full(128, np.float32(1)).view(np.uint32)),
        ("mov.b64 %rd6, {%r5, %r3}; add.f32x2 %rd7, %rd6, %rd6; mov.b64 {%r6, %r4}, %rd7",
         lambda a: (a.view(np.float32) * 2).view(np.uint32)),
        ("abs.f32 %r4, %r3", lambda a: a & 0x7FFFFFFF),
        ("prmt.b32 %r4, %r3, %r5, 0x7250",
         lambda a: a & 0xFF | 0x5600 | (a & 0xFF0000) | 0x12000000),
        ("@%p0 mov.b32 %r4, %r3", lambda a: np.where(np.arange(128) == 0, a, 1)),
        ("setp.lt.s32 %p1, %r3, 0; selp.b32 %r4, 5, %r3, %p1",
         lambda a: np.where(as_signed(a) < 0, 5, a)),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)  # fmt: skip
def test_instructions_of_a_thread(instruction, expected):
    body = f"""
      ld.global.b32 %r3, [%rd4];
      mov.b32 %r5, 0x12345678;
      mov.b32 %r4, 1;
      {instruction};
      st.global.b32 [%rd3], %r4;
    """
    result = execute(body, NUMBERS, np.zeros(128, np.uint32))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result, expected(NUMBERS).astype(np.uint32))


def test_a_fused_product_is_rounded_once():
    a, b, c = (np.full(32, x, np.float32) for x in (1 + 2**-12, 1 + 2**-12, -1))
    exact = np.float32(2**-11 + 2**-24)
    assert (arithmetic.FUNCTIONS["fma"](a, b, c) == exact).all() and a[0] * b[0] + c[0] != exact


@pytest.mark.parametrize(
    "between, last, expected",
    [
        ("", "sub.f32 %f3, %f2, %f1", 1),
        ("", "sub.f32 %f3, %f1, %f2", -1),
        ("neg.f32 %f4, %f1;", "add.f32 %f3, %f4, %f2", 1),
        ("", "sub.rn.f32 %f3, %f2, %f1", 0),
        ("mov.b32 %f4, %f2;", "sub.f32 %f3, %f2, %f1", 0),  # something else takes it
        ("mov.b32 %f0, 0f3F800000;", "sub.f32 %f3, %f2, %f1", 1),  # of no matter to it
        ("mov.b32 %f5, 0f3F800000;", "sub.f32 %f3, %f2, %f1", 0),  # its factor is gone
        ("bra $L; $L:", "sub.f32 %f3, %f2, %f1", 0),  # in another block
    ],
)
def test_a_product_in_a_sum_is_not_rounded(between, last, expected):
    """As ptxas does: x * y - round(x * y) is what rounding left, in units of it."""
    x = np.float32(1 + 2**-12)
    unit = float(x) * float(x) - float(x * x)
    body = f"""
      mov.b32 %f0, 0f3F800800;
      mov.b32 %f5, %f0;
      mul.rn.f32 %f1, %f0, %f0;
      mul.f32 %f2, %f5, %f5;
      {between}
      {last};
      st.global.b32 [%rd3], %f3;
    """
    result = execute(body, NUMBERS, np.zeros(128, np.float32))
    np.testing.assert_array_equal(result, np.float32(unit * expected))


def test_nor_are_two_in_a_register():
    x = np.float32(1 + 2**-12)
    body = """
      mov.b32 %r4, 0f3F800800;
      mov.b64 %rd6, {%r4, %r4};
      mul.rn.f32x2 %rd7, %rd6, %rd6;
      mul.f32x2 %rd8, %rd6, %rd6;
      sub.f32x2 %rd6, %rd7, %rd8;
      mov.b64 {%r5, %r6}, %rd6;
      st.global.b32 [%rd3], %r6;
    """
    result = execute(body, NUMBERS, np.zeros(128, np.float32))
    np.testing.assert_array_equal(result, np.float32(float(x * x) - float(x) * float(x)))


def test_registers_that_are_wider_than_memory():
    body = """
      ld.global.b32 %rd6, [%rd4];
      shl.b64 %rd7, %rd6, 32;
      or.b64 %rd6, %rd6, %rd7;
      st.global.b32 [%rd3], %rd6;
    """
    found = execute(body, NUMBERS, np.zeros(128, np.uint32))
    np.testing.assert_array_equal(found, NUMBERS)


def test_threads_go_separate_ways_and_meet_again():
    body = """
      mov.b32 %r4, 0;
      $loop:
      add.s32 %r4, %r4, 1;
      setp.lt.u32 %p1, %r4, %r1;
      @%p1 bra $loop;
      shfl.sync.idx.b32 %r5, %r4, 31, 31, -1;
      add.s32 %r4, %r4, %r5;
      st.global.b32 [%rd3], %r4;
    """
    result = execute(body, NUMBERS, np.zeros(128, np.uint32))
    np.testing.assert_array_equal(result, 31 + np.maximum(np.arange(128) % 32, 1))


EXCHANGE = """
  ld.global.b32 %r3, [%rd4];
  shl.b32 %r5, %r0, 2;
  add.s32 %r6, %r2, %r5;
  st.shared.b32 [%r6], %r3;
  WAIT
  xor.b32 %r5, %r5, 384;
  add.s32 %r6, %r2, %r5;
  ld.shared.b32 %r4, [%r6];
  st.global.b32 [%rd3], %r4;
"""


def test_what_another_warp_wrote_takes_a_barrier():
    run = lambda wait, schedule: execute(EXCHANGE.replace("WAIT", wait), NUMBERS, NUMBERS, schedule)
    for schedule in SCHEDULES:
        expected = NUMBERS[np.arange(128) ^ 96]
        np.testing.assert_array_equal(run("bar.sync 1, 128;", schedule), expected)
        assert (run("", schedule) != expected).any()


MAP = (2, (64, 32), (32, 1), 64, (64, 32))  # of 64 x 32 of 16 bits, in rows of 64 bytes
COPY = """
  @%p0 mbarrier.init.shared::cta.b64 [%r2+4096], 1;
  bar.sync 0;
  @%p0 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2+4096], 4096;
  @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [%r2+TO], [%rd2, {0, 0}], [%r2+4096];
  WAIT
  shl.b32 %r5, %r0, 2;
  add.s32 %r6, %r2, %r5;
  ld.shared.b32 %r4, [%r6];
  st.global.b32 [%rd3], %r4;
"""
WAIT = """{ .reg .pred done;
  again: mbarrier.try_wait.parity.shared.b64 done, [%r2+4096], 0, 1;
  @done bra.uni over;
  bra.uni again;
  over: }"""
MATRIX = (np.arange(64 * 32) % 997).astype(np.float16).reshape(64, 32)


def test_a_copy_is_swizzled_and_takes_a_wait():
    run = lambda wait, schedule, to=0: execute(
        COPY.replace("WAIT", wait).replace("TO", str(to)),
        MATRIX,
        np.zeros(128, np.uint32),
        schedule,
        MAP,
    ).view(np.float16)
    # Chunks of 8 elements in rows of 4: that of the place c has the number c ^ (row // 2 % 4).
    row, chunk = np.arange(8)[:, None], np.arange(4)
    expected = MATRIX.reshape(64, 4, 8)[row, chunk ^ row // 2 % 4].reshape(-1)
    for schedule in SCHEDULES:
        np.testing.assert_array_equal(run(WAIT, schedule), expected)
    assert np.isnan(run("", Schedule(late=True))).all()
    with pytest.raises(IndexError, match="multiple of 128"):
        run(WAIT, SCHEDULES[0], to=64)


# Rows of 16 of the left operand in each warp; the right one is the 8 first rows of the copy.
PRODUCT = (
    COPY.split("WAIT")[0].replace("TO", "0")
    + WAIT
    + """
  mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
  mov.b32 %r20, 0x3C003C00;
  mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
  WRITE
  shr.u32 %r6, %r2, 4;
  cvt.u64.u32 %rd6, %r6;
  or.b64 %rd6, %rd6, DESCRIPTOR;
  wgmma.fence.sync.aligned;
  { .reg .pred p; setp.ne.b32 p, 1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10,%r11,%r12,%r13},
      {%r20,%r21,%r22,%r23}, %rd6, p, 1, 1, 0; }
  wgmma.commit_group.sync.aligned;
  AFTER
  wgmma.wait_group.sync.aligned 0;
  st.global.b32 [%rd3], %r11;
"""
)
# Swizzled in 64 bytes, 512 bytes from eight rows to the next.
DESCRIPTOR = 2 << 62 | 512 // 16 << 32


def product(schedule, write="", after=""):
    """f32[128], of each thread the second register of the product."""
    body = PRODUCT.replace("DESCRIPTOR", str(DESCRIPTOR))
    body = body.replace("WRITE", write).replace("AFTER", after)
    return execute(body, MATRIX, np.zeros(128, np.float32), schedule, MAP)


def test_a_product_of_the_tensor_core():
    for schedule in SCHEDULES:
        # With ones: the second register of a thread has column 2 (lane % 4) + 1.
        column = 2 * (np.arange(128) % 4) + 1
        expected = MATRIX[column, :16].astype(np.float32).sum(1)
        np.testing.assert_array_equal(product(schedule), expected)


@pytest.mark.parametrize(
    "part, text, error",
    [
        ("write", "st.shared.b32 [%r2], %r20;", "without a fence"),
        ("after", "mov.b32 %r20, 0;", "before a product was waited for"),
    ],
)
def test_what_a_product_must_wait_for(part, text, error):
    with pytest.raises(RuntimeError, match=error):
        product(Schedule(late=True), **{part: text})


@pytest.mark.parametrize("first", ["fence.proxy.async.shared::cta;", "bar.sync 1, 128;"])
def test_a_fence_lets_a_product_see_what_was_written(first):
    """By whoever wrote it, before a barrier; or after it, by whoever reads."""
    both = "fence.proxy.async.shared::cta; bar.sync 1, 128; fence.proxy.async.shared::cta;"
    write = "st.shared.b32 [%r2], %r20;" + both[both.index(first) :]
    assert np.isfinite(product(Schedule(late=True), write=write)).all()


# Each thread copies its own four bytes, and reads those of another warp.
LATER = """
  shl.b32 %r5, %r0, 2;
  add.s32 %r6, %r2, %r5;
  setp.eq.u32 %p1, %r0, 9;
  cp.async.ca.shared.global [%r6+0], [%rd4+0], 0x4, %p1;
  cp.async.commit_group;
  cp.async.ca.shared.global [%r6+1024], [%rd4+0], 0x4, %p1;
  cp.async.commit_group;
  cp.async.wait_group GROUPS;
  bar.sync 0;
  xor.b32 %r5, %r5, 384;
  add.s32 %r6, %r2, %r5;
  ld.shared.b32 %r4, [%r6+1024];
  ld.shared.b32 %r5, [%r6];
  sub.s32 %r4, %r4, %r5;
  st.global.b32 [%rd3], %r4;
"""


def test_copies_of_threads_are_there_when_their_group_was_waited_for():
    run = lambda groups, schedule: execute(
        LATER.replace("GROUPS", groups), NUMBERS, np.ones(128, np.uint32), schedule
    )
    for schedule in SCHEDULES:
        assert not run("0", schedule).any()
    source = NUMBERS[np.arange(128) ^ 96]
    source[9 ^ 96] = 0  # where the source is ignored
    late = run("1", Schedule(late=True))  # of the second group there is nothing but ones
    np.testing.assert_array_equal(late, ~np.uint32(0) - source)


def test_a_copy_of_some_threads():
    """All of 16 bytes, by those that a predicate has; the others' stay as they were."""
    body = """
      shl.b32 %r5, %r0, 4;
      add.s32 %r6, %r2, %r5;
      mov.b32 %r7, 5;
      st.shared.b32 [%r6], %r7;
      setp.lt.u32 %p1, %r0, 24;
      cvt.u64.u32 %rd6, %r5;
      add.s64 %rd6, %rd0, %rd6;
      @%p1 cp.async.cg.shared.global [%r6], [%rd6], 16;
      cp.async.commit_group;
      cp.async.wait_group 0;
      ld.shared.b32 %r4, [%r6];
      st.global.b32 [%rd3], %r4;
    """
    for schedule in SCHEDULES:
        found = execute(body, NUMBERS, np.zeros(128, np.uint32), schedule)
        np.testing.assert_array_equal(found[:24], NUMBERS[: 4 * 24 : 4])
        np.testing.assert_array_equal(found[24:], 5)


def test_a_matrix_in_registers_is_transposed():
    body = """
      ld.global.b32 %r4, [%rd4];
      movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r4;
      st.global.b32 [%rd3], %r5;
    """
    halves = np.arange(256, dtype=np.uint16)
    found = execute(body, halves.view(np.uint32), np.zeros(128, np.uint32))
    expected = np.swapaxes(halves.reshape(4, 8, 8), 1, 2)  # of each warp
    np.testing.assert_array_equal(found.view(np.uint16).reshape(4, 8, 8), expected)


def test_a_product_of_registers():
    """Of 16 ones in each row, and numbers in bfloat16 that are the lane's."""
    body = """
      cvt.rn.f32.s32 %r5, %r1;
      cvt.rn.bf16x2.f32 %r6, %r5, %r5;
      mov.b32 %r7, 0x3F803F80;
      mov.b32 %r8, 0;
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10,%r11,%r12,%r13},
        {%r7,%r7,%r7,%r7}, {%r6,%r6}, {%r8,%r8,%r8,%r8};
      st.global.b32 [%rd3], %r11;
    """
    # A column's lanes are four that follow each other, each with four of its elements.
    column = 2 * (np.arange(128) % 4) + 1
    expected = 4 * (4 * column[:, None] + np.arange(4)).sum(1)
    found = execute(body, NUMBERS, np.zeros(128, np.float32))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "body, error, match",
    [
        ("add.s64 %rd3, %rd3, 4; st.global.b32 [%rd3], %r0;", IndexError, "no buffer has"),
        ("add.s64 %rd3, %rd3, 2; st.global.b32 [%rd3], %r0;", IndexError, "multiples of 4"),
        ("st.shared.b32 [%r2+9000], %r0;", IndexError, "shared memory"),
        ("add.s64 %rd3, %rd3, 4; prefetch.global.L2 [%rd3];", IndexError, "no buffer has"),
        ("st.global.b32 [%rd3], %r77;", KeyError, "%r77 is read before"),
        ("@%p0 bar.sync 0;", RuntimeError, "threads of a warp are missing"),
        ("@%p0 mbarrier.init.shared::cta.b64 [%r2+4096], 1; bar.sync 0;" + WAIT, RuntimeError,
         "nothing goes on"),
        ("vote.sync.any.pred %p1, %p0, -1;", NotImplementedError, "vote.sync"),
        ("add.rz.f32 %r4, %r0, %r0;", NotImplementedError, "add with"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_do_is_an_error(body, error, match):
    with pytest.raises(error, match=match):
        execute(body, NUMBERS, NUMBERS)


@pytest.mark.parametrize(
    "change",
    [
        dict(address=8), dict(strides=(36, 1)), dict(strides=(64, 2)), dict(box=(257, 32)),
        dict(box=(64, 4)), dict(swizzle=32), dict(sizes=(1,) * 6, strides=(8,) * 5 + (1,)),
    ],
    ids=str,
)  # fmt: skip
def test_descriptors_that_the_driver_refuses(change):
    given = dict(address=0, item_bytes=2, sizes=(64, 32), strides=(32, 1), swizzle=64, box=(64, 32))
    TensorMap(**given)
    with pytest.raises(ValueError, match="no descriptor"):
        TensorMap(**given | change)


@pytest.mark.parametrize(
    "stride, size, count, cycles",
    [
        (0, 4, 32, 0), (2, 2, 32, 0), (4, 4, 32, 0), (8, 4, 32, 1), (32, 4, 32, 7),
        (128, 4, 32, 31), (132, 4, 32, 0), (8, 8, 32, 0), (16, 8, 32, 2), (16, 16, 32, 0),
        (32, 16, 32, 4), (256, 16, 8, 7), (144, 16, 8, 0),
    ],
)  # fmt: skip
def test_conflicts_in_shared_memory(stride, size, count, cycles):
    assert conflicts(stride * np.arange(count), size) == cycles


def test_a_module_has_one_kernel():
    with pytest.raises(ValueError, match="expected one kernel; got 0"):
        parse(".version 9.0")


def test_a_tensor_core_cuts_off_what_it_adds():
    a, b = np.zeros((2, 1, 16), np.float16)
    a[0, :3], b[0, :3] = (1, -1, 2.0**-10), (1, 1, 1)
    assert tensor_core.multiply_add(a, b, None) == 2.0**-10  # exact: 14 bits below the largest
    coarse = tensor_core.multiply_add(a, b, np.float32([[2.0**14]]))
    assert coarse == 2.0**14  # nothing of it is left beside a larger sum
    assert tensor_core.multiply_add(a, b, np.float32([[2.0**13]])) == 2.0**13 + 2.0**-10
    negative = tensor_core.multiply_add(-a, b, np.float32([[2.0**13 + 2.0**-10]]))
    assert negative == 2.0**13


def test_a_tensor_core_is_right_within_its_bits():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 16)).astype(np.float16)
    sums = rng.normal(size=(64, 64)).astype(np.float32)
    exact = a.astype(np.float64) @ b.T.astype(np.float64) + sums
    found = tensor_core.multiply_add(a, b, sums)
    np.testing.assert_allclose(found, exact, rtol=0, atol=17 * 2.0**-20)
