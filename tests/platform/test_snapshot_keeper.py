"""The keeper holds memory for a trainer that dies, frees it for one that does not come back, and leaves nothing."""

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import snapshot_keeper as protocol
from megatron_davinci.platform.snapshot_memory import Keeper, RankMemory


@pytest.fixture
def address():
    name = f"davinci-test-{uuid.uuid4().hex}"
    yield name
    for process in processes(name):
        process.kill()


def processes(address):
    return [p for p in psutil.process_iter(["cmdline"]) if address in (p.info["cmdline"] or [])]


def are_gone(keepers):
    """Whether keepers that were seen alive end, and with them all that they held.

    One that is ending has no command line any more while it still has its files.
    """
    assert keepers
    deadline = time.monotonic() + 30
    while any(map(lives, keepers)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def lives(keeper):
    try:
        return keeper.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holding(address, keep_alive=60.0):
    keeper = Keeper(address, keep_alive)
    memory = RankMemory.create(1000, 0)
    memory.region(0, "data")[:] = 7
    keeper.put("rank-0", memory.descriptor)
    memory.close()
    return keeper


def test_memory_outlives_a_trainer_that_is_killed(address):
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from tests.platform.test_snapshot_keeper import holding\n"
            "keeper = holding(sys.argv[1]); print('held', flush=True); time.sleep(60)",
            address,
        ],
        stdout=subprocess.PIPE,
    )
    assert trainer.stdout.readline() == b"held\n"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    keeper = Keeper(address, 60.0, start=False)
    memory = RankMemory(keeper.get("rank-0"))
    assert (memory.region(0, "data") == 7).all()
    assert list(keeper.names()) == ["rank-0"]
    assert keeper.get("rank-1") is None


def test_a_trainer_that_does_not_come_back_is_not_waited_for_longer_than_was_said(address):
    keeper = holding(address, keep_alive=0.2)
    time.sleep(0.5)
    assert keeper.is_there  # as long as somebody is connected
    there = processes(address)
    keeper.close()
    assert are_gone(there)
    assert not Keeper(address, 1.0, start=False).is_there


def test_a_keeper_that_holds_nothing_does_not_wait(address):
    keeper = Keeper(address, 600.0)
    there = processes(address)
    keeper.close()
    assert are_gone(there)


def test_a_run_that_ends_well_leaves_nothing(address):
    before = set(os.listdir("/dev/shm"))
    keepers = [holding(address), Keeper(address, 60.0)]
    there = processes(address)
    assert len(there) == 1
    assert set(os.listdir("/dev/shm")) == before
    for keeper in keepers:
        keeper.free()
        keeper.close()
    assert are_gone(there)


def test_a_second_keeper_of_one_name_ends_at_once(address):
    keeper = holding(address)
    second = subprocess.run([sys.executable, protocol.__file__, address], timeout=30, check=False)
    assert second.returncode == 0
    assert list(keeper.names()) == ["rank-0"]


def test_a_keeper_that_is_killed_is_noticed_and_its_memory_is_gone(address):
    keeper = holding(address)
    (there,) = processes(address)
    there.kill()
    assert are_gone([there])
    assert not keeper.is_there
    assert Keeper(address, 60.0).names() == {}


def test_a_keeper_is_asked_after_however_many_files_are_open(address):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    try:
        keeper = Keeper(address, 0.0)
        low = keeper._connection
        keeper._connection = socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1500))
        low.close()
        assert keeper.is_there
        (there,) = processes(address)
        there.kill()
        assert are_gone([there]) and not keeper.is_there
        keeper.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_no_message_ends_the_connection_and_not_the_keeper(address):
    keeper = holding(address)
    for packet in (b"{", b"[]", b'{"do": "nothing"}', b'{"do": "put", "name": "x"}', b'{"do": "attach"}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect("\0" + address)
            stranger.sendall(packet)
            assert stranger.recv(100) == b""
    assert list(keeper.names()) == ["rank-0"]


def test_a_name_that_another_user_has_taken_is_refused(address, monkeypatch):
    holding(address)
    monkeypatch.setattr(protocol, "owner", lambda connection: os.getuid() + 1)
    with pytest.raises(EnvironmentProblem, match="Another user's process has taken the name"):
        Keeper(address, 60.0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away(address):
    keeper = holding(address)
    program = (
        "import os, socket, sys; os.setuid(65534)\n"
        "one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); one.connect(chr(0) + sys.argv[1])\n"
        'one.sendall(b\'{"do": "free"}\'); print(one.recv(100))'
    )
    said = subprocess.run(
        [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=30
    )
    assert said.stdout.strip() == "b''" or "Connection" in said.stderr or "Broken pipe" in said.stderr
    assert list(keeper.names()) == ["rank-0"]
