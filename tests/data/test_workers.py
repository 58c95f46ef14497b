"""Processes that read: light, quiet, killed without harm, and gone when they should be."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_davinci.data import NativeLoader
from megatron_davinci.data.batches import Batches
from megatron_davinci.errors import EnvironmentProblem
from tests.data.text import batches_of, same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return batches_of(tmp_path)


def descriptors() -> set[str]:
    """Memory files, pipes and sockets; which shards are open is another matter."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {what for what in found if any(kind in what for kind in ("memfd:", "pipe:", "socket:"))}


def children() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if only its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.02)


def pids(loader: NativeLoader) -> list[int]:
    return [lane.pid for lane in loader._lanes]


def test_nothing_is_left_when_it_is_closed_and_no_torch_was_there(batches):
    before = descriptors(), children()
    loader = NativeLoader(batches, workers=2, prefetch_steps=3)
    with loader:
        loader.request(np.arange(9))
        assert same(loader.take(np.arange(9)), batches.read(np.arange(9)))
        loader.request(np.arange(9, 50))
        workers = pids(loader)
        assert sum("socket:" in what for what in descriptors() - before[0]) == 2, "a connection a worker"
        for pid in workers:
            assert pid in children()
            mapped = Path(f"/proc/{pid}/maps").read_text()
            assert "numpy" in mapped and "torch" not in mapped
            # A terminal's Ctrl-C goes to all processes; it is the trainer's to act on it.
            os.kill(pid, signal.SIGINT)
        assert same(loader.take(np.arange(9, 50)), batches.read(np.arange(9, 50)))
        assert sum("memfd:davinci-slot (deleted)" in what for what in descriptors()) >= 5, "without a name"
    assert all(is_gone(pid) for pid in workers)
    assert (descriptors(), children()) == before
    loader.close()


def test_a_worker_that_is_killed_is_named_and_none_of_its_rows_are_believed(batches):
    with NativeLoader(batches, workers=2, prefetch_steps=2) as loader:
        assert same(loader.take(np.arange(20)), batches.read(np.arange(20)))
        first, second = pids(loader)
        os.kill(second, signal.SIGSTOP)
        loader.request(np.arange(20, 40))
        os.kill(second, signal.SIGKILL)
        for attempt in range(2):
            with pytest.raises(EnvironmentProblem) as caught:
                loader.take(np.arange(20, 40) if attempt == 0 else np.arange(40, 60))
            for words in ("data worker 1", f"process {second}", "signal 9 (Killed)", "memory ran out"):
                assert words in str(caught.value)
    wait_until_gone([first, second])


def test_a_worker_that_cannot_start_is_an_error_and_ends_the_others(batches, monkeypatch):
    before = descriptors(), children()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(
        EnvironmentProblem, match=r"(?s)cannot be started.*data worker 0.*data\.loader\.workers"
    ):
        NativeLoader(batches, workers=2)
    assert (descriptors(), children()) == before


def test_a_worker_that_does_not_listen_is_ended_all_the_same(batches, monkeypatch):
    monkeypatch.setattr("megatron_davinci.data.workers._PATIENCE_SECONDS", 0.1)
    loader = NativeLoader(batches, workers=1)
    loader.take(np.arange(3))
    (pid,) = pids(loader)
    os.kill(pid, signal.SIGSTOP)
    loader.close()
    assert is_gone(pid)


PARENT = """
import sys, time
from pathlib import Path
import numpy as np
from megatron_davinci.data import NativeLoader
from tests.data.text import batches_of
loader = NativeLoader(batches_of(Path(sys.argv[1])), workers=2)
loader.take(np.arange(30))
print(*[lane.pid for lane in loader._lanes], flush=True)
time.sleep(600)
"""


def test_workers_end_with_their_trainer_however_it_ends(tmp_path):
    # Not under a main guard, as a worker is no copy of the program that started it.
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and not any(is_gone(pid) for pid in workers)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone(workers)
    parent.stdout.close()
