"""Whether a run keeps the caps on repetition: exact, with the windows that its sources have."""

from __future__ import annotations

from fractions import Fraction

from megatron_davinci.config import RunConfig
from megatron_davinci.config.repetition import epoch_cap, over_cap
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule


def cap_problems(config: RunConfig, schedule: Schedule, curriculum: Curriculum) -> list[str]:
    """What a data order takes of sources beyond their caps, a line each.

    Args:
        config: The run configuration.
        schedule: Its schedule.
        curriculum: The data order, with every record that governs the run to its end.
    """
    found = []
    windows, length = curriculum.windows, config.data.sequence_length
    for number, stage in enumerate(config.curriculum):
        segments = schedule.stage_segments(number)
        if not stage.max_epochs or not segments:
            continue
        for source, count in curriculum.consumed(segments[-1].end_sample).items():
            cap = epoch_cap(stage, config.data, source)
            if cap is not None and count > cap[1] * windows[source]:
                said = over_cap(
                    stage.name, source, cap[1], Fraction(count * length), windows[source] * length
                )
                found.append(f"curriculum.{number}.max_epochs.{cap[0]}: {said}")
    return found


def most_shares(
    config: RunConfig, schedule: Schedule, curriculum: Curriculum, first_sample: int, end_sample: int
) -> dict[str, Fraction]:
    """The largest share of some samples that each source may have, if all others stay as they are planned.

    Args:
        config: The run configuration.
        schedule: Its schedule.
        curriculum: The data order, with every record that governs the run to its end.
        first_sample: The first of the samples, which are of one stage.
        end_sample: The first after them.

    Returns:
        By source, from 0 on; a source that no cap reaches is missing.
    """
    before, after = curriculum.consumed(first_sample), curriculum.consumed(end_sample)
    slack = 2 + len(before).bit_length()  # samples that a source may have above its share
    found: dict[str, Fraction] = {}
    for number, stage in enumerate(config.curriculum):
        segments = schedule.stage_segments(number)
        if not stage.max_epochs or not segments or segments[-1].end_sample <= first_sample:
            continue
        taken = curriculum.consumed(segments[-1].end_sample)
        for source, windows in curriculum.windows.items():
            if (cap := epoch_cap(stage, config.data, source)) is not None:
                others = taken[source] - (after[source] - before[source])
                share = (cap[1] * windows - others - slack) / (end_sample - first_sample)
                found[source] = min(found.get(source, share), max(share, Fraction(0)))
    return found


def check_caps(config: RunConfig, schedule: Schedule, curriculum: Curriculum) -> None:
    """Refuse a data order that takes more of a source than its cap allows. Arguments as of `cap_problems`.

    Raises:
        ConfigError: With every source and stage where it does.
    """
    if problems := cap_problems(config, schedule, curriculum):
        raise ConfigError(
            "The run would repeat a source more often than its cap allows.",
            where="curriculum",
            found="\n".join(problems[:12]),
            do="lower the source's share, shorten the stage, add text to the source, or raise the cap on purpose",
        )
