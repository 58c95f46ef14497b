"""A pool of gloo ranks for tests: forked from a server that has torch and Megatron-Core imported already."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from benchmarks.common import free_port, rank_environment
from tests.cases import is_long
from tests.faults import shim

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class RankFailed(AssertionError):
    """A rank raised; the message has its traceback."""


def start_ranks(
    world: int, function: Callable[..., Any], *args: Any, parents: bool = False
) -> list[tuple[Any, Any]]:
    """Start `function(*args)` on `world` ranks; returns (process, connection) for each.

    With `parents` they may start processes of their own, and must be ended by whoever started them.
    """
    # With the library by which tests/faults makes files fail; it does nothing until a test arms it.
    with shim.preloaded():
        forkserver.ensure_running()
    port = free_port()
    started = []
    for rank in range(world):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_rank_main,
            args=(rank, world, port, theirs, os.getcwd(), function, args),
            daemon=not parents,
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0, parents: bool = False
) -> list[Any]:
    """Run `function(*args)` on `world` ranks and return what each returned.

    `function` must be importable (module level). An error that a rank raises is raised here: the exception itself
    when it is one of ours, `RankFailed` with the traceback otherwise.
    """
    timeout *= 5 if is_long() else 1  # much more is done, on a machine that may be busy
    started = start_ranks(world, function, *args, parents=parents)
    try:
        outcomes: list[Any] = [None] * world
        for rank, (process, connection) in enumerate(started):
            if not connection.poll(timeout):
                raise RankFailed(f"rank {rank} of {world} gave no answer in {timeout} s")
            try:
                outcomes[rank] = connection.recv()
            except EOFError:
                process.join(5)
                raise RankFailed(f"rank {rank} of {world} died with exit code {process.exitcode}") from None
            kind, value = outcomes[rank]
            if kind == "davinci":
                raise value
            if kind == "error":
                raise RankFailed(f"rank {rank} of {world}:\n{value}")
        return [value for _, value in outcomes]
    finally:
        for process, connection in started:
            connection.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(
    rank: int,
    world: int,
    port: int,
    connection: Any,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    from megatron_davinci.errors import DavinciError

    shim.forget()
    os.chdir(folder)
    os.environ.update(rank_environment(rank, world, port))
    try:
        connection.send(("value", function(*args)))
    except DavinciError as error:
        connection.send(("davinci", error))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
    finally:
        connection.close()
