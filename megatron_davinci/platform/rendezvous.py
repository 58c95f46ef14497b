"""Where ranks meet: a store that says which of them came, so that those that did not can be named."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_davinci.errors import EnvironmentProblem

_NAMED = 16
"""Ranks that a message names one by one."""
_LINGER_SECONDS = 2.0
"""Rank 0 may host the store: the others read the verdict before it ends."""


def meet(timeout: timedelta) -> dist.Store:
    """Wait until every rank is here.

    Rank, world size and address come from the environment. As with torch's own `env://`, rank 0 hosts the store
    unless torchrun's agent does already.

    Args:
        timeout: How long to wait, for the store and then for the last rank.

    Returns:
        The store, for `torch.distributed.init_process_group`.

    Raises:
        EnvironmentProblem: The store could not be reached, or ranks did not come in time; it names them.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    where = f"rank {rank} of {world} on {socket.gethostname()}, rendezvous {host}:{port}"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            int(port),
            world,
            is_master=rank == 0 and not agent,
            timeout=timeout,
            # Here it would only count them.
            wait_for_workers=False,
            # Who starts twice in one process meets in the same server; one that takes any port has its own.
            multi_tenant=not agent and port != "0",
        )
        missing = _gather(store, rank, world, timeout)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise EnvironmentProblem(
            "This rank could not join the others.",
            where=where,
            found=error,
            do="check that every node starts, and that they reach the rendezvous address",
        ) from error
    if missing:
        raise EnvironmentProblem(
            "Not every rank came to the rendezvous in time.",
            where=where,
            found=f"{world - len(missing)} of {world} ranks; missing: {_listed(missing)}",
            expected=f"all within {timeout.total_seconds():g} s (parallel.timeout_seconds)",
            do="look at what the missing ranks have said, and whether their nodes have started",
        )
    return dist.PrefixStore(f"{_attempt()}/default_pg", store)


def _attempt() -> str:
    """What this start's keys begin with: torchrun's agent keeps its store when it starts the ranks again."""
    return f"davinci/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _gather(store: dist.Store, rank: int, world: int, timeout: timedelta) -> list[int]:
    """Say that this rank is here and wait for the others; those that did not come.

    The first rank whose time is over gives the verdict for all, so that all end at once and say the same.
    """
    prefix = _attempt()
    verdict = f"{prefix}/verdict"
    store.set(f"{prefix}/here/{rank}", socket.gethostname())
    if store.add(f"{prefix}/came", 1) == world:
        store.compare_set(verdict, "", "[]")
    try:
        store.wait([verdict], timeout)
    except dist.DistStoreError:
        late = [one for one in range(world) if not store.check([f"{prefix}/here/{one}"])]
        store.compare_set(verdict, "", json.dumps(late))
    missing: list[int] = json.loads(store.get(verdict))
    if missing and rank == 0:
        time.sleep(_LINGER_SECONDS)
    return missing


def _listed(ranks: list[int]) -> str:
    rest = len(ranks) - _NAMED
    return ", ".join(map(str, ranks[:_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
