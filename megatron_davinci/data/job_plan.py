"""What a tokenising job is: everything that decides the bytes it writes, sealed when it begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_davinci.data.jsonl import Fields
from megatron_davinci.errors import DataError
from megatron_davinci.files import write_json

FORMAT = 1
FILE_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What decides a job's result. A job goes on only under the plan that it began with.

    Attributes:
        inputs: Path, bytes and time of last change (nanoseconds) of each file, in order.
        tokenizer_sha256: Of `tokenizer.json`.
        vocab_size: The largest id plus 1.
        eod_token: What ends a document.
        eod_id: Its id.
        encoder: Library and version that makes the ids.
        dtype: Name of the tokens' dtype.
        fields: What records' fields are called; those of question and answer make a mask.
        shard_tokens: Where shards are closed.
        piece_bytes: Into what pieces plain files are parted.
        append_eod: Whether the end-of-document token ends each document.
        keep_empty: Whether an empty text is a document without tokens.
        shuffle: Seed of the documents' order; None for theirs.
        pack: Sequence length of best-fit packing; None for one document after the other.
        format: Of the job's folder.
    """

    inputs: list[tuple[str, int, int]]
    tokenizer_sha256: str
    vocab_size: int
    eod_token: str
    eod_id: int
    encoder: str
    dtype: str
    fields: Fields
    shard_tokens: int
    piece_bytes: int
    append_eod: bool = True
    keep_empty: bool = False
    shuffle: int | None = None
    pack: int | None = None
    format: int = field(default=FORMAT)

    def save(self, folder: Path) -> None:
        """Write `plan.json`.

        Raises:
            EnvironmentProblem: The disk is full or failing.
        """
        write_json(folder / FILE_NAME, asdict(self) | {"fields": list(self.fields)})

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read `plan.json`.

        Raises:
            DataError: It is damaged, or of another version.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
            content["fields"] = Fields(*content["fields"])
            content["inputs"] = [tuple(entry) for entry in content["inputs"]]
            plan = cls(**content)
            if plan.format != FORMAT:
                raise ValueError(f"format {plan.format}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                "What an unfinished tokenising job has left cannot be read.",
                where=path,
                found=error,
                do="begin anew with --restart",
            ) from error
        return plan

    def refuse_other(self, now: Plan, folder: Path) -> None:
        """Raise unless `now` is this plan.

        Raises:
            DataError: Something has changed since the job began; it says what.
        """
        changed = list(_changes(self, now))
        if changed:
            raise DataError(
                "An unfinished tokenising job was begun otherwise.",
                where=folder,
                found=_some(changed),
                expected="the files, the tokenizer and the options that it was begun with",
                do="change them back to go on, or begin anew with --restart",
            )

    def refuse_changed_inputs(self) -> None:
        """Raise unless every input is the file that it was when this plan was made.

        Raises:
            DataError: One is not; it says which.
        """
        now = [describe(Path(path)) for path, _, _ in self.inputs]
        changed = list(_changed_inputs(self.inputs, now))
        if changed:
            raise DataError(
                "An input was changed while it was tokenised: nobody knows which text the tokens are of.",
                found=_some(changed),
                expected="files that stay as they are",
                do="begin anew with --restart when nothing writes to them",
            )


def _some(lines: list[str]) -> str:
    return "\n".join(lines[:10] + ([f"and {len(lines) - 10} more"] if lines[10:] else []))


def _changes(then: Plan, now: Plan) -> Iterator[str]:
    for one in fields(Plan):
        before, after = getattr(then, one.name), getattr(now, one.name)
        if one.name == "inputs":
            yield from _changed_inputs(before, after)
        elif before != after:
            yield f"{one.name} was {_said(before)}, is {_said(after)}"


def _changed_inputs(before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]) -> Iterator[str]:
    if [entry[0] for entry in before] != [entry[0] for entry in after]:
        was, now = {entry[0] for entry in before}, {entry[0] for entry in after}
        yield from (f"{path} is new" for path in sorted(now - was))
        yield from (f"{path} is no longer among the inputs" for path in sorted(was - now))
        if was == now:
            yield "the inputs are in another order"
        return
    for (path, size, changed), (_, size_now, changed_now) in zip(before, after):
        if size != size_now:
            yield f"{path} had {size:,} bytes, has {size_now:,}"
        elif changed != changed_now:
            yield f"{path} was written again since"


def _said(value: Any) -> str:
    return repr(list(value)) if isinstance(value, Fields) else repr(value)


def describe(path: Path) -> tuple[str, int, int]:
    """A file's entry in a plan: absolute path, bytes, nanoseconds of last change.

    Raises:
        DataError: The file is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError("An input cannot be read.", where=path, found=error.strerror) from error
    return os.path.abspath(path), status.st_size, status.st_mtime_ns
