"""`python -m megatron_davinci.train.agent` is torchrun, and what went wrong is said on one screen.

It takes torchrun's arguments and runs its agent. torchrun ends with code 1 and tracebacks of its own whether a node
has too few GPUs, cannot reach the rendezvous, waits there in vain, or a rank refused its configuration. Here each is
said in our words, with the name of the node that says it; the code is 2 for what the user can mend, otherwise that of
the rank that failed first. The scripts in `examples/davinci_3b` start it on every node.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron_davinci.errors import DavinciError, EnvironmentProblem
from megatron_davinci.train.launch import Watched, exit_code, quiet, scratch


def main(argv: Sequence[str] | None = None) -> int:
    """Start this node's ranks, as torchrun does, and wait for them.

    Args:
        argv: torchrun's arguments; default: the command line's.

    Returns:
        0; 2 when the user has something to mend; otherwise what the first rank that failed ended with.
    """
    # Each attempt to reach the rendezvous that fails is logged by torch's C++ with its stack; we say the last one. It
    # reads its level once, as it is imported. The ranks keep the level that they are given from outside.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
    from torch.distributed.run import get_args_parser

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    arguments = get_args_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    quiet()
    try:
        check_gpus(arguments.nproc_per_node, arguments.training_script_args)
        with scratch() as folder:
            if arguments.log_dir is None and (arguments.redirects, arguments.tee) == ("0", "0"):
                arguments.log_dir = folder
            return exit_code(lambda: meet_and_run(arguments), watched(arguments.training_script_args))
    except DavinciError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def watched(arguments: Sequence[str]) -> Watched:
    """What the configuration that the ranks are given says to their launcher."""
    from megatron_davinci.config import load_config

    words = [word for word in arguments if not word.startswith("-")]
    try:
        config = load_config(words[0], words[1:])
    except (DavinciError, IndexError):
        return Watched()  # the ranks say what is wrong with it
    return Watched(config.run.directory, config.health.grace_seconds)


def check_gpus(ranks: str, settings: Sequence[str]) -> None:
    """Refuse more ranks than this node has GPUs, before the other nodes are kept waiting.

    Args:
        ranks: Ranks on this node: a number, or `gpu` for one a GPU.
        settings: What the ranks are given; with `parallel.device=cuda` among it each needs a GPU.

    Raises:
        EnvironmentProblem: There are fewer GPUs.
    """
    if ranks != "gpu" and not (ranks.isdecimal() and "parallel.device=cuda" in settings):
        return
    from megatron_davinci.platform.device import count_gpus

    needed, there = 1 if ranks == "gpu" else int(ranks), count_gpus()
    if there < needed:
        raise EnvironmentProblem(
            "This node has fewer GPUs than the run asks it for.",
            where=f"node {socket.gethostname()}",
            found=f"{there} GPUs that torch can use",
            expected="at least one" if ranks == "gpu" else f"{needed}, one a rank (--nproc-per-node)",
            do="look at nvidia-smi and CUDA_VISIBLE_DEVICES on this node, or start fewer ranks on every node; "
            "where nvidia-smi shows GPUs and torch finds none, torch was built without CUDA (docs/install-gpu.md)",
        )


def meet_and_run(arguments: Namespace) -> None:
    """Meet the other nodes, start the ranks, wait until they end.

    Raises:
        EnvironmentProblem: The rendezvous cannot be reached, is over, or not every node came in time.
    """
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import run

    here = f"node {socket.gethostname()}, rendezvous {arguments.rdzv_endpoint or 'on this node'}"
    try:
        run(arguments)
    except RendezvousConnectionError as error:
        raise EnvironmentProblem(
            "This node could not reach the rendezvous.",
            where=here,
            found=_why_not(arguments.rdzv_endpoint),
            do="start torchrun on the rendezvous' node too; name it so that this node can resolve it; open the port "
            "between the nodes",
        ) from error
    except RendezvousTimeoutError as error:
        raise EnvironmentProblem(
            "Not every node came to the rendezvous in time.",
            where=here,
            expected=f"{arguments.nnodes} nodes with --rdzv-id {arguments.rdzv_id}{_patience(arguments.rdzv_conf)}",
            do="every node that came says this: look at those that do not; all must be started with one endpoint, "
            "one id and one number of nodes",
        ) from error
    except RendezvousClosedError as error:
        raise EnvironmentProblem(
            "The rendezvous is over: another node has left it.",
            where=here,
            do="look at the output of the other nodes, then start all of them again with a new --rdzv-id",
        ) from error


def _patience(settings: str) -> str:
    """How long the rendezvous was to wait, as `--rdzv-conf` says it; nothing where it does not."""
    found = re.search(r"join_timeout=(\d+)", settings)
    return f", within {found[1]} s" if found else ""


def _why_not(endpoint: str) -> str:
    """What an ordinary connection meets: torch's error says only that its time was over."""
    host, _, port = endpoint.rpartition(":")
    try:
        address = str(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as error:
        return f"{host or endpoint} is not a name that this node can resolve ({error})"
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError as error:
        return f"{host} is {address}, and a connection to its port {port} fails: {error.strerror or error}"
    return (
        f"{host} is {address}, and its port {port} takes connections by now, but not as a rendezvous in time"
    )


if __name__ == "__main__":
    sys.exit(main())
