"""How often a source may be passed through: what the caps of the stages are, and whether their mixtures keep them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fractions import Fraction

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.problems import Place, Problem
from megatron_davinci.config.source_weights import source_weights
from megatron_davinci.config.units import format_tokens
from megatron_davinci.errors import ConfigError

ALL = "all"
"""The name that caps every source which has no cap of its own."""


def epoch_cap(stage: Stage, data: DataConfig, source: str) -> tuple[str, Fraction] | None:
    """The cap of a source at the end of a stage: the source's own, else its domain's, else everyone's.

    Returns:
        The key that says it, and how many passes it allows since the run's beginning; None without a cap.
    """
    for name in (source, data.domain(source), ALL):
        if name in stage.max_epochs:
            return name, Fraction(repr(stage.max_epochs[name]))
    return None


def repetition_problems(stages: Sequence[Stage], data: DataConfig) -> Iterator[Problem]:
    """Caps that name nothing, and stages that take more of a source than its cap allows.

    Sizes are those that the configuration declares; of a source that declares none, nothing is said here, and the
    source itself says it when the run starts.

    Args:
        stages: The curriculum, whose mixtures name known sources and domains.
        data: The sources.
    """
    known = {*data.sources, *(data.domain(source) for source in data.sources)}
    declared = {name: source.tokens for name, source in data.sources.items() if source.tokens}
    taken = dict.fromkeys(data.sources, Fraction(0))
    whole = True  # whether the shares of every stage so far are known
    for number, stage in enumerate(stages):
        place: Place = ("curriculum", number, "max_epochs")
        for name in stage.max_epochs:
            if name not in known and name != ALL:
                near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"
                yield (*place, name), f"{name} is no source and no domain{hint}"
        try:
            shares = source_weights(stage, data, declared)
        except ConfigError:
            whole = False
        if not whole:
            continue
        for source, share in shares.items():
            taken[source] += Fraction(share) * stage.tokens
        for source in sorted(data.sources):
            cap, size = epoch_cap(stage, data, source), declared.get(source)
            if cap is not None and size is not None and taken[source] > cap[1] * size:
                yield (*place, cap[0]), over_cap(stage.name, source, cap[1], taken[source], size)


def over_cap(stage: str, source: str, cap: Fraction, taken: Fraction | int, size: int) -> str:
    """What is said of a source that a stage takes too much of; in tokens."""
    return (
        f"by the end of stage {stage} the mixtures take {format_tokens(float(taken))} tokens of {source}, "
        f"{float(taken / Fraction(size)):.4g} passes through its {format_tokens(size)}; "
        f"at most {float(cap):g} passes are allowed"
    )
