"""`results.jsonl`, a line a task and checkpoint: reading it, and what of a question has no result in it yet."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines that `davinci eval` has kept in a folder; none where there is no file.

    A line that is no record is left out: somebody may be writing it, or was stopped in it.

    Args:
        folder: `RUN/evals`, or what `--out` named.
    """
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def finite(value: Any) -> Any:
    """A value of which JSON can be made for whoever reads it: what is no number is None in it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def samples_folder(
    checkpoint: str, suite: str | None, limit: int | None, given: Mapping[str, Any] | None = None
) -> str:
    """Where answers to each item are kept, below `samples/`: what was asked otherwise has a folder of its own.

    Args:
        checkpoint: Its folder's name.
        suite: What was asked; the report's benchmarks ask lm-eval's tasks in their own way.
        limit: Items of each task; None for all.
        given: What the command said beside it.
    """
    words = ways_apart(suite, limit, given)
    return f"{checkpoint}/{words}" if words else checkpoint


def ways_apart(suite: str | None, limit: int | None, given: Mapping[str, Any] | None = None) -> str:
    """The name of a folder for what was asked otherwise than in full; empty for that. See `samples_folder`."""
    given = given or {}
    words = [suite] if suite == "davinci19" else []
    words += [] if limit is None else [f"limit-{limit}"]
    words += [f"{given['shots']}-shot"] if given.get("shots") is not None else []
    if given.get("texts"):
        words.append("texts-" + hashlib.sha256(json.dumps(given["texts"]).encode()).hexdigest()[:8])
    words += [f"samples-{given['samples'].replace(':', '-')}"] if given.get("samples") else []
    return "_".join(words)


def unmeasured(records: Iterable[dict[str, Any]], suite: str | None, tasks: Iterable[str]) -> set[str]:
    """What has no result: names of tasks, and of a suite its own where it did not come to its end.

    A record with a problem is no result, and the next that is asked may have one.

    Args:
        records: Of one checkpoint, asked in one way.
        suite: What was to be asked; None for tasks by name.
        tasks: Those, where it is no suite.
    """
    good: set[str] = set()
    bad: set[str] = set()
    ended = False
    for record in records:
        (bad if record.get("problem") else good).add(str(record.get("task")))
        ended |= _ends_suite(record)
    if suite is None:
        return {*tasks} - good
    return (bad - good) | (set() if ended else {suite})


def standing(records: Iterable[dict[str, Any]]) -> set[str]:
    """Tasks that had the same problem the last two times: asked once more they would have it again.

    Args:
        records: Of one checkpoint, asked in one way, the oldest first.
    """
    said: dict[str, list[str]] = {}
    for record in records:
        said.setdefault(str(record.get("task")), []).append(str(record.get("problem") or ""))
    return {task for task, last in said.items() if last[-1] and last[-2:-1] == last[-1:]}


def _ends_suite(record: dict[str, Any]) -> bool:
    """Whether it is a suite's last line, which says that all of it was asked."""
    return (
        "means" in record
        or "texts" in record
        or record.get("task") == "geometry"
        or bool(record.get("suite_ends"))
    )
