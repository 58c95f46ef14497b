"""All comparisons of what was measured: protocols, formats, early and late checkpoints, fewer items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_davinci.evaluate.foresight import Course, Foretold, courses, foretold, memories, subsets
from megatron_davinci.evaluate.item_scores import ItemScores, formats_of, pairs_of_protocols
from megatron_davinci.evaluate.results import finite
from megatron_davinci.stats.formats import FormatSpread, format_spread
from megatron_davinci.stats.memory import Memory
from megatron_davinci.stats.rankings import Agreement, compare_rankings
from megatron_davinci.stats.subsets import DiscriminativeSubset


@dataclass(frozen=True)
class InFormats:
    """A task at one model in several formats.

    Attributes:
        task: Its name.
        model: Which.
        formats: Names, in the order of `spread.means`.
        spread: What they do.
    """

    task: str
    model: str
    formats: list[str]
    spread: FormatSpread


@dataclass(frozen=True)
class Compared:
    """What conclusions depend on.

    Attributes:
        protocols: By task, how its rankings by likelihood and by generation agree.
        formats: Of each task and model.
        courses: Of each task and run, what its early checkpoints say of its last.
        foretold: How early measurements of several runs have the runs' order at the end.
        memories: What became of made-up facts, by probes and run.
        subsets: Of each task, the fewest items that rank alike.
    """

    protocols: dict[str, Agreement]
    formats: list[InFormats]
    courses: list[Course]
    foretold: list[Foretold]
    memories: list[tuple[ItemScores, str, Memory]]
    subsets: list[tuple[ItemScores, DiscriminativeSubset]]

    def record(self) -> dict[str, Any]:
        """As JSON; what is no number is null."""
        protocols = {}
        for task, agreement in self.protocols.items():
            pairs = [
                asdict(pair) | {"flips": pair.flips, "reversed": pair.reversed} for pair in agreement.pairs
            ]
            protocols[task] = asdict(agreement) | {"pairs": pairs}
        formats = [asdict(one) for one in self.formats]
        subsets = [
            asdict(subset)
            | {
                "task": task.task,
                "protocol": task.protocol,
                "models": task.models,
                "found": subset.found,
                "items": [list(task.items[item]) for item in subset.items] if subset.found else None,
            }
            for task, subset in self.subsets
        ]
        record: dict[str, Any] = finite(
            {
                "protocols": protocols,
                "formats": formats,
                "courses": [asdict(one) for one in self.courses],
                "foretold": [asdict(one) for one in self.foretold],
                "memories": [
                    {"task": task.task, "kind": task.protocol, "run": run} | asdict(one)
                    for task, run, one in self.memories
                ],
                "subsets": subsets,
            }
        )
        return record


def compare(tasks: Sequence[ItemScores], seed: int = 0) -> Compared:
    """Compare whatever can be compared.

    Args:
        tasks: As `read_item_scores` gives them.
        seed: Of what is resampled.
    """
    return Compared(
        _protocols(tasks, seed),
        _formats(tasks),
        courses(tasks),
        foretold(tasks),
        memories(tasks),
        subsets(tasks, seed),
    )


def _protocols(tasks: Sequence[ItemScores], seed: int) -> dict[str, Agreement]:
    found = {}
    for name, one, other in pairs_of_protocols(tasks):
        models = [model for model in one.models if model in other.models]
        shared = {*other.items}
        items = [item for item in one.items if item in shared]
        if len(models) > 1 and len(items) > 1:
            scores = one.of(models, items), other.of(models, items)
            found[name] = compare_rankings(models, *scores, seed=seed)
    return found


def _formats(tasks: Sequence[ItemScores]) -> list[InFormats]:
    found = []
    for name, by_format in formats_of(tasks):
        first = next(iter(by_format.values()))
        for model in first.models:
            there = {form: task for form, task in by_format.items() if model in task.models}
            shared = set.intersection(*({*task.items} for task in there.values()))
            items = [item for item in first.items if item in shared]
            if len(there) > 1 and len(items) > 1:
                scores = [task.of([model], items)[0] for task in there.values()]
                found.append(InFormats(name, model, list(there), format_spread(scores)))
    return found
