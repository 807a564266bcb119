"""The model of a multiprocessor, on loops whose time is known."""

import functools
import itertools

import pytest
import sass

NONE = 7  # no counter


def line(text, stall=1, done=NONE, read=NONE, waits=()):
    """As `nvdisasm -hex` prints an instruction."""
    mask = sum(1 << n for n in waits)
    control = stall << 41 | 1 << 45 | done << 46 | read << 49 | mask << 52
    return [
        f"        /*0000*/                   {text} ;     /* 0x{0:016x} */",
        f"                                                /* 0x{control:016x} */",
    ]


def listing(*body, parts, ahead=()):
    """A loop over units around one over parts, which is the body, after what is done `ahead`."""
    lines = ["        .text.kernel:", *line("MOV R1, R2"), ".L_unit:"]
    lines += line("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", done=0)
    lines += line("@!P0 BRA `(.L_spin)", waits=(0,))
    lines += [*ahead, ".L_part:", *itertools.chain(*body)]
    if parts > 1:
        lines += line("@P1 BRA `(.L_part)")
    lines += line("@UP0 UTMALDG.5D [UR8], [UR6]")
    lines += line("@P2 BRA `(.L_unit)")
    # A warp that waits goes round behind the end, and back.
    lines += [*line("EXIT"), ".L_spin:", *line("BRA `(.L_part)")]
    return "\n".join(lines)


PRODUCT = line("HMMA.16816.F32 R4, R8, R12, R4")


def time(*body, programs=1, parts=1, **options):
    unit = sass.unit(listing(*body, parts=parts, ahead=options.pop("ahead", ())), parts)
    return sass.cycles(unit, programs, options.pop("unit_bytes", 0), options.pop("stages", 2))


def test_fields_of_the_control_word():
    (instruction,), _ = sass.parse(
        "\n".join(line("@P0 LDS.128 R4, [R5]", stall=4, done=2, read=5, waits=(1, 3)))
    )
    assert instruction.text == "@P0 LDS.128 R4, [R5]"
    assert (instruction.opcode, instruction.name) == ("LDS.128", "LDS")
    assert (instruction.stall, instruction.done, instruction.read) == (4, 2, 5)
    assert instruction.waits == (1, 3)
    assert sass.H100.pipe(instruction) == ("memory", 16, 28)


def test_a_unit_repeats_its_parts_and_leaves_out_what_hardly_runs():
    unit = sass.unit(listing(PRODUCT, line("FADD R1, R1, R2"), parts=3), parts=3)
    names = [i.name for i in unit]
    assert names == ["SYNCS", "BRA", *["HMMA", "FADD", "BRA"] * 3, "UTMALDG", "BRA"]


def test_a_listing_without_products_is_refused():
    with pytest.raises(ValueError, match="expected a loop with products"):
        sass.unit(listing(line("FADD R1, R1, R2"), parts=2), parts=2)
    with pytest.raises(ValueError, match="copies units and waits"):
        sass.cycles(sass.parse("\n".join(PRODUCT))[0], 1, 0, 2)


def test_an_unknown_instruction_is_refused():
    with pytest.raises(NotImplementedError, match="FROB"):
        time(PRODUCT, line("FROB R1, R2"))


@pytest.mark.parametrize("programs", [1, 2, 4])
def test_a_scheduler_takes_one_instruction_in_a_cycle(programs):
    found = time(PRODUCT, *[line("FFMA R1, R1, R2, R3")] * 400, programs=programs)
    assert found / programs == pytest.approx(400, rel=0.15)


def test_integers_take_half_the_lanes():
    float_pipe = time(PRODUCT, *[line("FFMA R1, R1, R2, R3")] * 400, programs=2)
    integer_pipe = time(PRODUCT, *[line("LOP3.LUT R1, R1, R2, R3")] * 400, programs=2)
    assert integer_pipe / float_pipe == pytest.approx(2, rel=0.05)


def test_other_warps_go_on_while_one_stalls():
    body = [PRODUCT, *[line("FFMA R1, R1, R2, R3", stall=4)] * 100]
    one, four = time(*body), time(*body, programs=4)
    assert one == pytest.approx(400, rel=0.15)
    assert four == pytest.approx(one, rel=0.15)  # for four times as much


def test_counters_are_waited_for():
    chain = [line("LDS R1, [R2]", done=1), line("FADD R2, R1, R1", waits=(1,))]
    found = time(PRODUCT, *chain * 50)
    assert found == pytest.approx(50 * (4 + 28 + 1), rel=0.1)
    apart = [line("LDS R1, [R2]", done=1), line("FADD R2, R3, R3")]
    assert time(PRODUCT, *apart * 50) < found / 4


def test_memory_is_waited_for_where_it_takes_longer():
    body = [PRODUCT, *[line("FFMA R1, R1, R2, R3")] * 100]
    size = 40_000
    memory = sass.H100.memory_cycles(size)
    assert memory > 2_000
    assert time(*body, programs=3, unit_bytes=size) / 3 == pytest.approx(memory, rel=0.02)
    # With room for one unit, nothing is on its way while one is decoded; another program's is.
    alone = time(*body, programs=1, unit_bytes=size, stages=1)
    assert alone > memory + sass.MEMORY_LATENCY


def test_what_is_asked_for_ahead_comes_from_near():
    body = [PRODUCT, *[line("FFMA R1, R1, R2, R3")] * 3000]
    size = 40_000
    near = size / sass.L2_BYTES + sass.L2_LATENCY
    assert near < sass.H100.memory_cycles(size) + sass.MEMORY_LATENCY < 3000 + near
    run = functools.partial(time, *body, unit_bytes=size, stages=1)
    assert run(ahead=line("UTMAPF.L2.5D [UR8], [UR6]")) == pytest.approx(3000 + near, rel=0.02)
    memory = sass.H100.memory_cycles(size) + sass.MEMORY_LATENCY
    assert run() == pytest.approx(3000 + memory, rel=0.02)
