"""A source's files held against its manifest: everything that is wrong with them, not only the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from megatron_davinci.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.mask import check_padding, mask_path, read_mask_header
from megatron_davinci.data.places import Place, S3Path, inside, place
from megatron_davinci.data.scan import THREADS, Meter, TokenCheck, in_threads, read_through
from megatron_davinci.data.storage import digest_of, size_of
from megatron_davinci.data.survey import find_prefixes
from megatron_davinci.errors import DataError, DavinciError

_RESTORE = "restore the file, or write the source again"


@dataclass(frozen=True)
class Verified:
    """What verifying a source found.

    Attributes:
        manifest: What the source should be.
        problems: Of each shard, in the manifest's order, all that is wrong with it.
        unlisted: Datasets in a local folder that the manifest does not name; they are not part of the source.
    """

    manifest: Manifest
    problems: list[list[DavinciError]]
    unlisted: list[str]


def verify_source(
    folder: str | os.PathLike[str] | S3Path,
    *,
    deep: bool = False,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Hold every shard of a source against the manifest.

    Both files and their sizes, the dtype, the whole index, the numbers of tokens and documents, the digests of
    `.bin` and `.idx`; header, size and digest of `.mask`. In a manifest from before there is no digest of the index:
    other sequence lengths with the same sums then pass, which change no window.

    Args:
        folder: With a `manifest.json`; local, or in S3.
        deep: Look at the tokens too: each is in the vocabulary, and each document ends with the manifest's
            end-of-document token, but for those that packing has cut.
        threads: Shards that are read at once.
        progress: Called with bytes done and bytes in all, by one thread at a time.

    Raises:
        DataError: There is no manifest, or it is wrong.
        EnvironmentProblem: The manifest cannot be read.
    """
    where = place(folder)
    if isinstance(where, S3Path):
        # What lies there is asked for, not what lies in the cache; and the cache is not filled with all of it.
        where = replace(where, options=replace(where.options, cache_bytes=0))
    manifest = Manifest.load(where)
    meter = Meter(sum(shard.bin_bytes for shard in manifest.shards), progress)
    problems = in_threads(
        lambda shard: list(_problems(inside(where, shard.prefix), shard, manifest, deep, meter)),
        manifest.shards,
        threads,
        meter,
    )
    listed = {PurePosixPath(shard.prefix).as_posix() for shard in manifest.shards}
    there = find_prefixes(where) if isinstance(where, Path) else []
    return Verified(manifest, problems, [prefix for prefix in there if prefix not in listed])


def _problems(
    prefix: Place, shard: Shard, manifest: Manifest, deep: bool, meter: Meter
) -> Iterator[DavinciError]:
    dataset = None
    try:
        dataset = IndexedDataset(prefix)
    except DavinciError as error:
        yield error
    differences = []
    if dataset is not None:
        differences = list(_differences(dataset, prefix, shard, manifest))
        yield from differences
    deep = deep and dataset is not None and dataset.dtype == manifest.token_dtype
    check = None
    if deep and dataset is not None:
        check = TokenCheck(dataset, manifest.vocab_size, manifest.eod_id, manifest.packed)
    try:
        if dataset is not None and not differences:
            yield from _index(prefix, shard)
        yield from _tokens(prefix, shard, check, meter)
        yield from _mask(prefix, shard)
    except DavinciError as error:
        yield error
    if check is not None:
        yield from check.problems


def _differences(
    dataset: IndexedDataset, prefix: Place, shard: Shard, manifest: Manifest
) -> Iterator[DavinciError]:
    if dataset.dtype != manifest.token_dtype:
        yield DataError(
            "A shard has another dtype than the manifest says.",
            where=f"{idx_path(prefix)}, bytes 17 to 18",
            found=dataset.dtype.name,
            expected=manifest.dtype,
            do=_RESTORE,
        )
    documents = len(dataset.document_indices) - 1
    if documents != shard.documents:
        yield DataError(
            "A shard has another number of documents than the manifest says.",
            where=f"{idx_path(prefix)}, bytes 26 to 34",
            found=f"{documents:,} documents",
            expected=f"{shard.documents:,} documents",
            do=_RESTORE,
        )


def _index(prefix: Place, shard: Shard) -> Iterator[DavinciError]:
    if shard.idx_sha256 is not None:
        path = idx_path(prefix)
        yield from _other_digest(path, digest_of(path), shard.idx_sha256)


def _tokens(prefix: Place, shard: Shard, check: TokenCheck | None, meter: Meter) -> Iterator[DavinciError]:
    path = bin_path(prefix)
    size = size_of(path)
    if size is None:
        # With its index there, the dataset said so when it was opened.
        if size_of(idx_path(prefix)) is None:
            yield DataError("A token file is not there.", where=path, found="no such file", do=_RESTORE)
    elif size != shard.bin_bytes:
        yield DataError(
            "A token file has another size than the manifest says.",
            where=path,
            found=f"{size:,} bytes",
            expected=f"{shard.bin_bytes:,} bytes",
            do=_RESTORE,
        )
    else:
        yield from _other_digest(path, read_through(path, meter, check), shard.bin_sha256)
        return
    meter.add(shard.bin_bytes)


def _mask(prefix: Place, shard: Shard) -> Iterator[DavinciError]:
    path = mask_path(prefix)
    if shard.mask_sha256 is None:
        if size_of(path) is not None:
            yield DataError(
                "A mask is there that the manifest does not name: training would not use it.",
                where=path,
                found="a mask",
                expected="none",
                do="write the manifest again with `davinci data manifest`, or remove the mask",
            )
        return
    read_mask_header(prefix, shard.tokens)
    check_padding(prefix, shard.tokens)
    yield from _other_digest(path, digest_of(path), shard.mask_sha256)


def _other_digest(path: Place, found: str, expected: str) -> Iterator[DavinciError]:
    if found != expected:
        yield DataError(
            "A file is not the one that the manifest describes: its bytes differ.",
            where=path,
            found=f"sha256 {found}",
            expected=f"sha256 {expected}",
            do=_RESTORE,
        )
