"""Changes of the mixture that someone asked for: a file in the run directory, which the trainer reads between steps.

The journal has one writer, the trainer. Who wants another mixture adds a line to `edits.jsonl`, at any time; the
trainer makes a record of it when its point comes. A line is never changed: an edit is withdrawn by another line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_davinci.data.journal import MixRecord
from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.files import disk_errors, fsync_folder


@dataclass(frozen=True)
class Point:
    """Where an edit takes effect: at most one of the two is set; neither is the next step.

    Attributes:
        sample: At the first step that begins at or after this sample.
        stage: At the beginning of this stage, wherever that comes to lie.
    """

    sample: int | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Edit:
    """A mixture that someone asked for.

    Attributes:
        name: `edit-1`, `edit-2`, ...: the `origin` of the record that becomes of it.
        point: Where it takes effect.
        weights: Share of samples by source, as text.
        reason: Why.
        asked: The point as it was given, for the reader: `--at 30%`.
        time: When it was asked for.
    """

    name: str
    point: Point
    weights: Mapping[str, str]
    reason: str
    asked: str = ""
    time: str = ""


@dataclass(frozen=True)
class Edits:
    """What `edits.jsonl` says.

    Attributes:
        asked: Every edit, in the order in which they were asked for.
        withdrawn: Why, by the names of those that were withdrawn.
    """

    asked: tuple[Edit, ...] = ()
    withdrawn: Mapping[str, str] = field(default_factory=dict)

    def pending(self, mixes: Sequence[MixRecord]) -> list[Edit]:
        """The edits that are still to come.

        An edit is over when the journal has a record of it, when it was withdrawn, or when one that was asked for
        later took effect at or after the point that this one was for.

        Args:
            mixes: The journal's.
        """
        applied = {record.origin: record.first_sample for record in mixes if record.origin}
        stages: dict[str, int] = {}
        for record in mixes:
            stages.setdefault(record.stage, record.first_sample)
        found: list[Edit] = []
        latest = -1  # where the last of the later ones took effect
        for edit in reversed(self.asked):
            point = edit.point
            wanted = stages.get(point.stage, latest + 1) if point.stage is not None else point.sample or 0
            if edit.name in applied:
                latest = max(latest, applied[edit.name])
            elif edit.name not in self.withdrawn and wanted > latest:
                found.append(edit)
        return found[::-1]


class EditFile:
    """`edits.jsonl` of a run. Any process may read it and add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Edits:
        """What it says; nothing where it is missing. A last line that is still being written is left out.

        Raises:
            DataError: A line is no edit.
            EnvironmentProblem: The file cannot be read.
        """
        try:
            return _parsed(self.path, self.path.read_bytes())
        except FileNotFoundError:
            return Edits()
        except OSError as error:
            raise EnvironmentProblem(
                "The edits of a run cannot be read.", where=self.path, found=error.strerror
            ) from error

    def stamp(self) -> tuple[int, int]:
        """What changes when something is added: cheap to ask between steps."""
        try:
            status = os.stat(self.path)
        except OSError:
            return (0, 0)
        return status.st_size, status.st_mtime_ns

    def add(self, point: Point, weights: Mapping[str, str], reason: str, *, asked: str = "") -> Edit:
        """Ask for a mixture; on disk when this returns.

        Raises:
            EnvironmentProblem: It could not be written; the file is as before.
        """
        with self._locked() as file:
            edits = _parsed(self.path, file.read())
            edit = Edit(f"edit-{len(edits.asked) + 1}", point, dict(weights), reason, asked, _now())
            self._append(
                file,
                {
                    "edit": edit.name,
                    "from": {
                        name: value
                        for name, value in (("sample", point.sample), ("stage", point.stage))
                        if value is not None
                    },
                    "weights": dict(weights),
                    "reason": reason,
                    "asked": asked,
                    "time": edit.time,
                },
            )
        return edit

    def withdraw(self, name: str, reason: str) -> None:
        """Take an edit back; on disk when this returns. One that has taken effect already stays.

        Raises:
            EnvironmentProblem: It could not be written; the file is as before.
        """
        with self._locked() as file:
            file.seek(0, os.SEEK_END)
            self._append(file, {"withdraw": name, "reason": reason, "time": _now()})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with disk_errors(self.path, f"writing {self.path.name}"):
            is_new = not self.path.exists()
            with open(self.path, "a+b") as file:
                # Where a file system has no locks, two people who edit in the same millisecond are on their own.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                yield file
            if is_new:
                fsync_folder(self.path.parent)

    @staticmethod
    def _append(file: IO[bytes], line: dict[str, Any]) -> None:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        # What a crash cut short was never an edit.
        whole = file.read().rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
        try:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(file.fileno(), whole)
            raise


def _parsed(path: Path, content: bytes) -> Edits:
    asked: list[Edit] = []
    withdrawn: dict[str, str] = {}
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            said = json.loads(line)
            if "withdraw" in said:
                withdrawn[str(said["withdraw"])] = str(said.get("reason", ""))
                continue
            edit = _edit(said)
            if edit.name != f"edit-{len(asked) + 1}":
                raise ValueError(f"{edit.name} where edit-{len(asked) + 1} belongs")
            asked.append(edit)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "A line of a run's edits is no edit.",
                where=f"{path}, line {number}",
                found=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
                do="use `davinci curriculum edit`; to undo a change by hand, restore the line",
            ) from error
    return Edits(tuple(asked), withdrawn)


def _edit(said: dict[str, Any]) -> Edit:
    begin = said["from"]
    sample, stage = begin.get("sample"), begin.get("stage")
    if (sample is not None and not isinstance(sample, int)) or (
        stage is not None and not isinstance(stage, str)
    ):
        raise ValueError(f"from {begin!r}: a sample is a number, and a stage a name")
    weights = said["weights"]
    if not weights or not all(isinstance(weight, str) for weight in weights.values()):
        raise ValueError('weights: a share for each source, as text, as in "0.25"')
    return Edit(
        str(said["edit"]),
        Point(sample, stage),
        dict(weights),
        str(said.get("reason", "")),
        str(said.get("asked", "")),
        str(said.get("time", "")),
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
