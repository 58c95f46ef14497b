"""What nvcc makes of kernels, emulated: it computes as they do, and what it asks of memory is counted."""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks import kernel_traffic, kernel_trials, planted_kernels
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import compilers, ptx, ptx_as_cpp, ptx_emulator, sources, ways
from megatron_davinci.kernels.library import KernelError
from megatron_davinci.kernels.table import KERNELS, OPS, Kernel
from tests.cases import is_long

pytestmark = [pytest.mark.needs("emulator"), pytest.mark.needs("nvcc")]

CPU = torch.device("cpu")
ASKING = Kernel("asking", "asking.cu", 64, "ppll", ("fp32",))
ALWAYS = ("document_bounds",)  # that is compiled soonest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sources, with the kernel of asking.cu."""
    made = tmp_path_factory.mktemp("asking")
    for name, text in sources.files().items():
        (made / name).write_text(text)
    text = (planted_kernels.ROOT / "tests" / "kernels" / "asking.cu").read_text()
    (made / "asking.cu").write_text(text)
    return made


@pytest.fixture
def asking(folder):
    """Launches it: `asking(what, numbers)` returns as many as were given, and what was noted of memory."""
    with mock.patch.dict(ways.KERNELS, {"asking": ASKING}):
        way = kernel_traffic.Traced(partial(ptx_emulator.build, trace=True, where=folder, kernels=[ASKING]))

        def launch(what, numbers):
            out = torch.zeros_like(numbers)
            way.launch("asking", 1, out, numbers, out, numbers.numel(), what)
            return out, way.take()

        yield launch


@pytest.mark.parametrize(
    "op", [op if op in ALWAYS else pytest.param(op, marks=pytest.mark.long) for op in OPS]
)
@pytest.mark.parametrize(
    "emulator", ["ptx", *(pytest.param(f"ptx_{t}", marks=pytest.mark.long) for t in (80, 100))]
)
def test_what_nvcc_makes_is_right(op, emulator, monkeypatch):
    if (op, emulator) == ("quantize", "ptx_80"):
        pytest.skip("a function is called there, which the emulator of PTX does not know")
    draw = random.Random(random.SystemRandom().randrange(2**31) if is_long() else 1)
    with ways.emulating(emulator):
        for _ in range(100 if is_long() else 8):
            seed, order = draw.randrange(2**31), draw.randrange(2**31)
            monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(order))
            monkeypatch.setenv("DAVINCI_EMULATOR_APPROXIMATE", str(order))
            worst = kernel_trials.TRIALS[op](seed, CPU)
            assert worst.ratio <= 1, (seed, order, worst.what, worst.ratio)


def test_numbers_of_8_bits_are_those_of_torch(asking):
    random_bits = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int64).to(torch.int32)
    codes = torch.arange(256, dtype=torch.uint8)
    known = torch.cat([codes.view(form).float() for form in (torch.float8_e4m3fn, torch.float8_e5m2)])
    known = known[known.isfinite()].sort().values.unique()
    zeros = torch.tensor([0.0, -0.0, -1e-40, 1e-40])  # and what becomes of them
    ties = (known[1:] + known[:-1]) / 2  # and what lies beside them
    near = torch.cat([zeros, known, ties, ties.nextafter(known[1:]), ties.nextafter(known[:-1])])
    near = torch.nn.functional.pad(near, (0, -near.numel() % 4))
    for numbers in (random_bits.view(torch.float32), near):
        words = asking(7, numbers)[0].view(torch.int32).view(-1, 4)
        for column, form in enumerate((torch.float8_e4m3fn, torch.float8_e5m2)):
            top = torch.finfo(form).max
            expected = numbers.clamp(-top, top).to(form)
            found = words[:, column].contiguous().view(torch.uint8).flatten()
            same = torch.where(numbers.isnan(), found == 127, found == expected.view(torch.uint8))
            assert same.all(), numbers[~same][:5]
        found, expected = words[:, 2:].contiguous().view(torch.int16).flatten(), numbers.bfloat16()
        same = torch.where(numbers.isnan(), found == 0x7FFF, found == expected.view(torch.int16))
        assert same.all(), numbers[~same][:5]


def test_approximations_are_off_by_as_much_as_they_may_be_and_the_same_each_time(asking, monkeypatch):
    numbers = torch.linspace(-20, 20, 4096)
    numbers[0], numbers[1] = 0.0, -1e-40  # of which the power is 1
    rounded = numbers.double().exp2().float().view(torch.int32)
    found = {}
    for seed in (0, 1, 2):
        monkeypatch.setenv("DAVINCI_EMULATOR_APPROXIMATE", str(seed))
        found[seed] = asking(6, numbers)[0]
        assert torch.equal(found[seed], asking(6, numbers)[0])
    units = {seed: (its.view(torch.int32) - rounded).abs() for seed, its in found.items()}
    assert {seed: int(its.max()) for seed, its in units.items()} == {0: 0, 1: 2, 2: 2}
    assert all(its[:2].tolist() == [0, 0] for its in units.values()) and not torch.equal(found[1], found[2])


def test_an_address_that_the_hardware_refuses_is_refused(asking):
    with pytest.raises(KernelError, match=r"asking.cu:\d+: address [0-9a-f]+4 is no multiple of 16"):
        asking(5, torch.zeros(512))


def test_requests_are_counted(asking):
    def line(what):
        noted = asking(what, torch.zeros(512))[1]
        return noted, [did for (file, _), did in noted.lines.items() if file == "asking.cu"]

    noted, lines = line(0)
    assert sum(did.asked for did in lines) == 2 * 64 * 16 == 32 * sum(did.sectors for did in lines)
    assert sum(did.requests for did in lines) == 4 and (noted.read, noted.written) == (32, 32)
    noted, lines = line(1)  # sectors of 32 bytes for 4 each, and 4 bytes a lane side by side
    assert sum(did.sectors for did in lines) == 64 + 8 and (noted.read, noted.written) == (64, 8)
    for what, times in ((2, 1), (3, 32), (4, 1)):
        turns = [(did.turns, did.least_turns) for did in line(what)[1] if did.turns]
        assert sum(least for _, least in turns) == 3  # one warp wrote, two read
        assert sum(its for its, _ in turns) == 3 * times


def test_what_was_done_is_taken_once(asking):
    _, noted = asking(0, torch.zeros(512))
    assert noted.sum("instructions") > 0
    _, again = asking(0, torch.zeros(512))
    assert again.lines == noted.lines


@pytest.mark.long
def test_the_op_and_not_how_it_is_run_says_how_much_it_reads():
    found = kernel_traffic.measure(3, list(kernel_traffic.CASES))
    for name, (case, noted) in found.items():
        figures = kernel_traffic.figures_of(name, case, noted)
        assert 1 <= figures[f"{name}_memory"] < 1.05, name
        assert figures[f"{name}_bank_turns"] < 1.01, name
        few = "norm" in name or name == "quantize_both_ways"  # a row's, or a tile's
        least, most = (0, 0) if name.startswith("rope") else (1e-4, 0.1) if few else (1, 10)
        assert least <= figures[f"{name}_special"] <= most < figures[f"{name}_instructions"], name


@contextmanager
def _changed(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    try:
        yield
    finally:
        (folder / name).write_text(text)


def test_an_instruction_that_is_not_known_is_named(folder):
    with (
        _changed(folder, "asking.cu", "out[me] = in[8 * me];", "out[me] = __sinf(in[8 * me]);"),
        pytest.raises(EnvironmentProblem, match=r"found: +sin.approx.f32 %f\d+, %f\d+\n.*nvcc 13"),
    ):
        ptx_emulator.build("asking.cu", where=folder, kernels=[ASKING])
    with pytest.raises(EnvironmentProblem, match="a function that is called"):
        ptx.read(".func  (.param .b64 func_retval0) name")


@pytest.mark.parametrize(
    "line",
    [
        "bar.sync 1, 32;",
        "ld.param.u32 %r1, [asking_fp32_param_0+4];",
        "vote.sync.uni.pred %p1, %p1, -1;",
        "atom.global.cas.b32 %r1, [%rd1], %r1, %r1;",
        "atom.shared.add.u32 %r1, [%r1], %r1;",
        "atom.add.u32 %r1, [%rd1], %r1;",
        "mov.u32 %r1, %laneid;",
        "setp.eq.s32 %p1|%p1, %r1, %r1;",
        "selp.b32 %r1, %r1, %r1, !%p1;",
        "cp.async.ca.shared.global [%r1], [%rd1], 4;",
        "add.s32 %r1, %r1, %r1; add.s32 %r1, %r1, %r1;",
        "ld.local.u32 %r1, [%rd1];",
    ],
)
def test_a_form_of_an_instruction_that_is_not_known_is_named(line):
    registers = ".reg .pred %p<2>;\n.reg .b32 %r<2>;\n.reg .b64 %rd<2>;"
    text = (
        f".visible .entry asking_fp32(\n.param .u64 asking_fp32_param_0\n)\n{{\n{registers}\nLINE\nret;\n}}"
    )
    header = (sources.folder() / "ptx.h").read_text()
    right = text.replace("LINE", "add.s32 %r1, %r1, -1;")
    assert (
        "r1 = ptx::op_add<ptx::s32>(r1, (Bits)(-1ll));" in ptx_as_cpp.translate(right, [ASKING], header).text
    )
    with pytest.raises(EnvironmentProblem) as error:
        ptx_as_cpp.translate(text.replace("LINE", line), [ASKING], header)
    assert line.split()[0] in str(error.value)


def test_without_nvcc_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    with ways.emulating("ptx"), pytest.raises(EnvironmentProblem, match="there is no nvcc"):
        kernel_trials.TRIALS["swiglu"](1, CPU)


def test_an_emulator_that_there_is_not(monkeypatch):
    with ways.emulating("ptx_75"), pytest.raises(EnvironmentProblem, match=r"found: +ptx_75\n.*fused, ptx"):
        ways.way_for(CPU)


def test_all_kernels_are_of_sources_that_are_compiled_by_themselves():
    assert {kernel.source for kernel in KERNELS.values()} <= set(sources.files())
