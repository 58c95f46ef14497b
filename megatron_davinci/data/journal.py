"""The mixture journal: an append-only file of what decided the data order, record by record.

One JSON object a line. Each carries its number and a digest over itself and all lines before it, so that an edited,
reordered or cut file is found at the line where it differs, and a checkpoint names its past by one digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.files import disk_errors, fsync_folder

_EMPTY = "0" * 32  # the digest of a journal without records


@dataclass(frozen=True)
class MixRecord:
    """From sample `first_sample` on, sources are mixed in these shares.

    Attributes:
        first_sample: Global sample number.
        stage: The stage's name.
        weights: Share of samples by source, as text: `0.1` is one tenth, `1/3` a third; they sum to 1.
        transforms: What is done to the samples, by name, as plain values; empty if nothing is.
        origin: Who decided it: the name of an edit, `configuration` for a changed one, or a controller; empty for the
            stage list.
        reason: Why, for the reader.

    Raises:
        DataError: A value is impossible or the weights do not sum to 1.
    """

    first_sample: int
    stage: str
    weights: Mapping[str, str]
    transforms: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        _need(_is_count(self.first_sample), "first_sample", self.first_sample, "a sample number, 0 or more")
        _need(isinstance(self.stage, str), "stage", self.stage, "text")
        _need(
            isinstance(self.weights, Mapping) and bool(self.weights), "weights", self.weights, "source: share"
        )
        _need(isinstance(self.transforms, Mapping), "transforms", self.transforms, "name: settings")
        _need(isinstance(self.origin, str), "origin", self.origin, "text")
        _need(isinstance(self.reason, str), "reason", self.reason, "text")
        for source, weight in self.weights.items():
            _need(isinstance(weight, str), f"weights.{source}", weight, 'text, as in "0.25"')
        total = sum((exact_weight(weight) for weight in self.weights.values()), Fraction(0))
        if abs(total - 1) > 1e-9:
            raise DataError(
                "The weights of a mixture do not sum to 1.",
                where=f"the record from sample {self.first_sample:,} on (stage {self.stage})",
                found=f"a sum of {float(total):.12g}",
                expected="1, within 1e-9",
            )


@dataclass(frozen=True)
class SkipRecord:
    """Samples `from_sample` to `to_sample - 1` are never handed out.

    No number moves: the samples before and after are the windows that they would have been without the skip, and
    each source's position still counts the windows that were left out.

    Attributes:
        from_sample: The first global sample number that is left out.
        to_sample: The first that is used again.
        reason: Why, for the reader.

    Raises:
        DataError: The range is empty or negative.
    """

    from_sample: int
    to_sample: int
    reason: str

    def __post_init__(self) -> None:
        _need(_is_count(self.from_sample), "from_sample", self.from_sample, "a sample number, 0 or more")
        _need(_is_count(self.to_sample), "to_sample", self.to_sample, "a sample number, 0 or more")
        _need(isinstance(self.reason, str), "reason", self.reason, "text")
        _need(self.from_sample < self.to_sample, "to_sample", self.to_sample, f"above {self.from_sample}")


class UnknownSource(DataError):
    """A mixture names a source that the run does not have. In a journal's past that is the configuration's fault."""


Record = MixRecord | SkipRecord

_KINDS: dict[str, type[MixRecord] | type[SkipRecord]] = {"mix": MixRecord, "skip": SkipRecord}


class Journal:
    """The records of a run, in order. Use `Journal.open` or `Journal.in_memory`.

    One process appends; others may open the file to read it.
    """

    def __init__(self, path: Path | None, sources: frozenset[str] | None) -> None:
        self._path, self._sources = path, sources
        self._records: list[Record] = []
        # By kind and first sample, which no two of a kind share: a run of years says a record without a walk.
        self._by_start: dict[tuple[type[Record], int], Record] = {}
        self._last_mix: MixRecord | None = None
        self._digests = [_EMPTY]
        self._skipped: tuple[list[int], list[int]] = ([], [])
        self._whole_bytes = self._file_bytes = 0
        self._lacks_newline = False

    @classmethod
    def in_memory(cls, sources: Iterable[str] | None = None) -> Journal:
        """A journal that no file keeps."""
        return cls(None, None if sources is None else frozenset(sources))

    @classmethod
    def open(cls, path: str | os.PathLike[str], sources: Iterable[str] | None = None) -> Journal:
        """Read a journal, or begin one; a missing file is created by the first record.

        A last line that a crash cut short was never acted on (a record is on disk before its first sample is used):
        it is left out, and cut off by the next append.

        Args:
            path: The file.
            sources: Names that weights may have; None allows any.

        Raises:
            DataError: A line is damaged, was edited or contradicts an earlier one.
            EnvironmentProblem: The file cannot be read.
        """
        journal = cls(Path(path), None if sources is None else frozenset(sources))
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return journal
        except OSError as error:
            raise EnvironmentProblem("A journal cannot be read.", where=path, found=error.strerror) from error
        journal._file_bytes = len(content)
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            unfinished = not line.endswith(b"\n")
            try:
                journal._accept(*_parse(line, len(journal._records), journal._digests[-1]))
            except UnknownSource:
                raise  # the line is whole: a source was taken out of the configuration
            except (ValueError, DataError) as error:
                # The beginning of an object is never JSON itself: a last line that is was not cut, but edited.
                if unfinished and isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                    break
                raise DataError(
                    "A journal is damaged or was edited.",
                    where=f"{path}, line {number}",
                    found=error.render() if isinstance(error, DataError) else error,
                    do="restore the file from a copy of the run directory; records are never changed by hand",
                ) from error
            journal._whole_bytes += len(line)
            journal._lacks_newline = unfinished
        return journal

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in the order in which they were appended."""
        return tuple(self._records)

    @property
    def mixes(self) -> tuple[MixRecord, ...]:
        """The mixtures, by rising `first_sample`."""
        return tuple(record for record in self._records if isinstance(record, MixRecord))

    @property
    def skips(self) -> tuple[SkipRecord, ...]:
        """The skips, in the order in which they were appended."""
        return tuple(record for record in self._records if isinstance(record, SkipRecord))

    def after_skips(self, sample: int) -> int:
        """The first sample from `sample` on that no skip leaves out: `sample` itself, or the end of its skip."""
        begins, ends = self._skipped
        at = bisect_right(begins, sample) - 1
        return ends[at] if at >= 0 and sample < ends[at] else sample

    def skipped_before(self, sample: int) -> int:
        """How many of the samples 0 to `sample - 1` are left out; the other `sample` less these were handed out."""
        return sum(max(0, min(end, sample) - begin) for begin, end in zip(*self._skipped, strict=True))

    def usable(self, first: int, count: int) -> np.ndarray:
        """The next `count` samples from `first` on that no skip leaves out: [count] int64, rising.

        A global batch that begins at `first` is these; the next one begins at `after_skips` of the last plus 1.
        """
        begins, ends = (np.array(bounds, np.int64) for bounds in self._skipped)
        # With the skips cut out, samples are numbered through: skip i lies before the sample begins[i] - gone[i].
        gone = np.cumsum(ends - begins) - (ends - begins)
        through = self.after_skips(first)
        through -= self.skipped_before(through)
        numbers = np.arange(through, through + count, dtype=np.int64)
        passed = np.searchsorted(begins - gone, numbers, side="right")
        return numbers + np.append(gone, np.sum(ends - begins))[passed]

    def append(self, record: Record) -> bool:
        """Add a record; when this returns, it is on disk.

        Args:
            record: Appending one that is there already changes nothing: a resumed run may say again what it said.

        Returns:
            Whether the record is new.

        Raises:
            DataError: It would rewrite the past, names an unknown source, or is the first and not at sample 0.
            EnvironmentProblem: It could not be written; the journal is as before.
        """
        if self._by_start.get(_start(record)) == record:
            return False
        self._check(record)
        digest = _chained(self._digests[-1], _body(record, len(self._records)))
        if self._path is not None:
            line = json.dumps({**_body(record, len(self._records)), "digest": digest}, ensure_ascii=False)
            self._write(self._path, line.encode() + b"\n")
        self._keep(record, digest)
        return True

    def digest(self, records: int | None = None) -> str:
        """A hex digest of the first `records` records, or of all.

        Raises:
            DataError: There are fewer.
        """
        count = len(self._records) if records is None else records
        if not 0 <= count <= len(self._records):
            raise DataError(
                "A journal has too few records.",
                where=self._path,
                found=f"{len(self._records)} records",
                expected=f"at least {count}",
            )
        return self._digests[count]

    def extends(self, records: int, digest: str) -> bool:
        """Whether this journal begins with the `records` records that had `digest`."""
        return 0 <= records <= len(self._records) and self._digests[records] == digest

    def _accept(self, record: Record, digest: str) -> None:
        self._check(record)
        self._keep(record, digest)

    def _keep(self, record: Record, digest: str) -> None:
        self._records.append(record)
        self._digests.append(digest)
        self._by_start[_start(record)] = record
        if isinstance(record, SkipRecord):
            self._skipped = _with_skip(*self._skipped, record)
        else:
            self._last_mix = record

    def _check(self, record: Record) -> None:
        if isinstance(record, SkipRecord):
            begins, ends = self._skipped
            at = bisect_right(ends, record.from_sample)  # the first stretch that ends after it begins
            if at < len(begins) and begins[at] < record.to_sample:
                raise DataError(
                    "A skip overlaps an earlier one.",
                    where=self._path,
                    found=f"samples {record.from_sample:,} to {record.to_sample:,}",
                    expected=f"none of {begins[at]:,} to {ends[at]:,}",
                )
            return
        last = self._last_mix
        if last is None and record.first_sample != 0:
            raise DataError(
                "A journal begins at sample 0.", where=self._path, found=f"sample {record.first_sample:,}"
            )
        if last is not None and record.first_sample <= last.first_sample:
            raise DataError(
                "This record would rewrite the past.",
                where=self._path,
                found=f"a mixture from sample {record.first_sample:,} on, other than the journal's",
                expected=f"one from a sample after {last.first_sample:,}, the last record's",
                do="continue with the configuration that the run began with, or start another run directory",
            )
        unknown = [] if self._sources is None else sorted(set(record.weights) - self._sources)
        if unknown:
            raise UnknownSource(
                "A mixture names sources that the run does not have.",
                where=f"the record from sample {record.first_sample:,} on (stage {record.stage})"
                + (f" in {self._path}" if self._path else ""),
                found=", ".join(unknown),
                expected="some of " + ", ".join(sorted(self._sources or ())),
                do="keep every source that the run has mixed in data.sources; a weight of 0 ends its use",
            )

    def _write(self, path: Path, line: bytes) -> None:
        with disk_errors(path, "writing the mixture journal"):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            # Unbuffered: what a buffer still holds of a line that failed would be written as the file is closed.
            with open(path, "ab", buffering=0) as file:
                if (size := file.tell()) != self._file_bytes:
                    raise DataError(
                        "Something else wrote to the journal.",
                        where=path,
                        found=f"{size:,} bytes",
                        expected=f"{self._file_bytes:,} bytes, as this process left it",
                        do="end the other run in this run directory, then resume",
                    )
                # Whatever follows the last whole record is a line that a crash cut short.
                file.truncate(self._whole_bytes)
                self._file_bytes = self._whole_bytes
                written = b"\n" + line if self._lacks_newline else line
                try:
                    left = memoryview(written)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._whole_bytes)
                    raise
            if is_new:
                fsync_folder(path.parent)
        self._whole_bytes += len(written)
        self._file_bytes = self._whole_bytes
        self._lacks_newline = False


def _start(record: Record) -> tuple[type[Record], int]:
    return type(record), record.from_sample if isinstance(record, SkipRecord) else record.first_sample


def _with_skip(begins: list[int], ends: list[int], skip: SkipRecord) -> tuple[list[int], list[int]]:
    """Where stretches without a sample begin and end, in order, with one more; those that touch are one stretch."""
    first = last = bisect_right(ends, skip.from_sample)
    begin, end = skip.from_sample, skip.to_sample
    if first and ends[first - 1] == begin:
        first -= 1
        begin = begins[first]
    if last < len(begins) and begins[last] == end:
        end = ends[last]
        last += 1
    # New lists: whoever reads the old ones meanwhile sees them whole.
    return [*begins[:first], begin, *begins[last:]], [*ends[:first], end, *ends[last:]]


def _body(record: Record, index: int) -> dict[str, Any]:
    kind = "mix" if isinstance(record, MixRecord) else "skip"
    fields = asdict(record) if isinstance(record, SkipRecord) else _mix_fields(record)
    return {"index": index, "kind": kind, **fields}


def _mix_fields(record: MixRecord) -> dict[str, Any]:
    fields = {"first_sample": record.first_sample, "stage": record.stage, "weights": dict(record.weights)}
    # Left out where there is nothing, so that such records read and digest as they did before there were any.
    more = {"transforms": dict(record.transforms), "origin": record.origin, "reason": record.reason}
    return {**fields, **{name: value for name, value in more.items() if value}}


def _chained(before: str, body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(f"{before}\n{canonical}".encode(), digest_size=16).hexdigest()


def _parse(line: bytes, index: int, before: str) -> tuple[Record, str]:
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("a line that is no record") from error
    if not isinstance(content, dict) or content.get("kind") not in _KINDS:
        raise ValueError("a line that is no record")
    if content.get("index") != index:
        raise ValueError(f"record number {content.get('index')} where number {index} belongs")
    digest = content.pop("digest", None)
    if digest != _chained(before, content):
        raise ValueError("a digest that does not match the line and those before it")
    fields = {name: value for name, value in content.items() if name not in ("index", "kind")}
    try:
        return _KINDS[content["kind"]](**fields), digest
    except TypeError as error:
        raise ValueError(f"fields that a {content['kind']} record does not have: {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _need(holds: bool, field: str, found: object, expected: str) -> None:
    if not holds:
        raise DataError("A journal record is wrong.", where=field, found=repr(found), expected=expected)
