"""How far a run is: tasks that are done, and what its workers have written down of what they asked.

datatrove's executor says nothing before all tasks are done, and a task of level 4 may take hours. So steps that ask a
model write what they have counted into a small file each, once a second, and this process adds the files up.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

_POLL_SECONDS = 0.5
_WRITE_SECONDS = 1.0
_LEAST = 1e-4  # of a pass, before it is said how long the rest takes


class Asked(NamedTuple):
    """What was asked of models in a pass.

    Attributes:
        answered: Questions that a model has answered in this pass.
        known: Questions whose answer lay on disk.
        tokens: Of the former, prompts and answers.
        unused: Answers that were not used, by gate.
        troubles: Requests without an answer, by what came of them.
    """

    answered: int
    known: int
    tokens: int
    unused: dict[str, int]
    troubles: dict[str, int]


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        number: Of the pass, from 1 on.
        passes: All.
        what: What the pass does.
        done: Tasks that are done.
        tasks: All.
        share: Of the pass that is done, about: a task at work counts by the characters that have been through.
        seconds: Since this process began the pass.
        left: Seconds that the rest of the pass takes at the pace so far, about; None if nobody knows yet.
        asked: Of models, since then; None where no step of the pass asks one.
    """

    number: int
    passes: int
    what: str
    done: int
    tasks: int
    share: float
    seconds: float
    left: float | None
    asked: Asked | None


class Note:
    """What a step of one task has counted, in a file that is written anew now and then.

    Args:
        path: The file; None to write none.
    """

    def __init__(self, path: Path | None) -> None:
        self.counts, self._path, self._at = Counter[str](), path, 0.0

    def add(self, counts: dict[str, int]) -> None:
        """Count, and write if the last time is a while ago."""
        self.counts.update(counts)
        if time.monotonic() - self._at > _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write, whole or not at all. It is only looked at: a full disk is said elsewhere."""
        self._at = time.monotonic()
        if self._path is None:
            return
        beside = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self.counts))
            os.replace(beside, self._path)
        except OSError:
            with suppress(OSError):
                beside.unlink()


@contextmanager
def watched(
    number: int,
    passes: int,
    what: str,
    work: Path,
    sizes: Sequence[int],
    tell: Callable[[Progress], None],
) -> Iterator[None]:
    """Tell how far a pass is while the block runs, and at its end.

    Args:
        number: Of the pass, from 1 on.
        passes: All.
        what: What the pass does.
        work: Its folder.
        sizes: Bytes of each task's input.
        tell: Is told.
    """
    over, began = Event(), time.monotonic()
    done = _done(work)
    for path, _ in _notes(work / "told"):
        if int(path.name.split("-")[0]) not in done:
            path.unlink(missing_ok=True)  # its task begins anew
    first, before = _share(work, sizes), _total(work / "told") or Counter()

    def now() -> Progress:
        share, seconds = _share(work, sizes), time.monotonic() - began
        gained = share - first
        left = seconds * (1 - share) / gained if gained > _LEAST else None
        total = _total(work / "told")
        asked = None if total is None else _asked(total - before)
        return Progress(number, passes, what, len(_done(work)), len(sizes), share, seconds, left, asked)

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            tell(now())

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    tell(now())


def _total(folder: Path) -> Counter[str] | None:
    """What the files of a pass's steps add up to; None without any."""
    notes = [counts for _, counts in _notes(folder)]
    return sum(map(Counter, notes), Counter[str]()) if notes else None


def _asked(total: Counter[str]) -> Asked:
    def under(prefix: str) -> dict[str, int]:
        return {
            key.removeprefix(prefix): count for key, count in sorted(total.items()) if key.startswith(prefix)
        }

    tokens = total["prompt_tokens"] + total["completion_tokens"]
    return Asked(total["answered"], total["known"], tokens, under("unused/"), under("trouble/"))


def _notes(folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    for path in folder.glob("*.json") if folder.is_dir() else ():
        try:
            yield path, json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # a moment later it is there


def _done(work: Path) -> set[int]:
    completions = work / "log" / "completions"
    return (
        {int(name) for name in os.listdir(completions) if name.isdigit()} if completions.is_dir() else set()
    )


def _share(work: Path, sizes: Sequence[int]) -> float:
    """Of the pass that is done, by bytes of input."""
    done, through = _done(work), Counter[int]()
    for path, counts in _notes(work / "told"):
        rank = int(path.name.split("-")[0])
        through[rank] = max(through[rank], counts.get("characters", 0))
    gone = sum(size if rank in done else min(through[rank], 0.99 * size) for rank, size in enumerate(sizes))
    return gone / max(1, sum(sizes))
