"""Shared pasts: what arms have in common up to a stage's end is trained once for each seed, and they branch from it.

A shared past is a run like any other, called by what it computes; it has the first stages of the curriculum only.
Branching changes nothing that a run computes, so a run keeps its identity whether it was trained whole or branched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_davinci.config.section import shown
from megatron_davinci.errors import ConfigError
from megatron_davinci.lab.arms import Arm, Run, flat, identity
from megatron_davinci.lab.design import Design

SHARED = "shared past"


def past_of(design: Design, run: Run) -> Run | None:
    """The run that another begins with; None where the design shares nothing, or begins with what is there.

    Raises:
        ConfigError: The run's curriculum has no stage of that name, or nothing after it.
    """
    if design.branch is None or design.branch.after is None:
        return None
    stages = run.arm.config.curriculum
    names = [stage.name for stage in stages]
    after = design.branch.after
    if after not in names[:-1]:
        raise ConfigError(
            "A design's arms branch after a stage that is there, and not the last.",
            where="branch.after",
            found=shown(after),
            expected="one of " + ", ".join(names[:-1])
            if names[:-1]
            else "a curriculum of two stages or more",
        )
    kept = stages[: names.index(after) + 1]
    config = run.arm.config.model_copy(update={"curriculum": kept})
    size = run.arm.size
    arm = Arm(SHARED, size, f"up to the end of {after}", {}, config)
    return Run(arm, run.seed, identity(arm.with_seed(run.seed), run.origin))


def origin_of(design: Design, root: Path, run: Run) -> str | None:
    """What `davinci train --branch` is told; None for a run that begins at its beginning.

    Args:
        design: The design.
        root: The lab's folder.
        run: One of its runs.
    """
    if run.arm.name == SHARED:
        return run.origin or None
    past = past_of(design, run)
    if past is not None:
        return str(root / "runs" / past.identity)
    return run.origin or None


def pasts_of(design: Design, runs: Sequence[Run]) -> list[Run]:
    """Every shared past, once."""
    found: dict[str, Run] = {}
    for run in runs:
        past = past_of(design, run)
        if past is not None:
            found.setdefault(past.identity, past)
    return list(found.values())


def not_shared(design: Design, arms: Sequence[Arm]) -> Iterator[str]:
    """What arms of one size differ in before they branch, in words: nothing could be shared then."""
    if design.branch is None or design.branch.after is None:
        return
    seed = design.seeds[0]
    pasts: list[Run] = []
    for arm in arms:
        past = past_of(design, Run(arm, seed, ""))
        assert past is not None
        pasts.append(replace(past, arm=replace(past.arm, name=arm.name)))
    control = pasts[0]
    for past in pasts[1:]:
        if past.identity == control.identity:
            continue
        ours, theirs = (
            flat(one.arm.config.model_dump(mode="json", exclude={"run": {"directory"}}))
            for one in (past, control)
        )
        keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        yield f"{past.arm.name} differs from {control.arm.name} before it branches: {', '.join(keys[:6])}"
