"""Whether all ranks run the same: versions and configuration are compared before anything is built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform as python_platform
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_davinci.config import RunConfig, dump_config
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.version import __version__

# What decides numbers or the format of what ranks say to each other.
_PACKAGES = ("megatron-core", "numpy", "transformer-engine", "flash-attn")
_CONFIGURATION = "configuration"


class RankFacts(NamedTuple):
    """What one rank is made of.

    Attributes:
        host: Its node's name.
        facts: A version or digest by name.
    """

    host: str
    facts: dict[str, str]


def facts_here(config: RunConfig) -> RankFacts:
    """The facts of this rank."""
    facts = {
        "davinci": __version__,
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        _CONFIGURATION: hashlib.sha256(dump_config(config).encode()).hexdigest()[:16],
    }
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return RankFacts(socket.gethostname(), facts)


def check_agreement(config: RunConfig) -> None:
    """Compare what all ranks are made of; every rank calls this, and every rank raises the same.

    Raises:
        EnvironmentProblem: They differ.
    """
    here = facts_here(config)
    found = [here] * dist.get_world_size()
    dist.all_gather_object(found, here)
    problems = differences(found)
    if problems:
        raise EnvironmentProblem(
            "The ranks of this run are not made of the same.",
            where=f"{len(found)} ranks on {len({rank.host for rank in found})} nodes",
            found="\n".join(problems),
            expected="one version of everything, and one configuration, on every rank",
            do="give every node the same checkout, the same environment and the same command",
        )


def differences(ranks: Sequence[RankFacts]) -> list[str]:
    """Which facts differ, and which ranks on which node have what; the most frequent first, each fact on a line."""
    lines = []
    for name in ranks[0].facts:
        having: dict[str, list[int]] = {}
        for number, rank in enumerate(ranks):
            having.setdefault(rank.facts.get(name, "not said"), []).append(number)
        if len(having) > 1:
            most = sorted(having.items(), key=lambda item: (-len(item[1]), item[1]))
            lines.append(f"{name}: " + "; ".join(f"{value} on {_who(ranks, own)}" for value, own in most))
    return lines


def _who(ranks: Sequence[RankFacts], numbers: Sequence[int]) -> str:
    """`rank 8 to 15 (node02), rank 17 (node03)`."""
    by_host: dict[str, list[int]] = {}
    for number in numbers:
        by_host.setdefault(ranks[number].host, []).append(number)
    return ", ".join(f"rank {_ranges(own)} ({host})" for host, own in _few(by_host))


def _few(by_host: Mapping[str, list[int]], most: int = 4) -> list[tuple[str, list[int]]]:
    """The first nodes, and how many more: a thousand nodes do not fit on a screen."""
    hosts = list(by_host.items())
    if len(hosts) <= most:
        return hosts
    rest = [number for _, own in hosts[most:] for number in own]
    return [*hosts[:most], (f"and {len(hosts) - most} more nodes", rest)]


def _ranges(numbers: Sequence[int]) -> str:
    """`0 to 3, 6`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts)
