"""The emulator computes as a GPU would, and sees what it is there to see."""

from __future__ import annotations

import ctypes
import random
import re
import subprocess

import numpy as np
import pytest
import torch

from benchmarks import planted_kernels
from megatron_davinci.kernels import compilers, ptx_emulator, sources, ways
from megatron_davinci.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_davinci.kernels.table import Kernel

pytestmark = pytest.mark.needs("emulator")

MEETING = Kernel("meeting", "meeting.cu", 64, "lp", ("fp32",))
ME = np.arange(64, dtype=np.float32)
LANE, WARP = ME % 32, ME // 32
RIGHT = {
    0: ME[::-1],
    7: WARP * 32 + 31 - LANE,
    9: np.where(LANE < 16, (ME.astype(int) ^ 8), ME),
    13: np.full(64, 7),
    14: ME,
    17: np.where(LANE < 30, ME + 2, ME) + WARP * 32 + 5,
}
WRONG = {
    1: r"shared.* is read (with no barrier after thread \d+ wrote it|before it is written)",
    2: r"shared.* is (read|written) with no barrier after thread \d+ (read|wrote) it",
    3: "shared.* is read before it is written",
    4: r"shared\[64\] of 64 elements|byte 256 of 256 of shared memory",
    5: r"32 of 64 threads have left, and the others wait at the barrier of .*meeting.cu:\d+",
    6: r"thread \d+ waits at the barrier of .*meeting.cu:\d+ and thread \d+ at that of",
    8: r"shared.* is read (with no barrier after thread \d+ wrote it|before it is written)",
    10: r"lane \d+ has left, and .*meeting.cu:\d+ waits for it|others for lanes that do not come|all threads wait",
    11: r"the mask 0000ffff of .*meeting.cu:\d+ does not name lane \d+|reads lane \d+, which mask 0000ffff does not",
    12: r"reads lane \d+, which mask 0000ffff does not name",
    15: r"lanes of a warp are at .*meeting.cu:\d+ with mask ffffffff and at",
    16: r"shared.* is (read|written) (with no barrier after thread \d+|before it is written)",
}


@pytest.fixture(scope="module", params=["plain", pytest.param("ptx", marks=pytest.mark.needs("nvcc"))])
def meeting(request, tmp_path_factory):
    """The kernel of meeting.cu: launches it, and returns the code, the message and what it wrote.

    As it is written, and as nvcc makes it.
    """
    folder = tmp_path_factory.mktemp("meeting")
    for name, text in sources.files().items():
        (folder / name).write_text(text)
    text = (planted_kernels.ROOT / "tests" / "kernels" / "meeting.cu").read_text()
    digest = "DAVINCI_EXPORT const char* davinci_kernels_digest() { return DAVINCI_DIGEST; }\n"
    (folder / sources.WHOLE).write_text('#include "meeting.cu"\n' + digest)
    (folder / "meeting.cu").write_text(text)
    if request.param == "ptx":
        path = ptx_emulator.build("meeting.cu", where=folder, kernels=[MEETING]).path
    else:
        path = compilers.emulator(where=folder, out=folder / "meeting.so")
    library = ctypes.CDLL(str(path))
    library.davinci_emulator_message.restype = ctypes.c_char_p

    def launch(what, blocks=2):
        out = np.zeros(66, np.float32)
        arguments = [
            ctypes.c_longlong(blocks),
            ctypes.c_longlong(what),
            ctypes.c_void_p(out.ctypes.data),
            None,
        ]
        code = library.davinci_meeting_fp32(*arguments)
        return code, library.davinci_emulator_message().decode(), out

    launch.of = request.param
    return launch


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_right_passes_in_every_order(meeting, monkeypatch, seed):
    monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
    for what, expected in RIGHT.items():
        code, message, out = meeting(what)
        assert (code, message) == (0, ""), what
        np.testing.assert_array_equal(out[:64], expected)
        if what == 14:
            assert out[64] == 128 and out[65:].view(np.int32)[0] == 63


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_every_order(meeting, monkeypatch, what, seed):
    if meeting.of == "ptx" and what == 15:
        pytest.skip("the compiler makes one operation of the two")
    monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
    code, message, _ = meeting(what)
    assert code == 1000 and re.search(rf"^block \d.*{WRONG[what]}", message), message
    assert meeting(0)[0] == 0, "the next launch begins anew"


def test_every_change_to_be_planted_is_there_to_be_made(tmp_path):
    for change in (*planted_kernels.FAULTS, *planted_kernels.TWINS):
        change.apply(sources.files())
    assert len({change.name for change in planted_kernels.FAULTS}) == len(planted_kernels.FAULTS) >= 10
    assert len({change.name for change in planted_kernels.TWINS}) == len(planted_kernels.TWINS) >= 10


def test_a_planted_fault_is_caught_and_its_clean_twin_passes(tmp_path):
    by_name = {change.name: change for change in (*planted_kernels.FAULTS, *planted_kernels.TWINS)}
    for name, caught in (("barrier removed", True), ("barrier doubled", False)):
        built = planted_kernels.build(by_name[name], tmp_path)
        assert bool(planted_kernels.try_it(by_name[name], built, random.Random(1), trials=6)) == caught


@pytest.mark.long
@pytest.mark.skipif(not compilers.can_fuse(), reason="this CPU does not fuse products and sums")
def test_fused_products_and_sums_show_what_a_gpu_would_compute(tmp_path):
    # Of equal products the difference is 0 where both are rounded, and is not where one of them is fused.
    change = planted_kernels.Change(
        "a difference of products",
        "cross_entropy",
        "cross_entropy.cu",
        "power_of_two((logit - log_z) * kLog2E)",
        "power_of_two(logit * kLog2E - log_z * kLog2E)",
    )

    def gradient():
        logits = torch.zeros(1, 300)
        logits[0, 7] = 1e6  # all of the probability, and the label's: there is nothing to learn
        leaf = logits.requires_grad_()
        vocab_parallel_cross_entropy(leaf * 1, torch.tensor([7])).cross_entropy.sum().backward()
        return float(leaf.grad.abs().max())

    for kind in ("plain", "fused"):
        folder = tmp_path / kind
        folder.mkdir()
        library = planted_kernels.build(change, folder, kind)
        with planted_kernels.emulated_by(library, change):
            assert (gradient() > 1e-3) == (kind == "fused")
    with ways.emulating("fused"):
        assert gradient() == 0


@pytest.mark.long
def test_ten_of_ten_faults_are_caught_and_ten_of_ten_twins_pass(tmp_path):
    figures = planted_kernels.measure(seed=random.SystemRandom().randrange(2**31))[0]
    assert figures == {
        "planted": 10,
        "planted_caught": 10,
        "clean": 10,
        "clean_passed": 10,
    }, figures


def test_the_compiler_has_nothing_to_say():
    flags = ["-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    flags += ["-DDAVINCI_EMULATOR", '-DDAVINCI_DIGEST=""', "-fsyntax-only"]
    whole = sources.folder() / sources.WHOLE
    done = subprocess.run(
        [compilers.find_host_compiler(), *flags, str(whole)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
