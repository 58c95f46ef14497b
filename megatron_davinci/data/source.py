"""A source: its shards in order, cut into windows of `sequence_length + 1` tokens."""

from __future__ import annotations

import hashlib
import itertools
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_davinci.data import open_shards as shards
from megatron_davinci.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_davinci.data.manifest import FILE_NAME, Manifest
from megatron_davinci.data.mask import mask_path
from megatron_davinci.data.open_shards import OpenShard, ShardFiles
from megatron_davinci.data.places import Place, S3Path, inside, place
from megatron_davinci.data.storage import Blob, digest_of, size_of
from megatron_davinci.errors import DataError
from megatron_davinci.platform.cores import usable_cores


class WindowPlace(NamedTuple):
    """Where a window lies.

    Attributes:
        shard: Number of the shard.
        token_offset: The window's first token in it.
    """

    shard: int
    token_offset: int


class Source:
    """Numbered windows of tokens.

    A window lies in one shard. Shard `k` with `T_k` tokens has `max(0, (T_k - 1) // S)` windows, numbered across
    the shards in order; window `i` of a shard is its tokens `[i*S, i*S + S + 1)`, so that inputs are all but the
    last and labels all but the first. Shards are opened when a window of theirs is first read.

    Use `Source.open`.

    Attributes:
        name: The source's name in the run.
        sequence_length: S.
        dtype: The tokens' dtype on disk.
        fingerprint: Hex digest of what decides the windows' content; over sizes alone for a bare prefix.
        eod_id: The token that ends each document; None if there is none, or no manifest to say so.
        packed: Tokens of a sequence, where documents are packed into some, and cut at their ends; else None.
        num_tokens: Tokens in all shards.
        num_windows: Windows in all shards.
    """

    def __init__(
        self,
        name: str,
        sequence_length: int,
        files: list[ShardFiles],
        dtype: np.dtype,
        fingerprint: str,
        vocab_size: int | None,
        eod_id: int | None = None,
        packed: int | None = None,
    ) -> None:
        if sequence_length < 1:
            raise DataError(
                "A window has at least one label.", where="sequence_length", found=sequence_length
            )
        self.name, self.sequence_length, self.dtype = name, sequence_length, dtype
        self.fingerprint, self.eod_id, self.packed = fingerprint, eod_id, packed
        self._files, self._vocab_size = files, vocab_size
        self._identity = (
            object()
        )  # what its open shards are kept under; another in a process that it is sent to
        tokens = [file.tokens for file in files]
        windows = [max(0, (count - 1) // sequence_length) for count in tokens]
        self._ends = list(itertools.accumulate(windows))
        self.num_tokens = sum(tokens)
        self.num_windows = sum(windows)
        if self.num_windows == 0:
            largest = max(tokens, default=0)
            raise DataError(
                f"Source {name} is too small for one window.",
                where=files[0].prefix.parent if files else None,
                found=f"{self.num_tokens:,} tokens in {len(tokens)} shards, at most {largest:,} in one",
                expected=f"{sequence_length + 1:,} tokens (sequence_length + 1) in one shard",
                do="add text, or lower data.sequence_length",
            )

    @classmethod
    def open(
        cls,
        name: str,
        path: str | os.PathLike[str] | S3Path,
        sequence_length: int,
        *,
        vocab_size: int | None = None,
        verify_digests: bool = False,
    ) -> Source:
        """Open a source. With a manifest this reads the manifest only, however many shards there are.

        Args:
            name: The source's name in the run; it keys the order of the windows.
            path: A folder with a `manifest.json`, or the prefix of one indexed dataset (`x_text_document`); local,
                or in S3.
            sequence_length: S, in tokens.
            vocab_size: Rows of the model's embedding; every token that is read is checked against it.
            verify_digests: Read every shard now and compare it with the manifest's digest.

        Raises:
            DataError: The source is missing, damaged, too small for one window or made for a larger vocabulary.
            EnvironmentProblem: A file cannot be read.
        """
        folder = place(path)
        if not (folder.is_dir() if isinstance(folder, Path) else size_of(folder / FILE_NAME) is not None):
            source = cls._open_prefix(name, folder, sequence_length, vocab_size)
            if verify_digests:
                source.verify()
            return source
        manifest = Manifest.load(folder)
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"Source {name} was tokenised for a larger vocabulary than the model has.",
                where=folder,
                found=f"ids up to {manifest.vocab_size - 1:,}",
                expected=f"ids up to {vocab_size - 1:,}",
                do=f"set model.vocab_size to {manifest.vocab_size:,} or more, or tokenise with the model's tokenizer",
            )
        source = cls(
            name,
            sequence_length,
            [
                ShardFiles(
                    inside(folder, shard.prefix),
                    shard.tokens,
                    shard.bin_sha256,
                    manifest.has_mask,
                    shard.mask_sha256,
                    shard.documents,
                    shard.idx_sha256,
                )
                for shard in manifest.shards
            ],
            manifest.token_dtype,
            manifest.fingerprint,
            vocab_size,
            manifest.eod_id,
            manifest.packed,
        )
        if verify_digests:
            source.verify()
        return source

    @classmethod
    def _open_prefix(cls, name: str, prefix: Place, sequence_length: int, vocab_size: int | None) -> Source:
        if size_of(idx_path(prefix)) is None and size_of(bin_path(prefix)) is None:
            raise DataError(
                f"Source {name} is not there.",
                where=prefix,
                found=f"neither a folder nor {prefix.name}.bin and {prefix.name}.idx",
                do="give a folder with a manifest.json, or the path of a .bin/.idx pair without its ending",
            )
        # Nothing but the index says how long the token file should be, so all of it is checked.
        dataset = IndexedDataset(prefix)
        if dataset.dtype.kind not in "iu":
            raise DataError(
                f"Source {name} holds numbers that are no token ids.",
                where=f"{idx_path(prefix)}, bytes 17 to 18",
                found=dataset.dtype.name,
                expected="an integer dtype",
                do="check the path: this dataset was not made by a tokenizer",
            )
        has_mask = size_of(mask_path(prefix)) is not None
        sizes = f"sizes:{dataset.dtype.name}:{dataset.num_tokens}" + (":mask" if has_mask else "")
        fingerprint = hashlib.sha256(sizes.encode()).hexdigest()
        files = [ShardFiles(prefix, dataset.num_tokens, has_mask=has_mask)]
        return cls(name, sequence_length, files, dataset.dtype, fingerprint, vocab_size)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read shards whole and compare them with the manifest's digests.

        Args:
            part: Which part of the shards: every `parts`-th from this one on.
            parts: How many share the work.

        Raises:
            DataError: A shard is missing, damaged or not the one that the manifest describes, or there is none.
            EnvironmentProblem: A shard cannot be read.
        """
        mine = range(part, len(self._files), parts)
        with ThreadPoolExecutor(min(8, usable_cores())) as threads:
            for _ in threads.map(self._verify_shard, mine):
                pass

    def _verify_shard(self, number: int) -> None:
        self._shard(number)
        files = self._files[number]
        if files.bin_sha256 is None:
            raise DataError(
                f"Source {self.name} has no manifest, so there is no digest to verify.",
                where=files.prefix,
                do="make one with `davinci data manifest`, or switch data.verify_digests off",
            )
        IndexedDataset(files.prefix)  # also where its digest is not known it has to be one of these tokens
        if files.idx_sha256 is not None:
            _check_digest(idx_path(files.prefix), files.idx_sha256)
        _check_digest(bin_path(files.prefix), files.bin_sha256)
        if files.mask_sha256 is not None:
            _check_digest(mask_path(files.prefix), files.mask_sha256)

    def locate(self, window: int) -> WindowPlace:
        """Where a window lies. O(log shards).

        Raises:
            DataError: There is no such window.
        """
        if not 0 <= window < self.num_windows:
            raise DataError(
                f"Source {self.name} has no such window.",
                found=f"window {window:,}",
                expected=f"0 to {self.num_windows - 1:,}",
            )
        shard = bisect_right(self._ends, window)
        first = self._ends[shard - 1] if shard else 0
        return WindowPlace(shard, (window - first) * self.sequence_length)

    def read(self, window: int) -> np.ndarray:
        """The tokens of a window: [sequence_length + 1] of `dtype`.

        Raises:
            DataError: There is no such window, its shard does not match the manifest, or it holds a token outside
                the vocabulary that the source was opened with.
            EnvironmentProblem: The shard cannot be read.
        """
        # Never a view of a mapped file: where that is cut short later, a view holds zeros or ends the process.
        tokens = np.empty(self.sequence_length + 1, self.dtype)
        self.read_into(window, tokens)
        return tokens

    def read_into(self, window: int, row: np.ndarray) -> None:
        """Read a window into an array, without a copy in between where `row` has the source's dtype.

        Args:
            window: Number of the window.
            row: [sequence_length + 1], contiguous, of an integer dtype that holds the vocabulary.

        Raises:
            DataError: As `read`. What `row` holds then has no meaning.
            EnvironmentProblem: As `read`.
        """
        shard, first = self.locate(window)
        tokens = row if row.dtype == self.dtype else np.empty(len(row), self.dtype)
        self._shard(shard).read_into(first, tokens)
        self._check_vocabulary(tokens, shard, first)
        if tokens is not row:
            row[:] = tokens

    @property
    def has_mask(self) -> bool:
        """Whether masks say which tokens carry loss; without, all do."""
        return any(files.has_mask for files in self._files)

    def read_mask_into(self, window: int, row: np.ndarray) -> None:
        """Say which labels of a window carry loss.

        Args:
            window: Number of the window.
            row: [sequence_length] uint8, is filled: 1 where the label, the next token, carries loss, else 0.

        Raises:
            DataError: As `read`, of the mask.
            EnvironmentProblem: As `read`.
        """
        if not self.has_mask:
            row[:] = 1
            return
        shard, first = self.locate(window)
        self._shard(shard).read_mask_into(first + 1, row)

    def will_need(self, window: int) -> None:
        """Say that a window is read soon: its bytes are fetched in the background.

        Raises:
            DataError: As `read`, for what is known without its tokens.
            EnvironmentProblem: As `read`.
        """
        shard, first = self.locate(window)
        self._shard(shard).will_need(first, self.sequence_length + 1)

    def blob(self, shard: int) -> Blob:
        """The token file of a shard, open, of the size and dtype that the manifest gives.

        Raises:
            DataError: The shard is missing, damaged, or not the one that the manifest describes.
            EnvironmentProblem: It cannot be opened.
        """
        return self._shard(shard).blob()

    def check_tokens(self, window: int, tokens: np.ndarray) -> None:
        """Check a window's tokens, read by whatever way, against the vocabulary.

        Args:
            window: Number of the window.
            tokens: [sequence_length + 1] integers.

        Raises:
            DataError: One of them is outside; the message says where it lies.
        """
        self._check_vocabulary(tokens, *self.locate(window))

    @property
    def vocab_size(self) -> int | None:
        """Rows of the model's embedding, if tokens are checked against it."""
        return self._vocab_size

    @property
    def window_ends(self) -> np.ndarray:
        """[num_shards] int64: for each shard, the number of windows in it and all before it."""
        return np.array(self._ends, np.int64)

    def shard_place(self, shard: int) -> Place:
        """Where a shard lies, without `.bin` or `.idx`."""
        return self._files[shard].prefix

    @property
    def num_shards(self) -> int:
        """Shards, with those that are too small for a window."""
        return len(self._files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_identity": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _identity=object())

    def _shard(self, number: int) -> OpenShard:
        key = (self._identity, number)
        shard = shards.open_shards.get(key)
        if shard is None:
            shard = OpenShard(self.name, self._files[number], self.dtype)
            shards.open_shards.put(key, shard)
        return shard

    def _check_vocabulary(self, tokens: np.ndarray, shard: int, offset: int) -> None:
        if self._vocab_size is None:
            return
        highest, lowest = int(tokens.max()), int(tokens.min()) if self.dtype.kind == "i" else 0
        if lowest < 0 or highest >= self._vocab_size:
            at = int(np.argmin(tokens) if lowest < 0 else np.argmax(tokens))
            first = (offset + at) * self.dtype.itemsize
            raise DataError(
                f"Source {self.name} holds a token outside the model's vocabulary.",
                where=f"{bin_path(self._files[shard].prefix)}, bytes {first:,} to {first + self.dtype.itemsize:,}",
                found=int(tokens[at]),
                expected=f"0 to {self._vocab_size - 1:,}",
                do="check which tokenizer made the source; with a manifest, data.verify_digests finds changed bytes",
            )


def _check_digest(path: Place, expected: str) -> None:
    found = digest_of(path)
    if found != expected:
        raise DataError(
            "A file is not the one that its manifest describes: its bytes differ.",
            where=path,
            found=f"sha256 {found}",
            expected=f"sha256 {expected}",
            do="restore the file, or write the source again",
        )
