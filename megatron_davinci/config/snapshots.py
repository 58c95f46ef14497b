"""Snapshots in host memory, between checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_davinci.config.section import Section

if TYPE_CHECKING:
    from megatron_davinci.config.run import RunConfig


class SnapshotsConfig(Section):
    """State that stays in the nodes' memory, so that a run that dies goes on from a few steps ago.

    A process beside the trainer keeps it: one for a run directory and node. It takes no disk.
    """

    every_steps: int | None = Field(
        default=None, gt=0, description="Take a snapshot that often, in host memory; null for none"
    )
    parity: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Keep parity on other nodes, so that one lost node is computed again. auto: where the run has "
        "several nodes; always: end with an error where it has one",
    )
    parity_nodes: int = Field(
        default=8,
        ge=2,
        description="Nodes that hold parity for each other, at the most: parity takes 1 / (this - 1) of a snapshot's "
        "memory, and one node of them may be lost",
    )
    keep_alive_seconds: float = Field(
        default=600.0,
        ge=0,
        description="How long snapshots of a run that has died wait for it, before their memory is freed",
    )
    ranks_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Local ranks that are lost together; default: all of a machine. Smaller ones try out on one "
        "machine what several do",
    )


def snapshot_problems(config: RunConfig) -> list[str]:
    """State that a snapshot would not hold; a line each."""
    if config.snapshots.every_steps is None:
        return []
    problems = []
    if config.optimizer.cpu_offload:
        problems.append(
            "snapshots.every_steps takes no snapshots of an optimizer whose state is in the CPU's memory already; "
            "found optimizer.cpu_offload"
        )
    low = config.train.low_precision
    if low.recipe == "delayed" or (low.recipe != "none" and low.backend in ("auto", "transformer_engine")):
        problems.append(
            f"snapshots.every_steps holds no scales of FP8 layers; found train.low_precision.recipe: {low.recipe}, "
            f"backend: {low.backend}"
        )
    return problems
