"""What `davinci eval` has measured of a run's checkpoints: `evals/results.jsonl`, and its plots over tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_davinci.report.asked import fullest, limited, way_of
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import SERIES
from megatron_davinci.report.plots import LinePlot, Plot, Series, Stage

# A trajectory's signal over its noise; a room beside this one knows it.
Worth = Callable[[np.ndarray], float]


class Finding(NamedTuple):
    """What another room has found out about what was measured, for the page.

    Attributes:
        title: Of its section.
        text: What is to be read there.
        headers: Of its table.
        rows: Of its table.
    """

    title: str
    text: str
    headers: list[str]
    rows: list[list[str]]


TOKENS = Axis("tokens consumed", "tokens", zero=True)
AT_ONCE = 6  # lines of a plot
NORMAL = 1.96  # standard errors of a 95% band
MOST_BANDS = 2  # of a plot: more lie over each other, and none can be told from the next

_SHARES = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1")  # fractions of 1
# What counts of a task, the first that is there; the rest is in the file.
_MAIN = (*_SHARES, "bits_per_byte", "bits_per_parameter", "log_probability", "rank_me")


@dataclass(frozen=True)
class TaskLine:
    """A task's trajectory.

    Attributes:
        task: Its name.
        protocol: How it was asked.
        metric: What was measured.
        tokens: [n] float64, rising.
        values: [n].
        errors: [n], standard errors; NaN where there is none.
        limits: [n], of how many items each is, in words; empty where all were asked.
        way: How it was asked, where it was asked in several ways that are not to be mixed.
    """

    task: str
    protocol: str
    metric: str
    tokens: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    limits: tuple[str, ...] = ()
    way: str = ""

    def limit(self, place: int) -> str:
        """What is said beside a value that is not of all items."""
        return f" ({self.limits[place]})" if self.limits and self.limits[place] else ""


def read_tasks(run: Path) -> list[TaskLine]:
    """The trajectories that are on record; of a task and checkpoint the record of most items counts, then the last.

    A task that was asked with other examples or texts is another trajectory. Lines that cannot be read are left out:
    somebody may be writing one.
    """
    points: dict[tuple[str, str, str, str], dict[float, tuple[float, float, str]]] = {}
    ways: dict[str, set[str]] = {}
    kept = list(_lines(run / "evals" / "results.jsonl"))
    records = (record for record in (*_in_the_loop(run, kept), *kept) if _metrics_of(record))
    for record in fullest(records, "tokens"):
        way, words = way_of(record), limited(record)
        for task, protocol, metric, value, error in _metrics_of(record):
            ways.setdefault(task, set()).add(way)
            line = points.setdefault((task, protocol, metric, way), {})
            line[float(record["tokens"])] = value, error, words
    found = []
    for (task, protocol, metric, way), measured in points.items():
        tokens = sorted(measured)
        values, errors, limits = zip(*(measured[one] for one in tokens), strict=True)
        found.append(
            TaskLine(
                task,
                protocol,
                metric,
                np.array(tokens, np.float64),
                np.array(values, np.float64),
                np.array(errors, np.float64),
                limits=limits,
                way=way if len(ways[task]) > 1 else "",
            )
        )
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _in_the_loop(run: Path, kept: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was asked beside the held-out loss, as `davinci eval` would have written it: of a few items each."""
    shots = {
        str(record.get("task")): record.get("shots") for record in kept if record.get("suite") == "local"
    }
    for record in _lines(run / "evals.jsonl"):
        tasks = record.get("tasks")
        for name, scores in tasks.items() if isinstance(tasks, dict) else ():
            if isinstance(scores, dict):
                measured = ("rank_me", "alpha_req") if name == "geometry" else ("acc", "acc_norm")
                metrics = {f"{metric},none": scores.get(metric) for metric in measured}
                errors = {f"{metric},none": scores.get(f"{metric}_stderr") for metric in measured}
                yield {
                    "task": name,
                    "protocol": "states" if name == "geometry" else "likelihood",
                    "tokens": record.get("consumed_tokens"),
                    "shots": shots.get(name),
                    "items": scores.get("items"),
                    "limit": scores.get("items", 0),
                    "metrics": metrics,
                    "errors": errors,
                }


def task_plots(lines: Sequence[TaskLine], stages: Sequence[Stage]) -> list[Plot]:
    """Plots of those that were measured at two checkpoints at least, by how they were asked.

    Tasks with standard errors are drawn by twos, each with its band, and these plots side by side.
    """
    titles = {
        "likelihood": ("Benchmarks, by likelihood", Axis("share of items", "%", zero=True)),
        "generation": ("Benchmarks, by generation", Axis("share of items", "%", zero=True)),
        "text": ("Bits of text", Axis("bits per byte", "")),
        "capacity": ("Bits of biographies", Axis("bits a parameter", "")),
        "memorisation": ("Made-up facts, as they were told", Axis("log-probability", "nats")),
        "semantic": ("Made-up facts, in other words", Axis("log-probability", "nats")),
        "composition": ("Made-up facts, from two sentences", Axis("log-probability", "nats")),
        "states": ("Directions in use", Axis("RankMe", "")),
        "mean": ("Means of the suite", Axis("score", "")),
    }
    plots: list[Plot] = []
    kinds = [(protocol, "", title, axis) for protocol, (title, axis) in titles.items()]
    # A user's task may count in a measure of its own: BLEU is no share of items.
    others = {line.metric: None for line in lines if _is_other(line)}
    kinds[2:2] = [
        (protocol, metric, f"{titles[protocol][0]}: {metric}", Axis(metric, ""))
        for metric in others
        for protocol in ("likelihood", "generation")
    ]
    for protocol, metric, title, axis in kinds:
        chosen = [
            line
            for line in lines
            if line.protocol == protocol
            and len(line.tokens) > 1
            and (line.metric == metric if metric else not _is_other(line))
        ]
        banded = any(np.isfinite(line.errors).any() for line in chosen)
        at_once = MOST_BANDS if banded else AT_ONCE
        for first in range(0, len(chosen), at_once):
            part = chosen[first : first + at_once]
            scale = 100.0 if axis.unit == "%" else 1.0
            number = f", {first // at_once + 1}" if len(chosen) > at_once else ""
            plots.append(
                LinePlot(
                    title=title + number,
                    x=TOKENS,
                    y=axis,
                    series=[_series(*one, scale, banded) for one in zip(part, SERIES, strict=False)],
                    stages=stages,
                    note="; ".join(
                        ["bands: 95%"] * banded + [_mixed(line) for line in part if len({*line.limits}) > 1]
                    ),
                    half=banded and len(chosen) > at_once,
                )
            )
    return plots


def _is_other(line: TaskLine) -> bool:
    return line.protocol in ("likelihood", "generation") and line.metric not in _SHARES


def task_table(lines: Sequence[TaskLine], worth: Worth | None) -> tuple[list[str], list[list[str]]]:
    """First and last value of each task, and how well checkpoints are told apart by it."""
    rows = []
    for line in lines:
        ratio = worth(line.values) if worth is not None else float("nan")
        error = line.errors[-1]
        rows.append(
            [
                line.task + (f" ({line.way})" if line.way else ""),
                line.protocol,
                line.metric,
                f"{line.values[0]:.4g}" + line.limit(0),
                f"{line.values[-1]:.4g}" + (f" ± {error:.2g}" if np.isfinite(error) else "") + line.limit(-1),
                str(len(line.values)),
                f"{ratio:.1f}" if np.isfinite(ratio) else "",
            ]
        )
    return ["Task", "Asked by", "Metric", "First", "Last", "Checkpoints", "Signal / noise"], rows


def _series(line: TaskLine, colour: str, scale: float, banded: bool) -> Series:
    known = banded and np.isfinite(line.errors).any()
    name = _short(line)
    band = scale * NORMAL * line.errors if known else None
    return Series(name=name, x=line.tokens, y=scale * line.values, colour=colour, band=band)


def _short(line: TaskLine) -> str:
    """A name for a plot whose title says the protocol."""
    return line.task.removesuffix(f"_{line.protocol}") + (f" ({line.way})" if line.way else "")


def _mixed(line: TaskLine) -> str:
    """What is said below a trajectory whose values are not alike in their noise."""
    return f"{_short(line)}: with a limit at {sum(map(bool, line.limits))} of {len(line.limits)} checkpoints"


def _metrics_of(record: Any) -> list[tuple[str, str, str, float, float]]:
    """(task, protocol, metric, value, standard error) of a line that is about a checkpoint in its run."""
    if not isinstance(record, dict) or not isinstance(record.get("tokens"), int | float):
        return []
    if isinstance(record.get("means"), dict):
        return [
            (str(group), "mean", "score", float(mean["score"]), float("nan"))
            for group, mean in record["means"].items()
            if isinstance(mean, dict)
            and isinstance(mean.get("score"), int | float)
            and not mean.get("missing")
        ]
    if "@" in str(record.get("task")):
        return []  # a task in another format, which is no trajectory of its own
    metrics, errors = record.get("metrics"), record.get("errors")
    if not isinstance(metrics, dict) or not metrics:
        return []
    names = {str(name).partition(",")[0]: str(name) for name in metrics}
    main = next((name for name in _MAIN if name in names), next(iter(names)))
    name = names[main]
    value, error = metrics[name], errors.get(name) if isinstance(errors, dict) else None
    if not isinstance(value, int | float):
        return []
    spread = float(error) if isinstance(error, int | float) else float("nan")
    return [(str(record.get("task")), str(record.get("protocol")), main, float(value), spread)]
