"""A manifest for indexed datasets that are there already, from whatever program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from megatron_davinci.data.indexed import Header, IndexedDataset, bin_path, idx_path, read_header
from megatron_davinci.data.manifest import Manifest, Shard, problem_lines
from megatron_davinci.data.mask import check_padding, mask_path, read_mask_header
from megatron_davinci.data.places import local_path
from megatron_davinci.data.scan import THREADS, Meter, TokenCheck, in_threads, read_through
from megatron_davinci.data.storage import digest_of
from megatron_davinci.errors import DataError


def find_prefixes(folder: Path) -> list[str]:
    """The datasets in a folder, by name: what its `.bin`, `.idx` and `.mask` files are called without the ending.

    A file whose partner is missing counts too, so that it is not passed over in silence.

    Raises:
        DataError: It is no folder.
    """
    if not folder.is_dir():
        raise DataError("This is not a folder.", where=folder, expected="a folder with .bin/.idx pairs")
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted({path.stem for path in files if path.suffix in (".bin", ".idx", ".mask")})


def make_manifest(
    folder: str | os.PathLike[str],
    prefixes: Sequence[str] | None = None,
    *,
    name: str | None = None,
    domain: str | None = None,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    tokenizer_sha256: str | None = None,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Check datasets wholly, read every token of them, and say what they are. Writes nothing.

    Args:
        folder: Where `manifest.json` is to lie.
        prefixes: The shards in their order, relative to the folder, without an ending. Default: all datasets in
            the folder itself, by name.
        name: The source's name; default: the folder's.
        domain: The domain that reports group it by; default: the name.
        vocab_size: Largest id that the tokenizer can give, plus 1. Default: the largest id found, plus 1.
        eod_id: The token that ends each document, which is checked; None if there is none.
        tokenizer_sha256: Hex digest of the tokenizer's file; None if it is not known.
        threads: Shards that are read at once.
        progress: Called with bytes done and bytes in all, by one thread at a time.

    Raises:
        DataError: A dataset is missing or damaged, two differ in dtype, one has no integers, only some have a
            mask, a token is outside the vocabulary, or a document does not end with `eod_id`.
        EnvironmentProblem: A file cannot be read.
    """
    folder = local_path(folder)
    shards = find_prefixes(folder) if prefixes is None else [PurePosixPath(p).as_posix() for p in prefixes]
    if not shards:
        raise DataError(
            "There is no dataset here.",
            where=folder,
            found="no .bin and no .idx file",
            expected="at least one .bin/.idx pair",
            do="if they lie deeper, name them, relative to the folder and without an ending",
        )
    # What costs little comes first: nobody waits hours to hear that a dtype differs.
    headers = [read_header(folder / shard) for shard in shards]
    _check_dtypes([folder / shard for shard in shards], headers)
    masked = any(mask_path(folder / shard).exists() for shard in shards)
    for shard, header in zip(shards, headers, strict=True) if masked else ():
        read_mask_header(folder / shard, header.num_tokens)
    name = name or folder.resolve().name

    def manifest(vocabulary: int, entries: Iterable[dict[str, Any]]) -> Manifest:
        try:
            return Manifest(
                name=name,
                domain=domain or name,
                dtype=headers[0].dtype.name,
                vocab_size=vocabulary,
                eod_id=eod_id,
                tokenizer_sha256=tokenizer_sha256,
                shards=tuple(Shard(**entry) for entry in entries),
            )
        except ValidationError as error:
            raise DataError(
                "No manifest can be made of these datasets.",
                where=folder,
                found="\n".join(problem_lines(error)),
            ) from error

    nothing = {"tokens": 0, "documents": 0, "bin_bytes": 0, "bin_sha256": "0" * 64}
    manifest(
        (eod_id or 0) + 1 if vocab_size is None else vocab_size,
        ({"prefix": shard, **nothing} for shard in shards),
    )
    meter = Meter(sum(header.bin_bytes for header in headers), progress)

    def read(shard: str) -> tuple[dict[str, Any], int]:
        prefix = folder / shard
        dataset = IndexedDataset(prefix)
        check = TokenCheck(dataset, vocab_size, eod_id)
        digest = read_through(bin_path(prefix), meter, check)
        if check.problems:
            raise check.problems[0]
        if masked:
            check_padding(prefix, dataset.num_tokens)
        entry = {
            "prefix": shard,
            "tokens": dataset.num_tokens,
            "documents": len(dataset.document_indices) - 1,
            "bin_bytes": dataset.num_tokens * dataset.dtype.itemsize,
            "bin_sha256": digest,
            "mask_sha256": digest_of(mask_path(prefix)) if masked else None,
            "idx_sha256": digest_of(idx_path(prefix)),
        }
        return entry, check.highest

    found = in_threads(read, shards, threads, meter)
    if vocab_size is None:
        vocab_size = _vocabulary(max(highest for _, highest in found), folder)
    return manifest(vocab_size, (entry for entry, _ in found))


def _vocabulary(largest: int, folder: Path) -> int:
    if largest < 0:
        raise DataError(
            "There is no token here, so no vocabulary can be told from the tokens.",
            where=folder,
            found="datasets that are all empty",
            do="say the vocabulary's size",
        )
    return largest + 1


def _check_dtypes(prefixes: list[Path], headers: list[Header]) -> None:
    first = headers[0].dtype
    for prefix, header in zip(prefixes, headers, strict=True):
        if header.dtype.kind not in "iu":
            raise DataError(
                "A dataset holds no token ids.",
                where=f"{idx_path(prefix)}, bytes 17 to 18",
                found=header.dtype.name,
                expected="an integer dtype",
            )
        if header.dtype != first:
            raise DataError(
                "Two shards of a source have different dtypes.",
                where=f"{idx_path(prefixes[0])}, bytes 17 to 18\n{idx_path(prefix)}, bytes 17 to 18",
                found=f"{first.name} in the first, {header.dtype.name} in the second",
                expected="one dtype in all shards",
                do="make two sources of them, or write one again with the other's dtype",
            )
