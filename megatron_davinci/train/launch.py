"""Starting ranks on this machine: `davinci train` is torchrun, with the run's own exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_davinci.errors import LOST_PEER


def inside_launcher() -> bool:
    """Whether a launcher (torchrun, or Slurm through it) has already given this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(config: str, overrides: Sequence[str], ranks: int, *, grace_seconds: float = 100.0) -> int:
    """Do what `torchrun --standalone --nproc-per-node=RANKS -m megatron_davinci.train` does, and wait.

    torchrun ends with code 1 and a traceback whatever a rank said. Here its agent runs in this process, and the
    code is that of the rank that failed first.

    Args:
        config: Path of the configuration.
        overrides: `key=value` settings.
        ranks: How many ranks to start.
        grace_seconds: How long they may take to end after a signal.

    Returns:
        0, or the exit code of the first rank that failed (2: refused, with the reason said by that rank).
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    quiet()
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port of this machine, reached from this machine only
        max_restarts=0,
    )
    command = [sys.executable, "-u", "-m", "megatron_davinci.train", config, *overrides]
    return exit_code(lambda: elastic_launch(settings, command[0])(*command[1:]), grace_seconds)


def quiet() -> None:
    """Leave the saying to the ranks: torchrun logs each rank's death at length, and its choice of threads."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun sets it to 1 and says so when it is not set; `train.threads` decides.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def exit_code(agent: Callable[[], object], grace_seconds: float = 100.0) -> int:
    """Run torchrun's agent until its ranks have ended.

    Args:
        agent: Starts the ranks of this machine and waits for them.
        grace_seconds: How long ranks may take to end after a signal.

    Returns:
        0, or the exit code of the first rank that failed, one that lost it apart; 128 and the signal's number when a
        rank or the agent was ended by one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_davinci.train.elastic import our_agent

    try:
        with our_agent(grace_seconds):
            agent()
    except ChildFailedError as error:
        rank, failure = cause_of(error.failures)
        if failure.exitcode > 0:
            return int(failure.exitcode)
        number = -failure.exitcode
        print(
            f"error: rank {rank} was ended by signal {number} ({signal.strsignal(number)}), and the others with it.\n"
            "  do:       start the same command again; the run goes on from its newest checkpoint",
            file=sys.stderr,
        )
        return 128 + number
    except SignalException as ended:
        return 128 + int(ended.sigval)
    return 0


def cause_of(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank that failed first, and how; one that ended because it lost another is no cause."""
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != LOST_PEER} or failures
    return min(own.items(), key=lambda item: item[1].timestamp)
