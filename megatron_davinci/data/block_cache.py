"""Blocks of remote objects in a local folder that the processes of a machine share, never above its bound.

Layout: `FOLDER/blocks-1/<object>/<block>`, the object as 32 and the block as 8 or more hexadecimal digits. A block's
file is its bytes, then a CRC-32 for every 16 KiB of them, so that a read of a window checks the window and not the
block. Each CRC starts from the object and the block's number: a file under another's name is damage too.

Whoever writes holds `flock` on `ledger`, which says how much the folder holds. The sum is raised before a block is
written. A process that dies in between leaves it too high and never too low, and whatever has a temporary name while
one holds the lock is a dead process' remains.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

_CHUNK = 1 << 14
_LEDGER = struct.Struct("<qd")  # bytes held, and when the folder was last scanned
_OBJECT = re.compile(r"[0-9a-f]{32}")
_BLOCK = re.compile(r"[0-9a-f]{8,}")
_TEMPORARY = "tmp-"
_RESCAN_SECONDS = 3600  # after a power cut the ledger may be older than the blocks
_TOUCH_SECONDS = 10  # how coarse "least recently used" is; a touch is a write
_REST_SECONDS = 60  # between attempts to write where writing failed
_PATIENCE_SECONDS = 10
_POLL_SECONDS = 0.005

_log = logging.getLogger(__name__)
_said: set[str] = set()


class _Found(NamedTuple):
    used_at: float
    nbytes: int
    path: str


class BlockCache:
    """A bounded folder of blocks. Threads and processes may use it at once; a failing disk is only a slow cache.

    Args:
        folder: Where to keep them; made when the first block is stored. What others keep there is left alone.
        limit: Bytes that the files may hold in all; folders and the file system's rounding are not counted.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit = limit
        self._folder = folder
        self._root = folder / "blocks-1"
        self._rest_until = 0.0
        self._turns = -1

    def accepts(self, nbytes: int) -> bool:
        """Whether a block of this size could be kept now."""
        return _file_bytes(nbytes) + _LEDGER.size <= self.limit and time.monotonic() >= self._rest_until

    def holds(self, stored: str, block: int) -> bool:
        """Whether there is a file for the block; reading it may still find it damaged."""
        return os.path.exists(self._path(stored, block))

    def read_into(self, stored: str, block: int, nbytes: int, start: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the block's bytes from `start` on, if the block is here and whole.

        Args:
            stored: The object, as 32 hexadecimal digits.
            block: Its number in the object.
            nbytes: Its size.
            start: In bytes, from the block's start.
            buffer: Writable, contiguous, of single bytes, within the block.

        Returns:
            False if the block is not here or was damaged, and then is dropped. The buffer's content then has no
            meaning.
        """
        path = self._path(stored, block)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            if status.st_size == _file_bytes(nbytes) and _read(
                fd, nbytes, start, buffer, _seed(stored, block)
            ):
                if abs(time.time() - status.st_mtime) > _TOUCH_SECONDS:
                    with contextlib.suppress(OSError):
                        os.utime(fd)
                return True
        except OSError as error:
            self._rest(error)
            return False
        finally:
            os.close(fd)
        _log.warning("Dropped a damaged block of the S3 cache, to be fetched again: %s", path)
        with contextlib.suppress(OSError):
            os.unlink(path)
        return False

    def store(self, stored: str, block: int, content: memoryview | bytes) -> bool:
        """Keep a block, evicting those that were not used for longest.

        Returns:
            False if it could not be kept: it is larger than the limit, or the disk is full, read-only or failing.
            That is said once, and tried again after a minute.
        """
        if not self.accepts(len(content)):
            return False
        nbytes = _file_bytes(len(content))
        path = self._path(stored, block)
        try:
            with self._locked() as ledger:
                if os.path.exists(path):
                    return True
                room = self.limit - _LEDGER.size - nbytes
                used, scanned_at = _entry(ledger)
                if used > room or not 0 <= time.time() - scanned_at <= _RESCAN_SECONDS:
                    used, scanned_at = self._scan(room), time.time()
                os.pwrite(ledger, _LEDGER.pack(used + nbytes, scanned_at), 0)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                _write(path, content, _seed(stored, block))
        except OSError as error:
            self._rest(error)
            return False
        return True

    @contextlib.contextmanager
    def turn(self, stored: str, block: int) -> Iterator[None]:
        """Let one process at a time fetch a block, so that the next finds it here.

        The lock goes with its process. Whoever waits long, or cannot lock, fetches too: it costs a request.
        """
        fd = self._turns_file()
        position = zlib.crc32(f"{stored}/{block}".encode())
        held = fd >= 0 and _locks(fd, position)
        try:
            yield
        finally:
            if held:
                with contextlib.suppress(OSError):
                    fcntl.lockf(fd, fcntl.LOCK_UN, 1, position)

    def _turns_file(self) -> int:
        # Record locks belong to the process and fall with any descriptor of their file that it closes,
        # so this one stays open.
        if self._turns < 0:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                self._turns = os.open(self._root / "turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                self._rest(error)
        return self._turns

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        while True:
            self._root.mkdir(parents=True, exist_ok=True)
            # Opened each time: `flock` belongs to the open file, which a forked process would share.
            fd = os.open(self._root / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if not _polled(partial(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                    raise OSError(errno.EBUSY, "another process keeps the ledger locked")
                if os.fstat(fd).st_nlink:  # else somebody has cleared the folder meanwhile
                    yield fd
                    return
            finally:
                # Said, and not left to closing: a process that was forked meanwhile has the open file as well.
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)

    def _scan(self, room: int) -> int:
        """Count what is here; if it is more than `room`, evict down to a tenth less. The lock is held."""
        found = list(self._found())
        total = sum(block.nbytes for block in found)
        if total <= room:
            return total
        # A tenth at once, so that a full cache is not scanned for every block.
        target = max(0, room - self.limit // 10)
        for block in sorted(found):
            if total <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(block.path)
            total -= block.nbytes
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(block.path))  # only ever removes an empty folder
        return total

    def _found(self) -> Iterator[_Found]:
        for stored in os.scandir(self._root):
            if not _OBJECT.fullmatch(stored.name) or not stored.is_dir(follow_symlinks=False):
                continue
            for path in [entry.path for entry in os.scandir(stored.path)]:
                name = os.path.basename(path)
                with contextlib.suppress(FileNotFoundError):
                    if name.startswith(_TEMPORARY):
                        os.unlink(path)
                    elif _BLOCK.fullmatch(name):
                        status = os.stat(path, follow_symlinks=False)
                        yield _Found(status.st_mtime, status.st_size, path)

    def _rest(self, error: OSError) -> None:
        self._rest_until = time.monotonic() + _REST_SECONDS
        if str(self._folder) not in _said:
            _said.add(str(self._folder))
            _log.warning(
                "The S3 cache cannot be used, so every range is fetched from the server: %s: %s. "
                "Free space, or set data.s3.cache to another folder; the run goes on and tries again.",
                self._folder,
                error.strerror or error,
            )

    def _path(self, stored: str, block: int) -> str:
        return f"{self._root}/{stored}/{block:08x}"

    def __del__(self) -> None:
        if self.__dict__.get("_turns", -1) >= 0:
            with contextlib.suppress(OSError):
                os.close(self._turns)


def _file_bytes(nbytes: int) -> int:
    return nbytes + 4 * -(-nbytes // _CHUNK)


def _seed(stored: str, block: int) -> int:
    return zlib.crc32(f"{stored}/{block}".encode())


def _entry(ledger: int) -> tuple[int, float]:
    raw = os.pread(ledger, _LEDGER.size, 0)
    return _LEDGER.unpack(raw) if len(raw) == _LEDGER.size else (0, 0.0)


def _read(fd: int, nbytes: int, start: int, buffer: memoryview, seed: int) -> bool:
    first, last = start // _CHUNK, -(-(start + len(buffer)) // _CHUNK)
    begin, end = first * _CHUNK, min(last * _CHUNK, nbytes)
    content = memoryview(bytearray(end - begin))
    if os.preadv(fd, (content,), begin) != len(content):
        return False
    sums = os.pread(fd, 4 * (last - first), nbytes + 4 * first)
    found = _sums(content, seed)
    buffer[:] = content[start - begin : start - begin + len(buffer)]
    return sums == found


def _sums(content: memoryview, seed: int) -> bytes:
    sums = [zlib.crc32(content[at : at + _CHUNK], seed) for at in range(0, len(content), _CHUNK)]
    return struct.pack(f"<{len(sums)}I", *sums)


def _write(path: str, content: memoryview | bytes, seed: int) -> None:
    folder, name = os.path.split(path)
    temporary = f"{folder}/{_TEMPORARY}{os.getpid()}-{name}"
    try:
        with open(temporary, "wb", buffering=0) as file:
            _write_wholly(file.fileno(), memoryview(content))
            _write_wholly(file.fileno(), memoryview(_sums(memoryview(content), seed)))
        # Not synced: after a power cut the sums find what did not reach the disk.
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write_wholly(fd: int, content: memoryview) -> None:
    while content:
        content = content[os.write(fd, content) :]


def _locks(fd: int, position: int) -> bool:
    try:
        return _polled(partial(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position))
    except OSError:
        return False


def _polled(lock: Callable[[], object]) -> bool:
    """Ask for a lock again and again rather than wait for it: a stopped process must not stop the others."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            lock()
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True
