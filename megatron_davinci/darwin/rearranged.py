"""A tokenised source written anew: its documents in another order, in groups, or parted into several sources."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin.provenance import parameters_hash
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.sidecar import read_rows, sidecar_path, write_rows
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors, write_json

ARRANGEMENT = "arrangement.json"
VERSION = 1
_SHARD_TOKENS = 1 << 30


class Documents:
    """The documents of a source, by number over its shards.

    Args:
        folder: A tokenised source.

    Attributes:
        lengths: Tokens of each, int64 [documents].

    Raises:
        DataError: It is no source, has a mask, or no token ends its documents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        if self.manifest.has_mask:
            raise DataError(
                "A source with a mask cannot be arranged.",
                where=folder,
                expected="a source of whole documents",
            )
        if self.manifest.eod_id is None:
            raise DataError(
                "Documents of a group would run into each other.",
                where=folder / "manifest.json",
                found="eod_id: null",
                expected="a token that ends each document",
                do="tokenise it with one",
            )
        self._shards = [IndexedDataset(folder / shard.prefix) for shard in self.manifest.shards]
        lengths = [np.asarray(shard.sequence_lengths, np.int64) for shard in self._shards]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths])
        self._begins = np.cumsum([0, *map(len, lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        shard = int(np.searchsorted(self._begins, number, side="right")) - 1
        return self._shards[shard][number - int(self._begins[shard])]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for shard in self._shards:
            for number in range(len(shard)):
                yield shard[number]

    def rows(self) -> list[dict[str, Any]] | None:
        """Where each is from, as the sidecars have it; None where there are none."""
        paths = [sidecar_path(self.folder / shard.prefix) for shard in self.manifest.shards]
        if not all(path.is_file() for path in paths):
            return None
        return [row for path in paths for row in read_rows(path)]


def arrangement(name: str, parameters: dict[str, Any], source: Manifest, **found: Any) -> dict[str, Any]:
    """What an arranged source says of how: the operation, its parameters, their hash, and what it was made of."""
    return {
        "name": name,
        "version": VERSION,
        "settings": parameters,
        "parameters": parameters_hash(name, VERSION, parameters),
        "of": {"name": source.name, "fingerprint": source.fingerprint, "documents": source.documents},
        **found,
    }


def write_source(
    documents: Documents,
    groups: Sequence[NDArray[np.int64]],
    out: Path,
    name: str,
    facts: dict[str, Any],
    rows: list[dict[str, Any]] | None,
    shard_tokens: int = _SHARD_TOKENS,
) -> Manifest:
    """Write a source whose sequences are groups of documents, one behind another.

    Args:
        documents: That it is made of.
        groups: Numbers of documents, those of each sequence in order.
        out: The folder to make.
        name: Of the source.
        facts: What `arrangement` gives.
        rows: Where documents are from; None where that is not known.
        shard_tokens: A shard ends before the group that would make it longer.

    Raises:
        DataError: The folder is there, and holds something.
        EnvironmentProblem: The disk is full or failing.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            "The folder of an arranged source holds something.",
            where=out,
            found=None if out.is_dir() else "a file",
            expected="a folder that is not there, or an empty one",
        )
    beside = out.with_name(f".{out.name}.arranging-{os.getpid()}")
    try:
        manifest = _written(documents, groups, beside, name, facts, rows, shard_tokens)
        with disk_errors(out, "naming a source"):
            os.replace(beside, out)
    except BaseException:  # as large as the source, and nobody would look for it
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return manifest


def _written(
    documents: Documents,
    groups: Sequence[NDArray[np.int64]],
    beside: Path,
    name: str,
    facts: dict[str, Any],
    rows: list[dict[str, Any]] | None,
    shard_tokens: int,
) -> Manifest:
    """The files of the source, in a folder that has not got its name yet."""
    source, shards = documents.manifest, list[Shard]()
    for begin, end in _shards(groups, documents.lengths, shard_tokens):
        prefix = f"shard-{len(shards):05d}"
        with IndexedDatasetWriter(beside / prefix, source.token_dtype) as writer:
            for group in groups[begin:end]:
                writer.add_document(np.concatenate([documents[number] for number in group.tolist()]))
        shards.append(Shard.of(prefix, writer.written))
        if rows is not None:
            write_rows(beside / prefix, (_row(group, rows, documents.lengths) for group in groups[begin:end]))
    manifest = source.model_copy(update={"name": name, "shards": tuple(shards)})
    write_json(beside / ARRANGEMENT, facts)
    tokenizer = documents.folder / "tokenizer.json"
    if tokenizer.is_file():
        (beside / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    manifest.save(beside)
    return manifest


def _shards(
    groups: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64], most: int
) -> Iterator[tuple[int, int]]:
    begin = have = 0
    for position, group in enumerate(groups):
        tokens = int(lengths[group].sum())
        if have and have + tokens > most:
            yield begin, position
            begin, have = position, 0
        have += tokens
    if begin < len(groups):
        yield begin, len(groups)


def _row(group: NDArray[np.int64], rows: list[dict[str, Any]], lengths: NDArray[np.int64]) -> dict[str, Any]:
    """The sidecar's row of a group: of one document its own; of several the first's, and all of them as `members`."""
    numbers = group.tolist()
    first = rows[numbers[0]]
    if len(numbers) == 1:
        return first
    members = [rows[number] | {"tokens": int(lengths[number])} for number in numbers]
    return first | {"members": json.dumps(members)}
