"""Do the transforms of the stages fit the sources, the tokenizer and the vocabulary? All that does not, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.problems import Place, Problem
from megatron_davinci.config.source_weights import mixed_sources
from megatron_davinci.config.transforms import FillInTheMiddle

MOST_WEIGHT = 2**31 - 1
"""Megatron-Core adds up the labels of a global batch in an int32, on each rank and over all."""


def metadata_of(stage: Stage, data: DataConfig) -> dict[str, str]:
    """The metadata that documents of a stage begin with, by source; a source without any has none."""
    if stage.transforms.metadata_prefix is None:
        return {}
    texts = {name: data.sources[name].metadata for name in mixed_sources(stage, data)}
    return {name: text for name, text in texts.items() if text is not None}


def filled_sources(stage: Stage, data: DataConfig) -> list[str]:
    """The sources of a stage whose documents are made to fill in."""
    settings = stage.transforms.fill_in_the_middle
    if settings is None:
        return []
    return [
        name
        for name in mixed_sources(stage, data)
        if name in settings.sources or data.domain(name) in settings.domains
    ]


def recorded(stage: Stage, data: DataConfig) -> dict[str, Any]:
    """What is done to a stage's samples, as the journal keeps it: plain values, and nothing where nothing is done."""
    settings = stage.transforms
    defaults = type(settings)()
    found = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if getattr(settings, name) != getattr(defaults, name)
    }
    if settings.metadata_prefix is not None:
        found["metadata_prefix"]["metadata"] = metadata_of(stage, data)
    if settings.fill_in_the_middle is not None:
        # Which sources they are, however they were named.
        del found["fill_in_the_middle"]["domains"]
        found["fill_in_the_middle"]["sources"] = filled_sources(stage, data)
    return found


def transform_problems(
    number: int, stage: Stage, data: DataConfig, vocab_size: int, sequence_length: int
) -> Iterator[Problem]:
    """What is wrong with a stage's transforms. Its mixture has known sources only.

    Args:
        number: Of the stage, from 0 on.
        stage: The stage.
        data: The sources and the tokenizer.
        vocab_size: Of the model.
        sequence_length: Labels a sample.
    """
    where: Place = ("curriculum", number, "transforms")
    weight = stage.transforms.label_weights[1]
    largest = max(phase.size for phase in stage.global_batch_size)
    total = largest * sequence_length * weight
    if total > MOST_WEIGHT:
        by = f" of weight {weight}" if weight > 1 else ""
        yield (
            ("curriculum", number, "global_batch_size") if weight == 1 else (*where, "prompt_loss_weight"),
            f"{largest} sequences of {sequence_length} labels{by} make {total:,}, and Megatron-Core counts "
            f"to {MOST_WEIGHT:,}: lower the batch size"
            + (", or take a prompt_loss_weight of fewer parts (0.5 has two)" if weight > 1 else ""),
        )
    if stage.transforms.metadata_prefix is not None:
        prefix: Place = (*where, "metadata_prefix")
        if data.tokenizer is None:
            yield prefix, "data.tokenizer is not set, and metadata is text"
        if not metadata_of(stage, data):
            yield (
                prefix,
                "no source of the stage has metadata "
                f"(data.sources.NAME.metadata of {', '.join(mixed_sources(stage, data))})",
            )
    if stage.transforms.fill_in_the_middle is not None:
        settings, filling = stage.transforms.fill_in_the_middle, (*where, "fill_in_the_middle")
        yield from _filling_problems(filling, settings, data, vocab_size)
        if not filled_sources(stage, data):
            yield (
                filling,
                f"the stage mixes no source of {', '.join([*settings.sources, *settings.domains])}",
            )


def _filling_problems(
    where: Place, settings: FillInTheMiddle, data: DataConfig, vocab_size: int
) -> Iterator[Problem]:
    domains = {data.domain(name) for name in data.sources}
    for kind, asked, known in (
        ("sources", settings.sources, set(data.sources)),
        ("domains", settings.domains, domains),
    ):
        if unknown := sorted(set(asked) - known):
            yield (*where, kind), f"unknown {', '.join(unknown)}; there are {', '.join(sorted(known))}"
    for name in ("prefix_token", "suffix_token", "middle_token"):
        token = getattr(settings, name)
        if isinstance(token, str) and data.tokenizer is None:
            yield (*where, name), f"data.tokenizer is not set, so {token!r} has no id; give the id"
        if isinstance(token, int) and token >= vocab_size:
            yield (*where, name), f"{token} is not in the vocabulary; model.vocab_size is {vocab_size}"
