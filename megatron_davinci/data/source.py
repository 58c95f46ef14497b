"""A source: its shards in order, cut into windows of `sequence_length + 1` tokens."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from megatron_davinci.data.indexed import Header, IndexedDataset, bin_path, idx_path, map_tokens, read_header
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.errors import DataError
from megatron_davinci.files import file_digest


class WindowPlace(NamedTuple):
    """Where a window lies: in shard `shard`, from token `token_offset` on."""

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
        num_tokens: Tokens in all shards.
        num_windows: Windows in all shards.
    """

    def __init__(
        self,
        name: str,
        sequence_length: int,
        prefixes: list[Path],
        tokens: list[int],
        dtype: np.dtype,
        fingerprint: str,
        vocab_size: int | None,
    ) -> None:
        self.name, self.sequence_length, self.dtype = name, sequence_length, dtype
        self.fingerprint = fingerprint
        self._prefixes, self._tokens, self._vocab_size = prefixes, tokens, vocab_size
        windows = [max(0, (count - 1) // sequence_length) for count in tokens]
        self._ends = list(itertools.accumulate(windows))
        self.num_tokens = sum(tokens)
        self.num_windows = sum(windows)
        if self.num_windows == 0:
            largest = max(tokens, default=0)
            raise DataError(
                f"Source {name} is too small for one window.",
                where=prefixes[0].parent if prefixes else None,
                found=f"{self.num_tokens:,} tokens in {len(tokens)} shards, at most {largest:,} in one",
                expected=f"{sequence_length + 1:,} tokens (sequence_length + 1) in one shard",
                do="add text, or lower data.sequence_length",
            )

    @classmethod
    def open(
        cls,
        name: str,
        path: str | os.PathLike[str],
        sequence_length: int,
        *,
        vocab_size: int | None = None,
        verify_digests: bool = False,
    ) -> Source:
        """Open a source. With a manifest this reads the manifest only, however many shards there are.

        Args:
            name: The source's name in the run; it keys the order of the windows.
            path: A folder with a `manifest.json`, or the prefix of one indexed dataset (`x_text_document`).
            sequence_length: S, in tokens.
            vocab_size: Rows of the model's embedding; every token that is read is checked against it.
            verify_digests: Read every shard now and compare it with the manifest's digest.

        Raises:
            DataError: The source is missing, damaged, too small for one window or made for a larger vocabulary.
            EnvironmentProblem: A file cannot be read.
        """
        path = Path(path)
        if not path.is_dir():
            return cls._open_prefix(name, path, sequence_length, vocab_size, verify_digests)
        manifest = Manifest.load(path)
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"Source {name} was tokenised for a larger vocabulary than the model has.",
                where=path,
                found=f"ids up to {manifest.vocab_size - 1:,}",
                expected=f"ids up to {vocab_size - 1:,}",
                do=f"set model.vocab_size to {manifest.vocab_size:,} or more, or tokenise with the model's tokenizer",
            )
        source = cls(
            name,
            sequence_length,
            [path / shard.prefix for shard in manifest.shards],
            [shard.tokens for shard in manifest.shards],
            manifest.token_dtype,
            manifest.fingerprint,
            vocab_size,
        )
        if verify_digests:
            for shard, expected in enumerate(manifest.shards):
                source.tokens(shard)
                _check_digest(bin_path(source._prefixes[shard]), expected.bin_sha256)
        return source

    @classmethod
    def _open_prefix(
        cls, name: str, prefix: Path, sequence_length: int, vocab_size: int | None, verify_digests: bool
    ) -> Source:
        if not idx_path(prefix).exists() and not bin_path(prefix).exists():
            raise DataError(
                f"Source {name} is not there.",
                where=prefix,
                found=f"neither a folder nor {prefix.name}.bin and {prefix.name}.idx",
                do="give a folder with a manifest.json, or the path of a .bin/.idx pair without its ending",
            )
        if verify_digests:
            raise DataError(
                f"Source {name} has no manifest, so there is no digest to verify.",
                where=prefix,
                do="write the source with `davinci data tokenize`, or switch data.verify_digests off",
            )
        # Nothing but the index says how long the token file should be, so all of it is checked.
        dataset = IndexedDataset(prefix)
        sizes = f"sizes:{dataset.dtype.name}:{dataset.num_tokens}"
        fingerprint = hashlib.sha256(sizes.encode()).hexdigest()
        return cls(
            name, sequence_length, [prefix], [dataset.num_tokens], dataset.dtype, fingerprint, vocab_size
        )

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
        """The tokens of a window: [sequence_length + 1] of `dtype`, a read-only view of the file.

        Raises:
            DataError: There is no such window, its shard does not match the manifest, or it holds a token outside
                the vocabulary that the source was opened with.
            EnvironmentProblem: The shard cannot be read.
        """
        shard, offset = self.locate(window)
        tokens = self.tokens(shard)[offset : offset + self.sequence_length + 1]
        if self._vocab_size is not None:
            self._check_vocabulary(tokens, shard, offset)
        return tokens

    def tokens(self, shard: int) -> np.ndarray:
        """All tokens of a shard, [T_k] of `dtype`, mapped; the files' sizes and dtype are checked on opening.

        Raises:
            DataError: The shard is missing, damaged, or not the one that the manifest describes.
            EnvironmentProblem: The shard cannot be read.
        """
        prefix, expected = self._prefixes[shard], self._tokens[shard]
        key = (str(prefix), expected, self.dtype.str)
        mapped = _open_shards.get(key)
        if mapped is None:
            header = read_header(prefix)
            self._check_shard(prefix, header, expected)
            mapped = map_tokens(prefix, header)
            _open_shards.put(key, mapped)
        return mapped

    def _check_shard(self, prefix: Path, header: Header, tokens: int) -> None:
        if header.dtype != self.dtype:
            raise DataError(
                f"A shard of source {self.name} has another dtype than its manifest says.",
                where=f"{idx_path(prefix)}, bytes 17 to 18",
                found=header.dtype.name,
                expected=self.dtype.name,
                do="write the source again with one dtype for all shards",
            )
        if header.num_tokens != tokens:
            raise DataError(
                f"A shard of source {self.name} has another size than its manifest says.",
                where=bin_path(prefix),
                found=f"{header.num_tokens:,} tokens, {header.bin_bytes:,} bytes",
                expected=f"{tokens:,} tokens, {tokens * self.dtype.itemsize:,} bytes",
                do="restore the shard, or write the source again",
            )

    def _check_vocabulary(self, tokens: np.ndarray, shard: int, offset: int) -> None:
        highest, lowest = int(tokens.max()), int(tokens.min()) if self.dtype.kind == "i" else 0
        if lowest < 0 or highest >= (self._vocab_size or 0):
            at = int(np.argmin(tokens) if lowest < 0 else np.argmax(tokens))
            first = (offset + at) * self.dtype.itemsize
            raise DataError(
                f"Source {self.name} holds a token outside the model's vocabulary.",
                where=f"{bin_path(self._prefixes[shard])}, bytes {first:,} to {first + self.dtype.itemsize:,}",
                found=int(tokens[at]),
                expected=f"0 to {(self._vocab_size or 0) - 1:,}",
                do="check which tokenizer made the source; with a manifest, data.verify_digests finds changed bytes",
            )


class _OpenShards:
    """The shards that are mapped now, over all sources; the longest unused is dropped.

    Python's `mmap` holds a file descriptor for as long as the mapping lives, and a corpus has more shards than a
    process may have open files. A view that a caller holds keeps its mapping alive after it is dropped here.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))
        self._mapped: OrderedDict[tuple[str, int, str], np.ndarray] = OrderedDict()
        self._lock = Lock()  # the prefetching thread and the caller's read from the same sources

    def get(self, key: tuple[str, int, str]) -> np.ndarray | None:
        with self._lock:
            if key in self._mapped:
                self._mapped.move_to_end(key)
            return self._mapped.get(key)

    def put(self, key: tuple[str, int, str], mapped: np.ndarray) -> None:
        with self._lock:
            self._mapped[key] = mapped
            while len(self._mapped) > self._limit:
                self._mapped.popitem(last=False)


_open_shards = _OpenShards()


def _check_digest(path: Path, expected: str) -> None:
    found = file_digest(path)
    if found != expected:
        raise DataError(
            "A token file is not the one that its manifest describes: its bytes differ.",
            where=path,
            found=f"sha256 {found}",
            expected=f"sha256 {expected}",
            do="restore the file, or write the source again",
        )
