"""What a source holds: its tokens, how long its documents are, how much of it carries loss. Reads no token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np

from megatron_davinci.data.indexed import bin_path, idx_path, read_header
from megatron_davinci.data.lengths import Lengths, document_lengths
from megatron_davinci.data.manifest import FILE_NAME, Manifest
from megatron_davinci.data.mask import HEADER as MASK_HEADER
from megatron_davinci.data.mask import check_padding, mask_path, read_mask_header
from megatron_davinci.data.places import Place, S3Path, inside, place
from megatron_davinci.data.scan import THREADS, Meter, in_threads
from megatron_davinci.data.storage import open_blob, size_of
from megatron_davinci.errors import DataError, DavinciError

_CHUNK = 4 << 20  # bytes of a mask looked at at a time
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
_DOCUMENT_BYTES = 12  # of an index, for a document of one sequence


@dataclass(frozen=True)
class Census:
    """What a source holds. Made by `take_census`.

    Attributes:
        place: The folder, or the prefix.
        manifest: The folder's; None for a bare prefix.
        dtype: Of the tokens.
        shard_tokens: Tokens of each shard, in order.
        documents: In all shards, empty ones included.
        has_mask: Masks say which tokens carry loss; without, all do.
        read: Numbers of the shards whose indexes and masks were read and found whole.
        lengths: How long the documents of those shards are.
        loss_tokens: Tokens of those shards that carry loss.
        problems: What is wrong with the other shards that were to be read.
    """

    place: Place
    manifest: Manifest | None
    dtype: np.dtype
    shard_tokens: tuple[int, ...]
    documents: int
    has_mask: bool
    read: tuple[int, ...]
    lengths: Lengths
    loss_tokens: int
    problems: tuple[DavinciError, ...]

    @property
    def tokens(self) -> int:
        """In all shards."""
        return sum(self.shard_tokens)

    @property
    def is_sample(self) -> bool:
        """Whether shards were left out on purpose."""
        return len(self.read) + len(self.problems) < len(self.shard_tokens)

    @property
    def read_tokens(self) -> int:
        """In the shards that were read."""
        return sum(self.shard_tokens[shard] for shard in self.read)

    def windows(self, sequence_length: int) -> int:
        """Windows of `sequence_length + 1` tokens in all shards; see `Source`."""
        return sum(_windows(tokens, sequence_length) for tokens in self.shard_tokens)

    def lost_tokens(self, sequence_length: int) -> int:
        """Tokens at the shards' ends that are in no window."""
        return sum(
            tokens - (count * sequence_length + 1 if (count := _windows(tokens, sequence_length)) else 0)
            for tokens in self.shard_tokens
        )


def take_census(
    path: str | os.PathLike[str] | S3Path,
    *,
    sample: int | None = None,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> Census:
    """Read the indexes and masks of a source, in blocks: a few MB a thread, however many documents there are.

    Args:
        path: A folder with a `manifest.json`, or the prefix of one indexed dataset; local, or in S3.
        sample: Read so many shards only, evenly spread from the first to the last.
        threads: Shards that are read at once.
        progress: Called with bytes done and bytes in all (as the manifest lets one expect), by one thread at a time.

    Raises:
        DataError: There is no source, its manifest is wrong, or the one dataset of a prefix is damaged.
        EnvironmentProblem: The manifest cannot be read.
    """
    where = place(path)
    if isinstance(where, S3Path):
        # Indexes are read once: they would drive out of the cache what a run keeps there.
        where = replace(where, options=replace(where.options, cache_bytes=0))
    if where.is_dir() if isinstance(where, Path) else size_of(where / FILE_NAME) is not None:
        manifest = Manifest.load(where)
        prefixes: list[Place] = [inside(where, shard.prefix) for shard in manifest.shards]
        tokens = tuple(shard.tokens for shard in manifest.shards)
        dtype, documents, masked = manifest.token_dtype, manifest.documents, manifest.has_mask
    else:
        manifest, prefixes = None, [where]
        dtype, tokens, documents = _prefix_facts(where)
        masked = size_of(mask_path(where)) is not None
    chosen = _spread(len(prefixes), sample)
    known = [0] * len(prefixes) if manifest is None else [shard.documents for shard in manifest.shards]
    sizes = [_DOCUMENT_BYTES * known[k] + (tokens[k] // 8 if masked else 0) for k in chosen]
    meter, lock = Meter(sum(sizes), progress), Lock()
    lengths, loss = Lengths(), 0

    def read(shard: int) -> DavinciError | None:
        nonlocal loss
        mine = Lengths()
        try:
            if manifest is not None:
                _check_counts(prefixes[shard], manifest, shard)
            for block in document_lengths(prefixes[shard]):
                mine.add(block)
                meter.add(_DOCUMENT_BYTES * len(block))
            carrying = _count_loss(prefixes[shard], tokens[shard], meter) if masked else tokens[shard]
        except DavinciError as error:
            return error
        with lock:
            lengths.merge(mine)
            loss += carrying
        return None

    found = in_threads(read, chosen, threads, meter)
    problems = tuple(error for error in found if error is not None)
    if manifest is None and problems:
        raise problems[0]
    whole = tuple(shard for shard, error in zip(chosen, found, strict=True) if error is None)
    return Census(where, manifest, dtype, tokens, documents, masked, whole, lengths, loss, problems)


def count_bits(raw: bytes | bytearray | memoryview) -> int:
    """How many bits are 1."""
    return int(_BITS.take(np.frombuffer(raw, np.uint8)).sum(dtype=np.int64))


def _windows(tokens: int, sequence_length: int) -> int:
    return max(0, (tokens - 1) // sequence_length)


def _spread(count: int, sample: int | None) -> list[int]:
    """Numbers below `count`: all, or `sample` of them from the first to the last."""
    if sample is None or sample >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, sample - 1)) for i in range(sample)]


def _prefix_facts(prefix: Place) -> tuple[np.dtype, tuple[int, ...], int]:
    if size_of(idx_path(prefix)) is None and size_of(bin_path(prefix)) is None:
        raise DataError(
            "There is no source here.",
            where=prefix,
            found=f"neither a folder nor {prefix.name}.bin and {prefix.name}.idx",
            do="give a folder with a manifest.json, or the path of a .bin/.idx pair without its ending",
        )
    header = read_header(prefix)
    if header.dtype.kind not in "iu":
        raise DataError(
            "A dataset holds no token ids.",
            where=f"{idx_path(prefix)}, bytes 17 to 18",
            found=header.dtype.name,
            expected="an integer dtype",
            do="check the path: this dataset was not made by a tokenizer",
        )
    return header.dtype, (header.num_tokens,), max(0, header.document_bounds - 1)


def _check_counts(prefix: Place, manifest: Manifest, number: int) -> None:
    header, shard = read_header(prefix), manifest.shards[number]
    for what, found, expected in (
        ("dtype", header.dtype.name, manifest.dtype),
        ("number of tokens", f"{header.num_tokens:,}", f"{shard.tokens:,}"),
        ("number of documents", f"{header.document_bounds - 1:,}", f"{shard.documents:,}"),
    ):
        if found != expected:
            raise DataError(
                f"A shard has another {what} than the manifest says.",
                where=idx_path(prefix),
                found=found,
                expected=expected,
                do="restore the file, or write the source again",
            )


def _count_loss(prefix: Place, tokens: int, meter: Meter) -> int:
    read_mask_header(prefix, tokens)
    check_padding(prefix, tokens)
    return sum(map(count_bits, _pieces(mask_path(prefix), meter)))


def _pieces(path: Place, meter: Meter) -> Iterator[memoryview]:
    """The bits of a mask, in order."""
    blob = open_blob(path)
    piece = bytearray(min(_CHUNK, blob.size))
    for first in range(MASK_HEADER.size, blob.size, _CHUNK):
        part = memoryview(piece)[: min(_CHUNK, blob.size - first)]
        blob.read_into(first, part)
        yield part
        meter.add(len(part))
    blob.close()
