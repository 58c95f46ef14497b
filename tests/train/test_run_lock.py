"""Two trainers never write into one run directory, and a dead one keeps nobody out."""

import errno
import json
import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.train import run_lock
from megatron_davinci.train.last_words import LastWords, launcher_ended
from megatron_davinci.train.run_lock import RunLock
from tests.ranks import run_ranks, start_ranks
from tests.tiny import tiny_settings, train_here


@contextmanager
def holder(folder, *, child=False):
    """A process that holds the lock; with `child`, one that has started another. Both die in the end."""
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(folder).acquire()
        below = os.fork() if child else 0
        if not (child and below == 0):
            os.write(said, f"{below}".encode())
        time.sleep(60)
        os._exit(0)
    below = int(os.read(ready, 20))
    try:
        yield pid
    finally:
        for one in {pid, below} - {0}:
            os.kill(one, signal.SIGKILL)
        os.waitpid(pid, 0)


def kill(pid):
    """Kill a process and wait until it is gone, but leave its number."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_the_second_is_refused_with_the_name_of_the_first(tmp_path):
    with holder(tmp_path) as pid:
        with pytest.raises(EnvironmentProblem) as error:
            RunLock(tmp_path).acquire()
        assert f"process {pid} on {socket.gethostname()}, since 20" in str(error.value)
        kill(pid)
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_processes_that_the_holder_started_do_not_keep_it(tmp_path):
    with holder(tmp_path, child=True) as pid:
        kill(pid)
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()


def test_a_directory_that_nothing_came_of_is_not_left_behind(tmp_path):
    lock = RunLock(tmp_path / "runs" / "new")
    lock.acquire()
    assert (tmp_path / "runs" / "new" / "lock").stat().st_mode & 0o007 == 0
    lock.release()
    assert not (tmp_path / "runs" / "new").exists()
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentProblem):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()


def as_if_elsewhere(monkeypatch, stale):
    """As on another machine, whose locks do not reach this one."""
    monkeypatch.setattr(run_lock, "_machine", lambda: "here")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", stale)


def leave(folder, **changes):
    said = {"host": "node7", "pid": 4, "since": "2026-01-01T00:00:00Z", "machine": "there", "beat": 1}
    (folder / "lock").write_text(json.dumps({**said, **changes}))


def test_another_machine_that_gives_no_sign_of_life_is_waited_for_and_passed_over(
    tmp_path, monkeypatch, capsys
):
    as_if_elsewhere(monkeypatch, 0.2)
    leave(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert "process 4 on node7" in capsys.readouterr().out


def test_another_machine_that_lives_is_not_passed_over(tmp_path, monkeypatch):
    as_if_elsewhere(monkeypatch, 60)
    leave(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: leave(tmp_path, beat=2))
    with pytest.raises(EnvironmentProblem, match="process 4 on node7"):
        RunLock(tmp_path).acquire()


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    first, deadline = (tmp_path / "lock").read_bytes(), time.monotonic() + 30
    while (tmp_path / "lock").read_bytes() in (first, b""):
        assert time.monotonic() < deadline
    lock.release()


def test_without_locks_a_process_that_lives_still_keeps_others_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with holder(tmp_path) as pid:
        monkeypatch.setattr(run_lock.fcntl, "lockf", none)
        with pytest.raises(EnvironmentProblem, match=f"process {pid}"):
            RunLock(tmp_path).acquire()
        kill(pid)
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()


def test_a_second_trainer_leaves_no_word_where_those_of_the_first_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")  # one that the first trainer does not have
    (tmp_path / "manifest.json").write_text("{}")
    words = tmp_path / "ranks"

    def refused():
        rank = LastWords()
        rank.begin(tmp_path)
        rank.end(2, "Another trainer is at work in this run directory.")
        launcher_ended(tmp_path, 2, {3: 2}, 0)

    with holder(tmp_path):
        refused()
        assert not words.exists()
    refused()
    assert sorted(path.name for path in words.iterdir()) == [
        f"launcher-{socket.gethostname()}.json",
        "rank-00003.json",
    ]
    (words / "rank-00003.json").unlink()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "node052", "pid": 1}))
    refused()
    assert not (words / "rank-00003.json").exists()
    os.utime(lock, (0, 0))
    refused()
    assert (words / "rank-00003.json").exists(), "that one gives no sign of life"


def test_a_run_in_a_directory_where_one_is_at_work_is_refused_and_changes_nothing(tmp_path):
    settings = tiny_settings(tmp_path, curriculum=tiny_settings(tmp_path)["curriculum"][:1])
    settings["curriculum"][0] |= {"tokens": 10**9, "global_batch_size": 4}
    run = tmp_path / "run"
    [(process, connection)] = start_ranks(1, train_here, settings)
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.02)
        before = (run / "manifest.json").read_bytes()
        with pytest.raises(EnvironmentProblem, match=f"process {process.pid} on"):
            run_ranks(1, train_here, settings)
        assert (run / "manifest.json").read_bytes() == before
    finally:
        process.kill()
        process.join()
        connection.close()
