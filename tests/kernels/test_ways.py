"""Which way ops run, and what is said where one cannot."""

from __future__ import annotations

import ctypes.util
import json
import re
from types import SimpleNamespace

import pytest
import torch

from megatron_davinci.cli import main as cli
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import compilers, nvrtc, sources, ways
from megatron_davinci.kernels.library import KernelError, Library
from megatron_davinci.kernels.table import KERNELS, OPS

CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    ways._way.cache_clear()
    yield
    ways._way.cache_clear()


def copied(tmp_path, **changes):
    """The sources in another folder, a text of a file exchanged for another."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, text in sources.files().items():
        for file, (old, new) in changes.items():
            if name == file.replace("__", "."):
                assert old in text
                text = text.replace(old, new)
        (folder / name).write_text(text)
    return folder


def test_plain_torch_is_the_way_on_a_cpu():
    way = ways.way_for(CPU)
    assert (way.name, way.why) == ("reference", "the platform is cpu") and not way.has_kernels


@pytest.mark.parametrize("name", ["ahead_of_time", "run_time"])
def test_what_cannot_be_taken_is_an_error_where_it_is_asked_for(monkeypatch, name):
    monkeypatch.setenv(ways.SWITCH, name)
    with pytest.raises(EnvironmentProblem, match="the device is a cpu"):
        ways.way_for(CPU)


def test_a_way_that_there_is_not(monkeypatch):
    monkeypatch.setenv(ways.SWITCH, "cuda")
    with pytest.raises(EnvironmentProblem, match=r"found: +cuda\n.*auto, ahead_of_time"):
        ways.way_for(CPU)


@pytest.mark.needs("emulator")
def test_the_emulator_is_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv(ways.SWITCH, "emulator")
    assert ways.way_for(CPU).name == "emulator"


class OnAGpu:
    """A machine with a GPU of some capability, as far as choosing goes."""

    def __init__(self, monkeypatch, capability=90, library=None, compiler=None):
        monkeypatch.setattr(ways.cuda_launch, "capability", lambda device: capability)
        monkeypatch.setattr(ways, "PACKAGED", library)
        monkeypatch.setattr(ways.nvrtc, "find_compiler", lambda: compiler)

    def way(self):
        return ways.way_for(torch.device("cuda", 0))


class Nvrtc:
    """A compiler for some targets."""

    def __init__(self, *targets):
        self.targets, self.version = lambda: list(targets), lambda: "13.0"


class TestOnAGpu:
    """What is chosen there; what it then computes is for a machine that has one (marker `gpu`)."""

    @pytest.mark.needs("emulator")
    def test_the_library_is_taken_first(self, fresh, monkeypatch):
        machine = OnAGpu(monkeypatch, library=compilers.emulator(), compiler=Nvrtc(90))
        assert machine.way().name == "ahead_of_time"

    def test_nvrtc_where_there_is_no_library(self, fresh, monkeypatch, tmp_path):
        machine = OnAGpu(monkeypatch, library=tmp_path / "none.so", compiler=Nvrtc(75, 90))
        assert (machine.way().name, machine.way().why) == ("run_time", "NVRTC 13.0")

    @pytest.mark.needs("emulator")
    def test_nvrtc_where_the_library_has_nothing_for_the_gpu(self, fresh, monkeypatch):
        machine = OnAGpu(monkeypatch, capability=75, library=compilers.emulator(), compiler=Nvrtc(75))
        assert machine.way().name == "run_time"

    def test_plain_torch_where_there_is_neither_and_all_reasons_are_said(self, fresh, monkeypatch, tmp_path):
        machine = OnAGpu(monkeypatch, library=tmp_path / "none.so")
        way = machine.way()
        assert way.name == "reference"
        assert re.search(r"nvcc was not there .*; NVRTC was not found", way.why)
        with pytest.raises(EnvironmentProblem, match=r"where: +backends.loss: davinci"):
            ways.require_kernels(torch.device("cuda", 0), "backends.loss: davinci")
        with ways.using("reference"):
            ways.require_kernels(torch.device("cuda", 0), "backends.loss: davinci")

    def test_plain_torch_where_the_gpu_is_too_old(self, fresh, monkeypatch, tmp_path):
        machine = OnAGpu(monkeypatch, capability=60, library=tmp_path / "none.so", compiler=Nvrtc(75, 90))
        assert "no code for compute capability 6.0" in machine.way().why

    @pytest.mark.needs("emulator")
    def test_a_library_of_other_sources_is_not_taken(self, fresh, monkeypatch):
        library = compilers.emulator()
        monkeypatch.setattr(sources, "digest", lambda where=None: "0" * 16)
        with pytest.raises(OSError, match="made from other sources"):
            Library(library)
        machine = OnAGpu(monkeypatch, library=library)
        assert "made from other sources" in machine.way().why


def test_another_library_is_none_of_ours():
    with pytest.raises(OSError, match="lacks a function"):
        Library(ctypes.util.find_library("c") or "libc.so.6")


ALL = sorted({kernel.source for kernel in KERNELS.values()})


@pytest.mark.needs("nvrtc")
@pytest.mark.parametrize(
    ("capability", "some"),
    [
        (200, ["adamw.cu", "quantize_gradient.cu"]),  # which include most headers
        (90, ["documents.cu"]),
        *(pytest.param(n, ALL, marks=pytest.mark.long) for n in (80, 90, 200)),
    ],
)
def test_nvrtc_makes_code_of_every_source_without_a_gpu(capability, some):
    compiler = nvrtc.find_compiler()
    for source in some:
        code = compiler.compile(source, capability)
        # A device that is newer than NVRTC gets PTX, which its driver compiles.
        assert code.startswith(b"//") if capability == 200 else code.startswith(b"\x7fELF")
        for kernel in KERNELS.values():
            if kernel.source == source:
                assert all(symbol.encode() in code for symbol in kernel.symbols)


@pytest.mark.needs("nvrtc")
def test_what_nvrtc_does_not_compile_is_said_with_its_words(tmp_path):
    folder = copied(tmp_path, cross_entropy__cu=("const Row row(", "const Rov row("))
    with pytest.raises(KernelError, match=r"cross_entropy.cu for --gpu-architecture=sm_90:\n(.|\n)*Rov"):
        nvrtc.find_compiler().compile("cross_entropy.cu", 90, folder)
    with pytest.raises(KernelError, match=r"no code for compute capability 5\.0"):
        nvrtc.find_compiler().compile("cross_entropy.cu", 50)


@pytest.mark.needs("nvcc")
def test_no_kernel_spills_registers():
    # One target here; benchmarks/kernels.py --compile-only has them all.
    found = compilers.ptxas(90, compilers.find_nvcc())
    assert {one.kernel for one in found} == {symbol for k in KERNELS.values() for symbol in k.symbols}
    assert {one.kernel: one.spills for one in found if one.spills or one.stack} == {}
    # All threads of a block find room on a multiprocessor.
    threads = {symbol: k.threads for k in KERNELS.values() for symbol in k.symbols}
    assert all(one.registers * threads[one.kernel] <= 65536 for one in found)


@pytest.mark.needs("nvcc")
@pytest.mark.long
def test_the_library_of_nvcc_is_refused_by_a_machine_without_a_driver_in_words(tmp_path):
    compilers.build_library(tmp_path / "cuda.so", compilers.find_nvcc())
    library = Library(tmp_path / "cuda.so")
    if not torch.cuda.is_available():
        kernel = OPS["cross_entropy"][0]
        with pytest.raises(KernelError, match="was not started: CUDA error"):
            library.launch(kernel, "fp32", 1, [0] * len(kernel.arguments), 0)


@pytest.mark.needs("emulator")
def test_sources_that_do_not_compile_leave_no_library(tmp_path):
    folder = copied(tmp_path, reduce__h=("struct Softmax", "strict Softmax"))
    out = tmp_path / "out" / "emulator.so"
    out.parent.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"do not compile(.|\n)*strict"):
        compilers.emulator(where=folder, out=out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.needs("emulator")
def test_an_emulator_without_a_place_is_said(monkeypatch, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    with pytest.raises(EnvironmentProblem, match=r"cannot be written.\n.*taken(.|\n)*XDG_CACHE_HOME"):
        compilers.emulator()
    with pytest.raises(EnvironmentProblem, match=r"cannot be written.\n.*none"):
        compilers.emulator(out=tmp_path / "none" / "emulator.so")


@pytest.mark.needs("emulator")
def test_an_emulator_that_is_no_library_is_said(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = compilers.cache() / f"emulator-{sources.digest()}-plain.so"
    made.write_text("of another machine")
    monkeypatch.setenv(ways.SWITCH, "emulator")
    with pytest.raises(EnvironmentProblem, match=rf"cannot be loaded.\n.*{made.name}(.|\n)*delete it"):
        ways.way_for(CPU)


class TestDoctor:
    def test_says_the_way_of_every_op_and_why(self, capsys):
        assert cli.main(["doctor", "--kernels"]) == 0
        said = capsys.readouterr().out
        for op, kernels in OPS.items():
            dtypes = ", ".join(kernels[0].suffixes)
            assert re.search(rf"^cpu +{op} +reference +{dtypes} +the platform is cpu", said, re.MULTILINE)
        assert "NVRTC" in said and sources.digest() in said

    def test_as_json_and_what_was_asked_for_and_cannot_be(self, capsys, monkeypatch):
        monkeypatch.setenv(ways.SWITCH, "run_time")
        assert cli.main(["doctor", "--kernels", "--json"]) == 2
        found = json.loads(capsys.readouterr().out)
        assert {op["op"] for op in found["ops"]} == set(OPS)
        (on_cpu,) = [op for op in found["ops"] if op["device"] == "cpu" and op["op"] == "cross_entropy"]
        assert on_cpu["way"] == "" and "the device is a cpu" in on_cpu["why"]

    @pytest.mark.parametrize("arguments", [[], ["run", "--kernels"]])
    def test_looks_at_one_of_two(self, arguments, capsys):
        assert cli.main(["doctor", *arguments]) == 2
        assert "one of them." in capsys.readouterr().err


def test_a_run_says_which_way_its_kernels_run():
    from megatron_davinci.config import validate
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.introduction import introduction
    from tests.config import small

    config = validate(small.settings(backends={"loss": "davinci"}), "test")
    schedule = SimpleNamespace(total_samples=1, total_steps=1, cut_rates=list)
    order = SimpleNamespace(schedule=schedule, journal=SimpleNamespace(skips=[]))
    lines = list(introduction(config, choose("cpu", threads=1), "one rank", order, (0, 0, 1), None, []))
    assert any(line.startswith("Backends: ") and "loss: davinci (asked for)" in line for line in lines)
    assert "Kernels: reference (the platform is cpu)" in lines


@pytest.mark.parametrize(
    ("name", "work", "started"),
    [
        ("quantize_tensor", 10_000, 10_000),
        ("cross_entropy_whole", 10_000, 132),
        ("quantize_swiglu_gradient_e5m2", 10_000, 264),
        ("quantize_swiglu_gradient_e5m2", 100, 100),
        ("quantize_swiglu_gradient_e5m2", 0, 1),
    ],
)
def test_blocks_that_stay_are_no_more_than_a_gpu_has_room_for(name, work, started, monkeypatch):
    monkeypatch.setattr(ways.cuda_launch, "multiprocessors", lambda device: 132)
    assert ways._limited(work, KERNELS[name], torch.device("cuda"), ways._MOST_BLOCKS) == started
    assert ways._limited(work, KERNELS[name], CPU, 3) == max(1, min(work, 3))
