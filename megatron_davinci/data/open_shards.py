"""The shards that are open now: tokens read by range, checked against the manifest when a shard is opened."""

from __future__ import annotations

import resource
from collections import OrderedDict
from threading import Lock
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.indexed import bin_path, idx_path, open_tokens
from megatron_davinci.data.mask import byte_range, mask_path, read_mask_header, unpack
from megatron_davinci.data.places import Place
from megatron_davinci.data.storage import Blob, open_blob
from megatron_davinci.errors import DataError


class ShardFiles(NamedTuple):
    """What is known of a shard before it is opened.

    Attributes:
        prefix: Place without `.bin` or `.idx`.
        tokens: Tokens in `.bin`.
        bin_sha256: Hex digest of `.bin`; None where nobody wrote it down.
        has_mask: A `.mask` says which tokens carry loss.
        mask_sha256: Hex digest of `.mask`.
        documents: Documents in `.idx`; None where nobody wrote it down.
        idx_sha256: Hex digest of `.idx`; likewise.
    """

    prefix: Place
    tokens: int
    bin_sha256: str | None = None
    has_mask: bool = False
    mask_sha256: str | None = None
    documents: int | None = None
    idx_sha256: str | None = None


class OpenShard:
    """One shard, open for reading.

    Args:
        source: The source's name, for messages.
        files: What the manifest says of it.
        dtype: Which the manifest says.

    Raises:
        DataError: The shard is missing, damaged, or not the one that the manifest describes.
        EnvironmentProblem: It cannot be opened.
    """

    def __init__(self, source: str, files: ShardFiles, dtype: np.dtype) -> None:
        self.dtype = dtype
        prefix, tokens = files.prefix, files.tokens
        header, self._blob = open_tokens(prefix)
        if header.dtype != dtype:
            raise DataError(
                f"A shard of source {source} has another dtype than its manifest says.",
                where=f"{idx_path(prefix)}, bytes 17 to 18",
                found=header.dtype.name,
                expected=dtype.name,
                do="write the source again with one dtype for all shards",
            )
        if header.num_tokens != tokens:
            raise DataError(
                f"A shard of source {source} has another size than its manifest says.",
                where=bin_path(prefix),
                found=f"{header.num_tokens:,} tokens, {header.bin_bytes:,} bytes",
                expected=f"{tokens:,} tokens, {tokens * dtype.itemsize:,} bytes",
                do="restore the shard, or write the source again",
            )
        if files.documents not in (None, header.document_bounds - 1):
            raise DataError(
                f"The index of a shard of source {source} is not the one that its manifest describes.",
                where=f"{idx_path(prefix)}, bytes 26 to 34",
                found=f"{header.document_bounds - 1:,} documents",
                expected=f"{files.documents:,} documents",
                do="restore the shard, or write the source again",
            )
        if files.has_mask:
            read_mask_header(prefix, tokens)
        self._prefix = prefix
        self._mask: Blob | None = None

    def read_into(self, first: int, row: np.ndarray) -> None:
        """Fill `row` ([n] of the shard's dtype, contiguous) with the tokens from `first` on, in one read."""
        self._blob.read_into(first * self.dtype.itemsize, row.data.cast("B"))

    def read_mask_into(self, first: int, row: np.ndarray) -> None:
        """Fill `row` ([n] uint8) with 1 for each token from `first` on that carries loss, else 0."""
        if self._mask is None:
            self._mask = open_blob(mask_path(self._prefix))
        offset, nbytes = byte_range(first, len(row))
        raw = bytearray(nbytes)
        self._mask.read_into(offset, memoryview(raw))
        unpack(raw, first, len(row), row)

    def will_need(self, first: int, count: int) -> None:
        """Say that tokens are read soon."""
        self._blob.will_need(first * self.dtype.itemsize, count * self.dtype.itemsize)

    def blob(self) -> Blob:
        """The token file."""
        return self._blob


class OpenShards:
    """A bounded number of open shards, over all sources; the longest unused is dropped.

    An open shard holds up to two file descriptors (tokens, a mask), and a corpus has more shards
    than a process may have open files. What a caller still holds stays open after it is dropped here.

    Attributes:
        limit: How many it keeps open at most.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))
        self._open: OrderedDict[tuple[object, int], OpenShard] = OrderedDict()
        self._lock = Lock()  # threads that read ahead and the caller's read from the same sources

    def get(self, key: tuple[object, int]) -> OpenShard | None:
        """The shard that was put under this key, if it is still open."""
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
            return self._open.get(key)

    def put(self, key: tuple[object, int], shard: OpenShard) -> None:
        """Keep a shard open."""
        with self._lock:
            self._open[key] = shard
            while len(self._open) > self.limit:
                self._open.popitem(last=False)


open_shards = OpenShards()
