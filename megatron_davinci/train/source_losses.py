"""The training loss by source and by domain: what the samples of each cost, how many tokens, how far through it is.

Which sample is of which source is known before anything is computed. On the device each row's loss and weight are
added to its source's, and these few numbers travel with the step's own loss, so nothing more is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.data.curriculum import Curriculum

SourceRecord = dict[str, Any]


def add_by_source(
    rows: Sequence[Tensor], source: Tensor | None, sources: int, device: torch.device
) -> Tensor:
    """Add up rows by their source.

    Args:
        rows: For each micro-batch [rows, 3] float64, what is to be added up.
        source: [rows of all micro-batches] int64, each row's source; None where all are of one.
        sources: How many sources there are.
        device: Where it is computed.

    Returns:
        [sources, 3] float64.
    """
    total = torch.zeros(sources, 3, dtype=torch.float64, device=device)
    if rows:
        every = torch.cat(list(rows))
        if source is None:
            source = torch.zeros(len(every), dtype=torch.int64, device=device)
        total.index_add_(0, source, every)
    return total


def source_records(
    curriculum: Curriculum,
    first_sample: int,
    batch: int,
    sequence_length: int,
    sums: Sequence[tuple[float, float]],
) -> dict[str, SourceRecord]:
    """What a step says of each source that it took samples of.

    Args:
        curriculum: Says how many samples were of which source.
        first_sample: The step's first.
        batch: Its samples.
        sequence_length: Tokens a sample.
        sums: By the sources' places: the loss in nats, summed by the labels' weights, and the weights' sum.

    Returns:
        By source: `loss`, the mean over its labels by their weights, in nats a token, None where none carries loss;
        `tokens` that were taken; `weight`, of its labels together, in the unit of every source; `epoch`, how often
        the source has been passed through after the step.
    """
    before, after = curriculum.consumed(first_sample), curriculum.consumed(first_sample + batch)
    found = {}
    for (name, windows), (loss, weight) in zip(curriculum.windows.items(), sums, strict=True):
        samples = after[name] - before[name]
        if samples:
            found[name] = {
                "loss": round(loss / weight, 6) if weight else None,
                "tokens": samples * sequence_length,
                "weight": round(weight),
                "epoch": round(after[name] / windows, 6),
            }
    return found


def loss_by_domain(
    steps: Iterable[Mapping[str, SourceRecord]], domains: Mapping[str, str]
) -> dict[str, float]:
    """The training loss of each domain over some steps, by the weights of its sources, in nats a token.

    Args:
        steps: The records of their sources.
        domains: The domain of each source; one that is not there is its own.
    """
    sums: dict[str, list[float]] = {}
    for sources in steps:
        for name, record in sources.items():
            if record["loss"] is not None:
                total = sums.setdefault(domains.get(name, name), [0.0, 0.0])
                total[0] += record["loss"] * record["weight"]
                total[1] += record["weight"]
    return {domain: loss / weight for domain, (loss, weight) in sums.items()}
