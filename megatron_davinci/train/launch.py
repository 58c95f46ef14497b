"""Starting ranks on this machine: `davinci train` is torchrun, with the run's own exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.errors import LOST_PEER
from megatron_davinci.train.last_words import killed_for_memory, launcher_ended
from megatron_davinci.train.signals import AT_ONCE


@dataclass(frozen=True)
class Watched:
    """What a launcher has to know of the run.

    Attributes:
        directory: The run directory; None where the configuration does not say.
        grace_seconds: How long ranks may take to end after a signal.
    """

    directory: Path | None = None
    grace_seconds: float = 100.0


def inside_launcher() -> bool:
    """Whether a launcher (torchrun, or Slurm through it) has already given this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    config: str,
    overrides: Sequence[str],
    ranks: int,
    watched: Watched,
    module: Sequence[str] = ("megatron_davinci.train",),
) -> int:
    """Do what `torchrun --standalone --nproc-per-node=RANKS -m megatron_davinci.train` does, and wait.

    torchrun ends with code 1 and a traceback whatever a rank said. Here its agent runs in this process, and the
    code is that of the rank that failed first.

    Args:
        config: Path of the configuration.
        overrides: `key=value` settings.
        ranks: How many ranks to start.
        watched: What the launcher has to know of the run.
        module: What each rank runs, and words before `config`.

    Returns:
        0, or the exit code of the first rank that failed (2: refused, with the reason said by that rank).
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    quiet()
    command = [sys.executable, "-u", "-m", *module, config, *overrides]
    with scratch() as folder:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port of this machine, reached from this machine only
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        return exit_code(lambda: elastic_launch(settings, command[0])(*command[1:]), watched)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for what torchrun's agent writes of ranks, which torchrun itself leaves behind after every start."""
    return tempfile.TemporaryDirectory(prefix="davinci-ranks-", ignore_cleanup_errors=True)


def quiet() -> None:
    """Leave the saying to the ranks: torchrun logs each rank's death at length, and its choice of threads."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun sets it to 1 and says so when it is not set; `train.threads` decides.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def exit_code(agent: Callable[[], object], watched: Watched) -> int:
    """Run torchrun's agent until its ranks have ended.

    Args:
        agent: Starts the ranks of this machine and waits for them.
        watched: What the launcher has to know of the run.

    Returns:
        0, or the exit code of the first rank that failed, one that lost it apart; 128 and the signal's number when a
        rank or the agent was ended by one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megatron_davinci.train.elastic import our_agent

    before, failures, code = killed_for_memory(), {}, 1
    try:
        with our_agent(watched.grace_seconds):
            agent()
        code = 0
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank, failure = cause_of(error.failures)
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if failure.exitcode < 0:
            _say_killed(rank, -failure.exitcode, killed_for_memory() - before)
    except SignalException as ended:
        code = 128 + int(ended.sigval)
    finally:
        launcher_ended(watched.directory, code, failures, killed_for_memory() - before)
    return code


def _say_killed(rank: int, number: int, for_memory: int) -> None:
    memory = "; the kernel killed a process for want of memory meanwhile" if for_memory else ""
    print(
        f"error: rank {rank} was ended by signal {number} ({signal.strsignal(number)}), and the others with it"
        f"{memory}.\n"
        "  do:       start the same command again; the run goes on from its newest checkpoint",
        file=sys.stderr,
    )


def cause_of(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank that failed first, and how; one that lost another, or was ended with it, is no cause."""
    after = (LOST_PEER, 128 + AT_ONCE, -AT_ONCE)
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode not in after} or failures
    return min(own.items(), key=lambda item: item[1].timestamp)
