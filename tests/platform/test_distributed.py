"""What a rank says that cannot join the others, or loses one of them."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import distributed
from megatron_davinci.platform.device import choose
from megatron_davinci.platform.distributed import lost_peer
from tests.ranks import run_ranks


@pytest.mark.long
def test_a_rank_that_cannot_join_says_who_and_where_within_the_timeout():
    # Port 1 is nobody's here: a rank that is not rank 0 waits for it until its time is over.
    code = (
        "from megatron_davinci.platform import device, distributed\n"
        "distributed.start(device.choose('cpu', threads=1), timeout_seconds=1)"
    )
    where = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    said = done.stderr[done.stderr.rindex("EnvironmentProblem: ") :]
    assert said.startswith("EnvironmentProblem: This rank could not join the others.")
    assert "rank 3 of 4 on " in said and "rendezvous 127.0.0.1:1" in said


def _meet_alone(rank: int, world: int) -> str:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    try:
        distributed.start(choose("cpu", threads=1), timeout_seconds=3)
    except EnvironmentProblem as problem:
        return str(problem)
    return "joined"


def test_ranks_that_came_name_those_that_did_not():
    # Two ranks of five; the pool gives both the same address.
    said = run_ranks(2, _two_of_five)
    for rank, text in zip((0, 3), said, strict=True):
        assert text.startswith("Not every rank came to the rendezvous in time.")
        assert f"rank {rank} of 5 on " in text
        assert "2 of 5 ranks; missing: 1, 2, 4" in text


def _two_of_five() -> str:
    return _meet_alone(3 * int(os.environ["RANK"]), 5)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (
            RuntimeError(
                "[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:59577. This is typically "
                "caused by a remote worker crashing."
            ),
            "Connection closed by peer [10.0.0.2]:59577.",
        ),
        (
            RuntimeError(
                "[/a/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation"
            ),
            "Timed out waiting 60000ms for recv operation",
        ),
        (
            dist.DistBackendError("NCCL error: remote process exited\nLast error:"),
            "NCCL error: remote process exited",
        ),
    ],
)
def test_a_collective_that_lost_a_rank_is_told_by_its_error(error, found, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = lost_peer(error)
    assert said is not None and said.found == found
    assert said.where.startswith("rank 3 of 4 on ")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("gloo/transport/"), OSError("gone")]
)
def test_another_error_keeps_its_traceback(error):
    assert lost_peer(error) is None
