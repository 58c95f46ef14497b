"""A tokenising job: pieces of the input become parts, parts become shards, and a kill costs what was under way.

The job's folder lies beside the source that it makes, under `.NAME.tokenizing`:

    plan.json, tokenizer.json   what the job is
    parts/                      a part for each piece that is done (`data.parts`)
    shards/NNNNN.json           an entry of the manifest for each shard that is done
    out/                        the shards; gets the source's name at the end
    finished.json               what the source is, until this folder is gone (`data.finished`)

Which bytes are written follows from the plan alone, not from who does what when.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megatron_davinci.data.assemble import Assembler, ShardPlan, Span
from megatron_davinci.data.encode_part import OnError
from megatron_davinci.data.fast_bpe import Backend
from megatron_davinci.data.growing_shard import GrowingShard
from megatron_davinci.data.indexed import read_header
from megatron_davinci.data.job_plan import Plan
from megatron_davinci.data.manifest import Shard
from megatron_davinci.data.mask import read_mask_header
from megatron_davinci.data.parts import (
    PartRecord,
    drop_tokens,
    has_tokens,
    read_bad,
    read_ends,
    read_record,
)
from megatron_davinci.data.proof import Proof, unproven
from megatron_davinci.data.text_inputs import Piece, count_line_ends, lines_before
from megatron_davinci.data.tokenize_worker import Answer, InProcess, Processes, Task
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors, write_atomically, write_json

QUARANTINE = "quarantine.jsonl"
_ORPHANS_SECONDS = 60

Progress = Callable[[int, int], None]


class Job:
    """One job in its folder; made anew or found there.

    Args:
        folder: The job's, which `opened` has locked.
        plan: What it is.
        pieces: The input in pieces, in order.

    Raises:
        DataError: The folder is that of another job, or damaged.
        EnvironmentProblem: The disk is full or failing.
    """

    def __init__(self, folder: Path, plan: Plan, pieces: Sequence[Piece]) -> None:
        self.folder, self.plan, self.pieces = folder, plan, pieces
        if (folder / "plan.json").exists():
            Plan.load(folder).refuse_other(plan, folder)
        else:
            with disk_errors(folder, "beginning a tokenising job"):
                for name in ("parts", "shards", "out"):
                    (folder / name).mkdir(exist_ok=True)
            plan.save(folder)
        self.parts: dict[int, PartRecord] = {}
        self.shards: dict[int, Shard] = {}
        self._recover()

    def _recover(self) -> None:
        for number in range(len(self.pieces)):
            record = read_record(self.folder / "parts", number)
            if record is not None:
                self.parts[number] = record
        for path in (self.folder / "shards").glob("*.json"):
            try:
                shard = Shard.model_validate_json(path.read_bytes())
            except (ValueError, ValidationError):
                continue  # it was not written whole, and is not done
            if _has_its_files(self.folder / "out", shard):
                self.shards[int(path.stem)] = shard
        for path in (self.folder / "out").glob("*.tmp-*"):
            path.unlink()

    def run(
        self,
        pool: InProcess | Processes,
        backend: Backend,
        on_error: OnError,
        progress: Progress | None = None,
        proof: Proof | None = None,
    ) -> list[Shard]:
        """Do what is left to do.

        Args:
            pool: Who does it.
            backend: What encodes.
            on_error: What becomes of bad records.
            progress: Called with bytes of input read by this run, and how many it has to read.
            proof: Finds out meanwhile whether the encoder may be trusted; None if that is known.

        Returns:
            The shards, in order.

        Raises:
            NotTheReference: It may not, and all that was made is worth nothing.
            DataError: A record is bad; or earlier ones were passed over, and now shall not be.
            EnvironmentProblem: The disk is full or failing, or a worker died.
        """
        passed_over = sum(record.bad for record in self.parts.values())
        if on_error == "stop" and passed_over:
            raise DataError(
                "An unfinished job has passed over bad records, and now is to stop at them.",
                where=self.folder,
                found=f"{passed_over:,} records passed over",
                do="go on with --on-error skip, or begin anew with --restart",
            )
        todo = deque(number for number in range(len(self.pieces)) if number not in self.parts)
        counted = _Counted([self.pieces[number].size for number in todo], list(todo), progress)
        pool.progress = counted.under_way
        self._plan = ShardPlan(self.plan.shard_tokens)
        self._fed, self._spans, self._assembled = 0, list[Span](), 0
        self._growing: GrowingShard | None = None
        # Packing sees all documents of a shard before it writes any, and a shuffled one needs all parts.
        aside = isinstance(pool, Processes) and self.plan.shuffle is None and self.plan.pack is None
        self._post = pool.post if aside and isinstance(pool, Processes) else None
        try:
            ready = deque(self._ready())
            busy = 0
            while todo or ready or busy or self._growing:
                while pool.idle and (ready or todo):
                    # Shards first: they set free what parts hold.
                    task = ready.popleft() if ready else self._part_task(todo.popleft(), backend, on_error)
                    pool.submit(task)
                    busy += 1
                answer = pool.answer()
                if proof is not None:
                    proof.look()
                if answer["do"] == "part":
                    busy -= 1
                    self.parts[answer["number"]] = PartRecord(**answer["record"])
                    counted.finished(answer["number"])
                elif self._growing and self._growing.number == answer["number"]:
                    self._growing = None
                    self._shard_done(answer)
                else:
                    busy -= 1
                    self._shard_done(answer)
                ready.extend(self._ready())
        finally:
            if self._growing:
                self._growing.stop()
        if proof is not None:
            proof.look(wait=True)
        return [self.shards[number] for number in range(len(self.shards))]

    def _part_task(self, number: int, backend: Backend, on_error: OnError) -> Task:
        return {
            "do": "part",
            "number": number,
            "piece": list(self.pieces[number]),
            "on_error": on_error,
            "backend": backend,
        }

    def _ready(self) -> Iterator[Task]:
        """Tasks for the shards whose documents have all become known since this was last asked."""
        while self._fed in self.parts:
            if self.plan.shuffle is None:
                ends = read_ends(self.folder / "parts", self._fed)
                yield from self._in_order(self._plan.feed(self._fed, ends))
                self._grow(self._fed)
            self._fed += 1
            if self._fed == len(self.pieces):
                if self.plan.shuffle is None:
                    yield from self._in_order(self._plan.finish(self._fed))
                else:
                    yield from self._shuffled()

    def _in_order(self, spans: Iterator[Span]) -> Iterator[Task]:
        for span in spans:
            number = len(self._spans)
            self._spans.append(span)
            if self._growing and self._growing.number == number:
                self._growing.grow(span.end, whole=True)
            elif number not in self.shards:
                self._must_have_tokens(range(span.first[0], span.end[0] + (1 if span.end[1] else 0)))
                yield {"do": "shard", "number": number, "first": span.first, "end": span.end}

    def _grow(self, part: int) -> None:
        """Write documents of this part that are in the shard which is not complete, if nothing else grows."""
        number, first = len(self._spans), self._plan.open
        if self._post is None or first is None or number in self.shards:
            return
        if self._growing is None:
            self._must_have_tokens(range(first[0], part + 1))
            assembler = Assembler(self.plan, self.folder, write_early=True)
            self._growing = GrowingShard(number, first, assembler, self._post)
        if self._growing.number == number:
            self._must_have_tokens(range(part, part + 1))
            self._growing.grow((part + 1, 0))

    def _shuffled(self) -> Iterator[Task]:
        counts = np.array([self.parts[number].documents for number in range(len(self.pieces))], np.int64)
        with disk_errors(self.folder, "writing counts"):
            counts.tofile(self.folder / "counts")
        tokens = sum(record.tokens for record in self.parts.values())
        documents = int(counts.sum())
        shards = min(documents, -(-tokens // self.plan.shard_tokens))
        for number in range(shards):
            if number not in self.shards:
                self._must_have_tokens(range(len(self.pieces)))
                first, end = documents * number // shards, documents * (number + 1) // shards
                yield {"do": "shuffled", "number": number, "first": first, "end": end}

    def _must_have_tokens(self, parts: range) -> None:
        for number in parts:
            if not has_tokens(self.folder / "parts", number, self.parts[number]):
                raise DataError(
                    "An unfinished tokenising job lacks tokens that it had.",
                    where=self.folder / "parts",
                    found=f"no tokens of part {number}",
                    do="begin anew with --restart",
                )

    def _shard_done(self, answer: Answer) -> None:
        number = answer["number"]
        self.shards[number] = Shard.model_validate(answer["record"])
        write_json(self.folder / "shards" / f"{number:05d}.json", answer["record"])
        if self.plan.shuffle is None:
            first = self._assembled and self._spans[self._assembled - 1].end[0]
            while self._assembled in self.shards and self._assembled < len(self._spans):
                self._assembled += 1
            if self._assembled:
                for part in range(first, self._spans[self._assembled - 1].end[0]):
                    drop_tokens(self.folder / "parts", part)

    def write_quarantine(self, path: Path) -> tuple[int, int]:
        """Write a JSON line for each record that was passed over: `file`, `line`, `reason`, and the record itself.

        A line with `rest_of_file` stands for all that follows in its file, one with `rest_of_row_group` in its group.

        Returns:
            How many records there are, and how many files and row groups end early; with none, nothing is written.
        """
        bad = [number for number in range(len(self.pieces)) if self.parts[number].bad]
        if not bad:
            return 0, 0
        count = early = 0
        before: tuple[str, int, int] = ("", 0, 0)  # file, byte, lines that begin before it
        with disk_errors(path, "writing the quarantine"), open(path, "w", encoding="utf-8") as file:
            for number in bad:
                piece = self.pieces[number]
                if piece.kind == "jsonl" and piece.path == before[0]:
                    lines = before[2] + count_line_ends(Path(piece.path), before[1] - 1, piece.first - 1)
                else:
                    lines = lines_before(piece)
                if piece.first:
                    before = (piece.path, piece.first, lines)
                for record in read_bad(self.folder / "parts", number):
                    record = {"file": piece.path, **record, "line": lines + record["line"]}
                    file.write(json.dumps(record) + "\n")
                    ends = "rest_of_file" in record or "rest_of_row_group" in record
                    early, count = early + ends, count + (not ends)
            file.flush()
            os.fsync(file.fileno())
        return count, early


def _has_its_files(out: Path, shard: Shard) -> bool:
    """Whether a shard's files have the sizes that were written down: a disk that failed may have cut them."""
    prefix = out / shard.prefix
    try:
        header = read_header(prefix)
        if shard.mask_sha256 is not None:
            read_mask_header(prefix, shard.tokens)
    except DataError:
        return False
    return (header.num_tokens, header.document_bounds) == (shard.tokens, shard.documents + 1)


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Put the tokenizer into a new job's folder, where workers find it.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """
    if not (folder / "plan.json").exists():
        write_atomically(folder / "tokenizer.json", tokenizer.content)


@contextmanager
def opened(folder: Path, restart: bool) -> Iterator[None]:
    """Make a job's folder, or take it over; nobody else is at work in it within the block.

    Raises:
        DataError: Another job is at work there.
        EnvironmentProblem: The disk is full or failing.
    """
    with disk_errors(folder, "making a folder"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "ab")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                "Another job is at work on this source.", where=folder, do="wait for it, or end it"
            ) from error
        _wait_for_workers(folder)
        if restart or unproven(folder):
            clear(folder)
        yield


def clear(folder: Path) -> None:
    """Do away with all that a job has left; the job's own process has its lock, and no worker is at work."""
    # The mark of what is not proven goes last of what it is about.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "unproven"):
        if path.name in ("parts", "shards", "out"):
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _wait_for_workers(folder: Path) -> None:
    """Wait until the workers of a job that was killed have noticed it, which takes them one batch of texts."""
    with open(folder / "workers.lock", "ab") as lock:
        for _ in range(_ORPHANS_SECONDS * 20):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
    raise DataError(
        "Workers of a job that ended are still at work.",
        where=folder,
        found=f"they did not end within {_ORPHANS_SECONDS} seconds",
        do="end them",
    )


class _Counted:
    """Bytes of input that a run has read."""

    def __init__(self, sizes: list[int], numbers: list[int], progress: Progress | None) -> None:
        self._sizes, self._progress = dict(zip(numbers, sizes)), progress
        self._total, self._done = sum(sizes), 0
        self._partly: dict[int, int] = {}

    def under_way(self, number: int, done: int) -> None:
        """A piece has been read up to here."""
        self._partly[number] = done
        self._tell()

    def finished(self, number: int) -> None:
        """A piece is done."""
        self._partly.pop(number, None)
        self._done += self._sizes[number]
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done + sum(self._partly.values()), self._total)
