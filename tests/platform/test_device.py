"""The platform is chosen once; what was asked for by name and is not there is an error."""

from __future__ import annotations

import pytest
import torch

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import device
from megatron_davinci.platform.device import Platform, choose
from megatron_davinci.platform.import_hook import FINDER

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Choosing sets this process's threads and the import hook's device; put both back."""
    threads, chosen = torch.get_num_threads(), FINDER.device
    monkeypatch.setattr(FINDER, "_on_cpu", None)
    yield
    torch.set_num_threads(threads)
    FINDER.device = chosen


@no_cuda
def test_cuda_asked_for_by_name_and_not_there():
    with pytest.raises(EnvironmentProblem) as caught:
        choose("cuda")
    text = str(caught.value)
    assert "parallel.device" in text and torch.__version__ in text and "parallel.device=auto" in text


@no_cuda
def test_auto_takes_the_cpu_where_there_is_no_cuda():
    platform = choose("auto", threads=1)
    assert (platform.name, platform.backend, platform.device) == ("cpu", "gloo", torch.device("cpu"))
    assert platform.describe() == "CPU, gloo, 1 thread a rank"
    platform.synchronize()


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(device, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    choose("cpu")
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    choose("cpu")
    assert torch.get_num_threads() == 1
    choose("cpu", threads=2)
    assert torch.get_num_threads() == 2, "what is asked for wins"


def test_the_platform_cannot_change_once_megatron_core_is_imported(monkeypatch):
    monkeypatch.setattr(FINDER, "_on_cpu", False)
    with pytest.raises(EnvironmentProblem, match="already imported for another platform"):
        choose("cpu")
    monkeypatch.setattr(FINDER, "_on_cpu", True)
    assert choose("cpu", threads=1).name == "cpu"


@pytest.mark.parametrize("native", [True, False])
def test_precision_auto_is_bf16_where_it_is_native(native):
    platform = Platform("cpu", "gloo", torch.device("cpu"), native_bf16=native)
    assert platform.precision("auto") == ("bf16" if native else "fp32")
    assert platform.precision("fp32") == "fp32"
    assert platform.precision("bf16") == "bf16"


@pytest.mark.parametrize(
    ("flags", "native"),
    [("flags : fpu avx512_bf16", True), ("flags : fpu amx_bf16", True), ("flags : fpu avx512f avx2", False)],
)
def test_bf16_is_native_where_the_processor_says_so(monkeypatch, flags, native):
    monkeypatch.setattr(device.Path, "read_text", lambda path: flags)
    assert device._cpu_multiplies_bf16() is native


def test_a_machine_that_does_not_say_has_no_native_bf16(monkeypatch):
    def unreadable(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(device.Path, "read_text", unreadable)
    assert device._cpu_multiplies_bf16() is False
