"""A run's files turned into what its page tells: stages, mixture by domain, held-out loss by domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.report.axes import Stage
from megatron_davinci.report.colors import assign
from megatron_davinci.report.run_files import RunFiles
from megatron_davinci.report.run_metrics import Metrics

_RECIPE_ORDER = ("general", "code", "science", "math", "qa")


@dataclass(frozen=True)
class StageRun:
    """What one stage of the run did.

    Args:
        name: The stage.
        first: Index of its first step in the metrics.
        last: Index of its last step.
        start: Tokens consumed before it.
        end: Tokens consumed at its end.
        mixture: `{domain: share}` of the samples that it drew.
    """

    name: str
    first: int
    last: int
    start: float
    end: float
    mixture: dict[str, float]


@dataclass(frozen=True)
class Mixture:
    """Shares by domain over the run: `shares[domain][i]` holds from `edges[i]` to `edges[i + 1]` tokens."""

    edges: NDArray[np.float64]
    shares: dict[str, NDArray[np.float64]]

    def between(self, start: float, end: float) -> dict[str, float]:
        """`{domain: share}` of what was drawn from `start` to `end` tokens; empty where nothing is known."""
        widths = np.clip(self.edges[1:], start, end) - np.clip(self.edges[:-1], start, end)
        if widths.sum() <= 0:
            return {}
        means = {domain: float(values @ widths / widths.sum()) for domain, values in self.shares.items()}
        return {domain: share for domain, share in means.items() if share > 0}


class RunStory:
    """Everything about a run that its plots and tables share.

    Args:
        files: The run directory.
    """

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self.metrics = files.metrics
        self.tokens = _tokens(files)
        self.domains = _domain_order(files)
        self.colours = assign(self.domains)
        self.mixture = self._mixture()
        self.stages = self._stages()
        self.stage_ranges = [Stage(stage.name, stage.start, stage.end) for stage in self.stages]
        last = files.evaluations[-1].heldout_loss if files.evaluations else {}
        self.final_loss = files.domain_numbers("heldout_loss") or last
        # Of the same evaluation as the loss, or of none.
        bits = files.evaluations[-1].bits_per_byte if files.evaluations else {}
        self.final_bits = bits if self.final_loss == last else files.domain_numbers("heldout_bits_per_byte")
        self.bigram_loss = files.domain_numbers("bigram_loss")

    @property
    def consumed_tokens(self) -> float:
        """Tokens consumed so far."""
        return float(self.tokens[-1]) if len(self.tokens) else 0.0

    @property
    def is_timed(self) -> bool:
        """Whether the run gives a figure of its own, which has evaluations and saves in it."""
        return isinstance(self.files.summary.get("seconds"), int | float)

    @property
    def seconds(self) -> float:
        """The run's own figure where it gives one, or time in the steps that count; not a number if unknown."""
        if self.is_timed:
            return float(self.files.summary["seconds"])
        seconds = self.metrics["seconds"]
        return float(np.nansum(seconds)) if np.isfinite(seconds).any() else float("nan")

    def _mixture(self) -> Mixture:
        """The journal in tokens and by domain, up to what was consumed; records of the same mixture are joined."""
        length, end = self.files.sequence_length, self.consumed_tokens
        edges: list[float] = []
        rows: list[dict[str, float]] = []
        for mix in self.files.mixes:
            start = mix.first_sample * length
            if not start < end:  # also where the sequence length is unknown
                continue
            row: dict[str, float] = {}
            for source, weight in mix.weights.items():
                domain = self.files.domains.get(source, source)
                row[domain] = row.get(domain, 0.0) + weight
            if not rows or row != rows[-1]:
                edges.append(start)
                rows.append(row)
        names = [domain for domain in self.domains if any(domain in row for row in rows)]
        shares = {name: np.array([row.get(name, 0.0) for row in rows]) for name in names}
        return Mixture(np.array([*edges, end] if rows else [], dtype=np.float64), shares)

    def _stages(self) -> list[StageRun]:
        stages = []
        names = self.metrics.stage
        firsts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        for first, after in zip(firsts, [*firsts[1:], len(names)]):
            start = 0.0 if first == 0 else float(self.tokens[first - 1])
            end = float(self.tokens[after - 1])
            mixture = self.mixture.between(start, end) if len(self.mixture.edges) else {}
            stages.append(StageRun(names[first], first, after - 1, start, end, mixture))
        return stages


def _tokens(files: RunFiles) -> NDArray[np.float64]:
    """Tokens consumed at each step, `[n]`; where a line lacks them they follow from the samples."""
    metrics: Metrics = files.metrics
    tokens = metrics["consumed_tokens"]
    if np.isfinite(tokens).all():
        return tokens
    tokens = np.where(np.isfinite(tokens), tokens, metrics["consumed_samples"] * files.sequence_length)
    return np.maximum.accumulate(np.where(np.isfinite(tokens), tokens, 0.0))


def _domain_order(files: RunFiles) -> list[str]:
    """Every domain that the run names, those of the recipe first and in its order."""
    names: set[str] = set()
    for evaluation in files.evaluations:
        names |= set(evaluation.heldout_loss)
    for key in ("heldout_loss", "bigram_loss"):
        names |= set(files.domain_numbers(key))
    for mix in files.mixes:
        names |= {files.domains.get(source, source) for source in mix.weights}
    known = {name: rank for rank, name in enumerate(_RECIPE_ORDER)}
    return sorted(names, key=lambda name: (known.get(name.lower(), len(known)), name))
