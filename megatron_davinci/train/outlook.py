"""What lies ahead of a run: its stages, a configuration that was changed, and the edits that are still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from megatron_davinci.config import RunConfig
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.config.transform_checks import recorded
from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import Edit
from megatron_davinci.train.past import Past, shares
from megatron_davinci.train.planned import (
    CONFIGURATION,
    mixture_at,
    place_of,
    planned_records,
    where_change_begins,
)


class Outlook(NamedTuple):
    """What lies ahead.

    Attributes:
        planned: Records that are not in the journal yet, by rising first sample.
        begins: The first sample that they may govern; None at the run's end.
        overruled: Why, by the names of the edits that a changed configuration takes the place of.
    """

    planned: list[MixRecord]
    begins: int | None
    overruled: dict[str, str]


def look_ahead(
    past: Past,
    config: RunConfig,
    schedule: Schedule,
    windows: Mapping[str, int],
    journal: Journal,
    pools: Mapping[str, int],
    *,
    strict: bool = True,
) -> Outlook:
    """Work it out. The configuration leaves the past as it was: `Past.check`.

    Args:
        past: What is over.
        config: The configuration.
        schedule: Its schedule.
        windows: Of its sources.
        journal: The run's.
        pools: Tokens by source.
        strict: Whether an edit that the configuration does not allow is an error; if not, it is left out.

    Raises:
        ConfigError: An edit does not fit the configuration.
    """
    pending = past.edits.pending(journal.mixes)
    problems = {edit.name: edit_problem(edit, config, windows) for edit in pending}
    if strict and any(problems.values()):
        raise ConfigError(
            "A change of the mixture was asked for that the configuration does not allow.",
            where=past.directory.edits,
            found="\n".join(f"{name}: {problem}" for name, problem in problems.items() if problem),
            do=f"`davinci curriculum edit {past.directory.path} --withdraw NAME`, or configure what it needs",
        )
    pending = [edit for edit in pending if problems[edit.name] is None]
    begins = where_change_begins(schedule, journal.mixes, past.consumed)
    changed = _changed(past, config, schedule, journal, pools, begins)
    overruled = {}
    for edit in pending:
        stage = edit.point.stage
        if stage is not None and _differs(
            past.stage_weights(stage, pools), _configured(config, stage, pools)
        ):
            overruled[edit.name] = f"the configuration of stage {stage} was changed later"
        elif changed is not None and place_of(edit, schedule, changed.first_sample) == changed.first_sample:
            overruled[edit.name] = f"the configuration of stage {changed.stage} was changed"
    planned = planned_records(
        config,
        schedule,
        pools,
        journal.mixes,
        [edit for edit in pending if edit.name not in overruled],
        consumed=past.consumed,
        changed=changed,
    )
    return Outlook(planned, begins, overruled)


def edit_problem(edit: Edit, config: RunConfig, windows: Mapping[str, int]) -> str | None:
    """Why a configuration does not allow an edit; None if it does.

    Args:
        edit: What was asked for.
        config: The configuration.
        windows: Of its sources.
    """
    unknown = sorted(set(edit.weights) - set(config.data.sources))
    if unknown:
        return f"no source {', '.join(unknown)}; data.sources has {', '.join(config.data.sources)}"
    used = [name for name, weight in edit.weights.items() if exact_weight(weight) > 0]
    if empty := [name for name in used if not windows.get(name, 0)]:
        return f"{', '.join(empty)} is too small for a window of {config.data.sequence_length:,} tokens"
    total = sum((exact_weight(weight) for weight in edit.weights.values()), Fraction(0))
    if abs(total - 1) > Fraction(1, 10**9):
        return f"the weights sum to {float(total):.10g}, not to 1"
    stages = [stage.name for stage in config.curriculum]
    if edit.point.stage is not None and edit.point.stage not in stages:
        return f"no stage {edit.point.stage}; the curriculum has {', '.join(stages)}"
    return None


def untransformed(config: RunConfig, stage: str, weights: Mapping[str, str]) -> list[str]:
    """The sources of a mixture that a stage's transforms were not made for, since the stage does not mix them.

    Args:
        config: The configuration.
        stage: The stage's name.
        weights: A mixture that would take the place of its own.
    """
    settings = next(one for one in config.curriculum if one.name == stage)
    used = [name for name, weight in weights.items() if exact_weight(weight) > 0]
    own = recorded(settings, config.data)
    found = []
    for name in used:
        both = settings.model_copy(update={"mixture": {**settings.mixture, name: "1"}})
        if recorded(both, config.data) != own:
            found.append(name)
    return found


def _changed(
    past: Past,
    config: RunConfig,
    schedule: Schedule,
    journal: Journal,
    pools: Mapping[str, int],
    begins: int | None,
) -> MixRecord | None:
    """What a changed configuration makes of the stage that the run is in; None where it changes nothing there."""
    if begins is None:
        return None
    stage = schedule.at(begins).stage_name
    if stage not in {record.stage for record in journal.mixes}:
        return None  # it has not begun: its own record says what it mixes
    was, now = past.stage_weights(stage, pools), _configured(config, stage, pools)
    if not _differs(was, now) or not _differs(journal.mixes[-1].weights, now):
        return None
    return replace(
        mixture_at(config, schedule, pools, begins),
        origin=CONFIGURATION,
        reason=f"the configuration had {shares(was or {})} before",
    )


def _configured(config: RunConfig, stage: str, pools: Mapping[str, int]) -> dict[str, str] | None:
    settings = next((one for one in config.curriculum if one.name == stage), None)
    return None if settings is None else source_weights(settings, config.data, pools)


def _differs(was: Mapping[str, str] | None, now: Mapping[str, str] | None) -> bool:
    """Whether two mixtures that are both known are other ones."""
    return was is not None and now is not None and exact(was) != exact(now)


def exact(weights: Mapping[str, str]) -> dict[str, object]:
    """Shares as numbers, without those that are 0: equal for mixtures that are."""
    return {name: exact_weight(weight) for name, weight in weights.items() if exact_weight(weight) > 0}


def transforms_of(config: RunConfig, stage: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """What a stage does to the samples of its own sources and of a mixture's, as the journal keeps it.

    Args:
        config: The configuration.
        stage: The stage's name.
        weights: The mixture.
    """
    settings = next(one for one in config.curriculum if one.name == stage)
    used = {name: "1" for name, weight in weights.items() if exact_weight(weight) > 0}
    return recorded(settings.model_copy(update={"mixture": {**settings.mixture, **used}}), config.data)


def widened(config: RunConfig, records: Sequence[MixRecord]) -> RunConfig:
    """The configuration as if each stage mixed every source that it may come to mix, to make transforms for all.

    These are the sources of its records, and all that there are where a controller may bring in any: what is done to
    their samples must not wait for the next start.
    """
    controller = config.controller
    stages = []
    for stage in config.curriculum:
        more = {
            name
            for record in records
            if record.stage == stage.name
            for name, weight in record.weights.items()
            if exact_weight(weight) > 0
        }
        if controller.mode == "apply" and (controller.stages is None or stage.name in controller.stages):
            more |= set(config.data.sources)
        stages.append(
            stage.model_copy(update={"mixture": {**stage.mixture, **dict.fromkeys(sorted(more), "1")}})
        )
    return config.model_copy(update={"curriculum": stages})
