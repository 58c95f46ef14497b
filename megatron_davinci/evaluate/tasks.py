"""lm-eval's tasks: found, checked item by item, run one after the other, and what they came to."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from megatron_davinci.errors import ConfigError, DataError, DavinciError
from megatron_davinci.evaluate import code_runs, harness
from megatron_davinci.evaluate.code_tasks import CODE_TASKS
from megatron_davinci.evaluate.harness import FATAL, NativeLM
from megatron_davinci.platform.sandbox import NoSandbox

# lm-eval's own default, so that the same examples are shown.
FEWSHOT_SEED = 1234
# How an item is put, by lm-eval's `output_type`.
PROTOCOLS = {
    "multiple_choice": "likelihood",
    "loglikelihood": "likelihood",
    "loglikelihood_rolling": "text",
    "generate_until": "generation",
}
_SHOWN = 5  # items that an error names


@dataclass(frozen=True)
class TaskResult:
    """What a task came to.

    Attributes:
        task: Its name.
        protocol: `likelihood` (the likeliest option), `text` (a text's likelihood), `generation`; `mixed` for a group
            of several.
        shots: Examples before each item; None where a group's tasks differ.
        items: How many were asked.
        metrics: By `name,filter`, as lm-eval has it; empty where it came to nothing.
        errors: Standard errors, likewise, where there are any.
        troubles: Items by what went wrong with them.
        problem: Why there are no metrics; None where there are.
        samples: Of each item: number, answers, and metrics.
        tasks: What a group's tasks came to.
    """

    task: str
    protocol: str | None = None
    shots: int | None = None
    items: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    troubles: dict[str, int] = field(default_factory=dict)
    problem: str | None = None
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tasks: list[TaskResult] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As one JSON line, without the samples."""
        whole: dict[str, Any] = {
            "task": self.task,
            "protocol": self.protocol,
            "shots": self.shots,
            "items": self.items,
            "metrics": self.metrics,
            "errors": self.errors,
            "troubles": self.troubles,
        }
        if self.samples:
            whole["samples"] = list(self.samples)
            whole["asked"] = _digest(self.samples)
        if self.problem:
            whole["problem"] = self.problem
        if self.tasks:
            whole["tasks"] = [task.record() for task in self.tasks]
        return whole


class Tasks:
    """Where tasks are found by name.

    Args:
        include: Folders with tasks of one's own, as lm-eval's YAML files.

    Raises:
        ConfigError: A folder is not there.
    """

    def __init__(self, include: Sequence[Path]) -> None:
        for folder in include:
            if not folder.is_dir():
                raise ConfigError(
                    "The folder of tasks is not there.", where=folder, do="check --include-path"
                )
        self._include = [str(folder) for folder in include]
        # lm-eval has some fifteen thousand tasks of its own, which take a minute to list.
        self._own = TaskManager(include_path=self._include or None, include_defaults=False)
        self._all: TaskManager | None = None

    def manager(self, name: str) -> TaskManager:
        """The manager that knows a task, group or tag of this name.

        Raises:
            ConfigError: None does; the nearest names are listed.
        """
        if name in self._own.all_tasks:
            return self._own
        if self._all is None:
            with _quiet():
                self._all = TaskManager(include_path=self._include or None)
        if name not in self._all.all_tasks:
            import difflib

            near = difflib.get_close_matches(name, self._all.all_tasks, 5)
            raise ConfigError(
                "There is no task of this name.",
                where=f"--tasks {name}",
                found=f"the nearest: {', '.join(near)}" if near else "nothing like it",
                expected="a task, group or tag of lm-eval, or of a folder given with --include-path",
            )
        return self._all


def run_task(
    lm: NativeLM,
    label: str,
    load: Callable[[], Mapping[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    bootstrap: int = 1000,
) -> TaskResult:
    """Run one task, or one group of tasks.

    What is wrong with the task alone (its data is not there, its items are malformed, an answer is no answer) is said
    in the result, which then has no metrics: a score of a part of the items would look like one of all.

    Args:
        lm: The model.
        label: What it is called.
        load: Loads it, as `TaskManager.load` gives it: one task, or a group's.
        shots: Examples before each item; None for what the task says.
        limit: The first so many items of each task only; None for all.
        bootstrap: Resamples for standard errors of metrics that need them.
    """
    try:
        with _quiet():
            loaded = load()
    except DataError as error:
        return TaskResult(label, problem=f"{error.what} {error.found}")
    except Exception as error:  # whatever datasets and lm-eval raise: one task's trouble
        return TaskResult(label, problem=f"it could not be loaded: {_said(error)}")
    tasks: Mapping[str, Task] = loaded["tasks"]
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    if problem := "; ".join(filter(None, (_malformed(task, limit) for task in tasks.values()))):
        return TaskResult(label, problem=problem, **_facts(tasks))
    lm.begin()
    try:
        with _quiet():
            answered = evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=bootstrap,
                confirm_run_unsafe_code=False,
            )
    except NoSandbox as error:
        problem = f"nothing keeps the model's code in: {_said(error)}"
        return TaskResult(label, problem=problem, **_facts(tasks))
    except DavinciError:
        raise
    except Exception as error:  # its templates, filters and metrics may raise anything
        if _of_the_model(error):
            raise
        return TaskResult(label, problem=_problem_with_asking(error), **_facts(tasks))
    return _collect(label, tasks, answered, lm)


def _of_the_model(error: Exception) -> bool:
    """Whether it was raised while the model was at work, and is no trouble of the task's."""
    return any(
        frame.f_code.co_filename == harness.__file__ for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _problem_with_asking(error: Exception) -> str:
    said = str(error)
    if isinstance(error, ValueError) and "unsafe" in said:
        return f"it runs code that a model wrote, outside the sandbox: {', '.join(CODE_TASKS)} run in it"
    if isinstance(error, AssertionError) and "fewshot samples requested" in said:
        return f"it has too few examples: {_said(error)}"
    return f"its examples, filters or metrics fail: {_said(error)}"


def _collect(label: str, tasks: Mapping[str, Task], answered: Mapping[str, Any], lm: NativeLM) -> TaskResult:
    counts = {
        name: {kind: sum(task == name for task, _ in items) for kind, items in lm.troubles.items.items()}
        for name in tasks
    }
    results = []
    for name, task in tasks.items():
        troubles = {kind: count for kind, count in counts[name].items() if count}
        troubles |= code_runs.stopped(answered["samples"][name])
        fatal = [
            f"{count} of {answered['n-samples'][name]['effective']} items: {kind}"
            for kind, count in troubles.items()
            if kind in FATAL
        ]
        metrics, errors = _numbers(answered["results"][name])
        not_finite = [metric for metric, value in metrics.items() if not math.isfinite(value)]
        if not_finite and not fatal:
            fatal.append(f"{', '.join(not_finite)} came out as no number")
        results.append(
            TaskResult(
                name,
                protocol=PROTOCOLS[task.OUTPUT_TYPE],
                shots=task.get_config("num_fewshot"),
                items=answered["n-samples"][name]["effective"],
                metrics={} if fatal else metrics,
                errors={} if fatal else errors,
                troubles=troubles,
                problem="; ".join(fatal) or None,
                samples={name: [_sample(one) for one in answered["samples"][name]]},
            )
        )
    groups = [name for name in answered["results"] if name not in tasks]
    if len(tasks) == 1 and not groups:
        return replace(results[0], task=label)
    # Of nested groups the outermost is the first.
    metrics, errors = _numbers(answered["results"][groups[0]]) if groups else _weighted(results)
    problems = [f"{one.task}: {one.problem}" for one in results if one.problem]
    return TaskResult(
        label,
        **_facts(tasks),
        metrics={} if problems else metrics,
        errors={} if problems else errors,
        troubles={
            kind: sum(one.troubles.get(kind, 0) for one in results)
            for kind in dict.fromkeys(kind for one in results for kind in one.troubles)
        },
        problem="; ".join(problems) or None,
        samples={name: rows for one in results for name, rows in one.samples.items()},
        tasks=results,
    )  # fmt: skip


def _weighted(results: Sequence[TaskResult]) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the items of tasks that are a group and say no metrics of their own."""
    results = _named_alike(results)
    common = set.intersection(*({*one.metrics} for one in results))
    items = sum(one.items for one in results)
    return {name: sum(one.metrics[name] * one.items for one in results) / items for name in sorted(common)}, {
        name: math.sqrt(sum((one.errors.get(name, math.nan) * one.items) ** 2 for one in results)) / items
        for name in sorted(common)
    }


def _named_alike(results: Sequence[TaskResult]) -> Sequence[TaskResult]:
    """Tasks that have one metric each, the share of right items, by the name that most call it.

    One of AGIEval's tasks is by generation in lm-eval, and scored as `acc`; the others are turned into such.
    """
    names = [name for one in results for name in one.metrics]
    shares = {name.partition(",")[0] for name in names} <= {"acc", "exact_match"}
    if not shares or any(len(one.metrics) != 1 for one in results):
        return results
    name = Counter(names).most_common(1)[0][0]
    found = []
    for one in results:
        [(own, value)] = one.metrics.items()
        found.append(replace(one, metrics={name: value}, errors={name: one.errors.get(own, math.nan)}))
    return found


def _facts(tasks: Mapping[str, Task]) -> dict[str, Any]:
    protocols = {PROTOCOLS[task.OUTPUT_TYPE] for task in tasks.values()}
    shots = {task.get_config("num_fewshot") for task in tasks.values()}
    return {
        "protocol": protocols.pop() if len(protocols) == 1 else "mixed",
        "shots": shots.pop() if len(shots) == 1 else None,
        "items": sum(len(task.eval_docs) for task in tasks.values()),
    }


def _malformed(task: Task, limit: int | None) -> str | None:
    """What is wrong with a task's items, if anything."""
    bad: list[str] = []
    count = 0
    for number, item in task.doc_iterator(rank=0, limit=limit, world_size=1):
        count += 1
        if problem := _problem_of(task, item):
            bad.append(f"item {number}: {problem}")
    if not count:
        return f"{task.task_name} has no items"
    if not bad:
        return None
    shown = "; ".join(bad[:_SHOWN]) + (f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
    return f"{len(bad)} of {count} items of {task.task_name} are malformed: {shown}"


def _problem_of(task: Task, item: dict[str, Any]) -> str | None:
    try:
        text, target = task.doc_to_text(item), task.doc_to_target(item)
        if task.OUTPUT_TYPE == "multiple_choice":
            return _problem_of_choice(task, item, text, target)
    except Exception as error:  # a template may raise anything
        return _said(error)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None if str(target).strip() else "its text is empty"
    if not isinstance(text, list | int) and not str(text).strip():
        return "its prompt is empty"
    if target is None or (isinstance(target, str | list) and not target):
        return "it has no answer"
    return None


def _problem_of_choice(task: Any, item: dict[str, Any], text: Any, target: Any) -> str | None:
    choices = task.doc_to_choice(item)
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        return "it has fewer than two options"
    if empty := [number for number, choice in enumerate(choices) if not str(choice).strip()]:
        return f"option {empty[0]} is empty"
    # Where options are what comes before a common end, as in WinoGrande, the text is the answer's number.
    answer = text if task.multiple_input else target
    if isinstance(answer, int) and not 0 <= answer < len(choices):
        return f"its answer is option {answer}, of {len(choices)}"
    if isinstance(answer, str) and answer not in choices:
        return f"its answer, {answer!r:.40}, is none of its options"
    return None


def _numbers(answered: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors; lm-eval writes both, and names, into one mapping."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, value in answered.items():
        if "," not in name or isinstance(value, str):
            continue
        metric, _, of = name.partition(",")
        if metric.endswith("_stderr"):
            errors[f"{metric.removesuffix('_stderr')},{of}"] = float(value)
        else:
            metrics[name] = float(value)
    return metrics, errors


def _sample(one: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        "doc": one["doc_id"],
        "item": one["doc_hash"][:16],
        "filter": one["filter"],
        "target": one["target"],
        "answers": one["filtered_resps"],
    }
    return kept | {name: one[name] for name in one["metrics"]}


def _digest(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Of which items were asked, whatever was answered: scores are only compared where it is the same."""
    asked = [
        [name, row["doc"], row.get("item"), str(row["target"])]
        for name, rows in samples.items()
        for row in rows
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets draw bars and log what they do at every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
