"""Every item's score at every checkpoint, from what `davinci eval` keeps: `results.jsonl` and `samples/`.

Models are the checkpoints of one run or of several. Scores of two models are of the same items: an item is known by
its task, its number and a digest of its text, and what not all models have been asked is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.data.knowledge.facts import KINDS
from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.naming import GENERATION, LIKELIHOOD, format_of, otherwise, stem_of
from megatron_davinci.evaluate.results import read_records
from megatron_davinci.report.asked import fullest, way_of

# What counts of an item, the first that is there.
_METRICS = {
    "likelihood": ("acc",),
    "generation": ("exact_match", "pass@1", "pass_at_1"),
    "text": ("bits_per_byte",),
    **dict.fromkeys(KINDS, ("log_probability",)),
}
Key = tuple[str, int]


@dataclass(frozen=True)
class ItemScores:
    """A task's scores.

    Attributes:
        task: Its name.
        protocol: `likelihood`, `generation` or `text`; of probes of facts their kind.
        metric: What each score is; more is better, so of bits per byte it is the negative.
        models: Names.
        runs: The run of each model.
        steps: Of each model.
        tokens: Of each model, what its run had consumed; NaN where that is not known.
        items: (task, number) of each item; of a group the task is its member.
        scores: [models, items] float64.
        chosen: [models, items] float64, the right option's share of the probability of all options; NaN where items
            have no options.
        chance: Of guessing right, the mean over items; 0 where items have no options.
    """

    task: str
    protocol: str
    metric: str
    models: list[str]
    runs: list[str]
    steps: list[int]
    tokens: list[float]
    items: list[Key]
    scores: NDArray[np.float64]
    chosen: NDArray[np.float64]
    chance: float = 0.0

    def of(self, models: Sequence[str], items: Sequence[Key]) -> NDArray[np.float64]:
        """[models, items] of these only."""
        rows = [self.models.index(model) for model in models]
        places = {item: place for place, item in enumerate(self.items)}
        return self.scores[np.ix_(rows, [places[item] for item in items])]


@dataclass(frozen=True)
class _Asked:
    score: float
    chosen: float
    options: int
    target: str
    digest: str | None


def read_item_scores(runs: Sequence[str]) -> list[ItemScores]:
    """Scores by task, in the order of the record.

    Of a checkpoint that was asked a task more than once the record of most items counts. A task that was asked with
    other examples or texts is another task, `NAME (WAY)`.

    Args:
        runs: Run directories, `RUN@STEP` for one checkpoint, or folders with `results.jsonl`.

    Raises:
        DataError: A folder has no results, or none of a step, or a task's items are not the same in two models.
    """
    found: dict[tuple[str, str], dict[_Model, dict[Key, _Asked]]] = {}
    metrics: dict[tuple[str, str], str] = {}
    given = [_folder(run) for run in runs]
    folders = list(dict.fromkeys(folder for folder, *_ in given))
    names = _names([{name for at, name, _ in given if at == folder}.pop() for folder in folders], folders)
    counting = [_counting(folder, only) for folder, _, only in given]
    ways: dict[str, set[str]] = {}
    for record in (one for records in counting for one in records):
        ways.setdefault(stem_of(str(record["task"])), set()).add(way_of(record))
    for (folder, *_), records in zip(given, counting, strict=True):
        name = names[folders.index(folder)]
        for record in records:
            task, protocol, step = str(record["task"]), str(record["protocol"]), int(record["step"])
            if len(ways[stem_of(task)]) > 1 and (way := way_of(record)):
                task = otherwise(task, way)
            rows, metric = _items(folder, record, protocol)
            if not rows:
                continue
            tokens = record.get("tokens")
            model = _Model(
                f"{name}@{step}" if len(folders) > 1 else f"step {step}",
                name,
                step,
                float(tokens) if isinstance(tokens, int | float) else float("nan"),
            )
            found.setdefault((task, protocol), {})[model] = rows
            metrics[task, protocol] = metric
    return [_task(*key, metrics[key], by_model) for key, by_model in found.items()]


class _Model(NamedTuple):
    name: str
    run: str
    step: int
    tokens: float


def _names(names: list[str], folders: list[Path]) -> list[str]:
    """Runs by their names, or by where they are if two are called alike."""
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def _folder(run: str) -> tuple[Path, str, int | None]:
    path, _, step = run.rpartition("@") if re.search(r"@\d+$", run) else (run, "", "")
    given = Path(path)
    for folder in (given / "evals", given):
        if (folder / "results.jsonl").is_file():
            return folder, given.resolve().name, int(step) if step else None
    raise DataError(
        "Nothing has been measured here.",
        where=given,
        found="no evals/results.jsonl" if given.is_dir() else "no such folder",
        expected="a run that `davinci eval` has been asked about, RUN@STEP, or a folder of results",
        do=f"davinci eval {path} --suite local --follow",
    )


def _counting(folder: Path, only: int | None) -> list[dict[str, Any]]:
    """The records with metrics that count of each task and checkpoint, by step."""
    measured = [
        record
        for record in read_records(folder)
        if record.get("metrics") and all(isinstance(record.get(key), str) for key in ("task", "protocol"))
    ]
    if only is not None:
        steps = sorted({record["step"] for record in measured})
        if only not in steps:
            raise DataError(
                "Nothing has been measured at this step.",
                where=folder / "results.jsonl",
                found=f"steps {', '.join(map(str, steps))}" if steps else "no result",
                expected=f"step {only}",
                do="name one of these, or ask it first: davinci eval RUN@STEP",
            )
        measured = [record for record in measured if record["step"] == only]
    return sorted(fullest(measured, "step"), key=lambda record: int(record["step"]))


def _items(folder: Path, record: dict[str, Any], protocol: str) -> tuple[dict[Key, _Asked], str]:
    names = record.get("samples")
    if not isinstance(names, list) or not names:
        names = [one["task"] for one in record.get("tasks") or [record] if isinstance(one, dict)]
    found: dict[Key, _Asked] = {}
    chosen_metric = ""
    for name in names:
        kept = record.get("samples_in") or f"step-{record['step']:08d}"
        path = folder / "samples" / kept / f"{name}.jsonl"
        for doc, metric, asked in _rows(path, protocol):
            # Of several filters the first counts.
            if (key := (stem_of(str(name)), doc)) not in found:
                found[key] = asked
                chosen_metric = metric
    return found, chosen_metric


def _rows(path: Path, protocol: str) -> Iterator[tuple[int, str, _Asked]]:
    """Each item's number, what counts of it, and what came of it; without items that have nothing that counts."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            doc, target = int(row["doc"]), str(row["target"])
            metric = next((one for one in _METRICS.get(protocol, ()) if one in row), None)
            if metric is not None:
                yield doc, metric, _Asked(_number(row[metric]), *_share(row), target, row.get("item"))
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise DataError(
                "A line of kept answers is no answer.",
                where=f"{path}, line {number}",
                found=line[:80],
                expected="an object with `doc`, `target` and a number that was measured",
                do="remove the file and ask again: davinci eval computes nothing that is in answers/",
            ) from None


def _number(value: Any) -> float:
    """A score; of a text, lm-eval keeps its log-likelihood in nats and its bytes."""
    return float(value[0]) / float(value[1]) / math.log(2) if isinstance(value, list) else float(value)


def _share(row: dict[str, Any]) -> tuple[float, int]:
    """The right option's share of the probability of all options, and how many those are; 0 for none."""
    answers, target = row.get("answers"), row["target"]
    if not isinstance(answers, list) or not all(isinstance(one, list) and len(one) == 2 for one in answers):
        return float("nan"), 0
    if not isinstance(target, int) or not 0 <= target < len(answers):
        return float("nan"), 0
    logs = np.array([float(one[0]) for one in answers])
    shares = np.exp(logs - logs.max())
    return float(shares[target] / shares.sum()), len(answers)


def _task(task: str, protocol: str, metric: str, by_model: dict[_Model, dict[Key, _Asked]]) -> ItemScores:
    models = list(by_model)
    items = [key for key in by_model[models[0]] if all(key in rows for rows in by_model.values())]
    for item in items:
        digests = {rows[item].digest for rows in by_model.values()} - {None}
        if len(digests) > 1 or len({rows[item].target for rows in by_model.values()}) > 1:
            raise DataError(
                "Two models were not asked the same items.",
                where=f"{task}, item {item[1]}",
                found=f"different items in {', '.join(model.name for model in models)}",
                expected="the same text and answer",
                do="give all of them the same texts (--suite local --texts NAME=FILE) or data, and ask again",
            )

    def array(what: str) -> NDArray[np.float64]:
        return np.array([[getattr(rows[item], what) for item in items] for rows in by_model.values()])

    return ItemScores(
        task,
        protocol,
        metric,
        [model.name for model in models],
        [model.run for model in models],
        [model.step for model in models],
        [model.tokens for model in models],
        items,
        array("score"),
        array("chosen"),
        float(
            np.mean([1 / asked.options if asked.options else 0.0 for asked in by_model[models[0]].values()])
        ),
    )


def pairs_of_protocols(tasks: Sequence[ItemScores]) -> Iterator[tuple[str, ItemScores, ItemScores]]:
    """Tasks that were asked in both ways: (name, by likelihood, by generation)."""
    plain = [task for task in tasks if format_of(task.task) is None]
    by_likelihood = {stem_of(task.task): task for task in plain if task.protocol == LIKELIHOOD}
    for task in plain:
        one = by_likelihood.get(stem_of(task.task))
        if task.protocol == GENERATION and one is not None:
            yield stem_of(task.task), one, task


def formats_of(tasks: Sequence[ItemScores]) -> Iterator[tuple[str, dict[str, ItemScores]]]:
    """Tasks that were asked in several formats: (name, by format, as it is first)."""
    found: dict[str, dict[str, ItemScores]] = {}
    for task in tasks:
        if task.protocol == LIKELIHOOD:
            found.setdefault(stem_of(task.task), {})[format_of(task.task) or "as it is"] = task
    for name, by_format in found.items():
        if len(by_format) > 1:
            yield name, by_format
