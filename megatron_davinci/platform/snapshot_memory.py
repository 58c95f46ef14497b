"""Snapshots in a node's memory: the trainer's end of the keeper, and how a rank's two slots lie in their memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import snapshot_keeper as protocol

_START_SECONDS = 30.0
"""How long a keeper may take to answer after it was started; it takes some 50 ms."""
_MAGIC = b"DAVINCI SNAPSHOT 1\n"
_GEOMETRY = struct.Struct("<32sQQ")  # magic, bytes of the data region, bytes of the parity region
_MARK = struct.Struct("<Q16s")  # bytes of the record, and its digest
_PAGE = 4096
_MARK_BYTES = 16 * _PAGE
_DIGEST_CHUNK = 64 << 20

Part = Literal["data", "parity"]
_PARTS: tuple[Part, Part] = ("data", "parity")


def keeper_address(run: str, node: str) -> str:
    """The name that the keeper of a run on a node listens under."""
    return "davinci-snapshots-" + hashlib.sha256("\0".join((run, node)).encode()).hexdigest()[:32]


class Keeper:
    """A connection to the keeper of this node. While it is open, the keeper stays.

    Args:
        address: From `keeper_address`.
        keep_alive: Seconds that the keeper waits for the trainer to come back when it has gone.
        start: Whether to start one where there is none.
        label: What it is for, shown in the list of processes.

    Raises:
        EnvironmentProblem: Another user has taken the address, or no keeper could be started.
    """

    def __init__(self, address: str, keep_alive: float, *, start: bool = True, label: str = "") -> None:
        self.address, self.label = address, label
        self._connection = _connect(address, start, label)
        if self._connection is not None:
            self._ask({"do": "attach", "keep_alive": keep_alive})

    @property
    def is_there(self) -> bool:
        """Whether the keeper is alive; it never speaks unasked, so what can be read is its end."""
        if self._connection is None:
            return False
        look = select.poll()  # select() knows descriptors below 1,024 only, and a corpus has more shards
        look.register(self._connection, select.POLLIN)
        return not look.poll(0)

    def names(self) -> dict[str, int]:
        """What it holds, in bytes by name."""
        answer = self._ask({"do": "names"})[0] if self._connection is not None else {}
        return dict(answer.get("names", {}))

    def get(self, name: str) -> int | None:
        """A file descriptor of the memory under a name; None where there is none."""
        return self._ask({"do": "get", "name": name})[1] if self._connection is not None else None

    def put(self, name: str, descriptor: int) -> None:
        """Have it hold this memory too, under a name."""
        self._ask({"do": "put", "name": name}, descriptor)

    def drop(self, names: list[str]) -> None:
        """Have it let go of these."""
        if names:
            self._ask({"do": "drop", "names": names})

    def free(self) -> None:
        """Have it let go of everything and end. Whoever was first has done it for all; that is no error."""
        with contextlib.suppress(OSError):
            if self._connection is not None:
                self._ask({"do": "free"})

    def close(self) -> None:
        """Leave; the keeper waits for its time, unless it was told to end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(
        self, message: dict[str, Any], descriptor: int | None = None
    ) -> tuple[dict[str, Any], int | None]:
        if self._connection is None:
            raise ConnectionResetError("there is no keeper")
        protocol.send(self._connection, message, descriptor)
        return protocol.receive(self._connection)


def _connect(address: str, start: bool, label: str) -> socket.socket | None:
    until, started = time.monotonic() + _START_SECONDS, -math.inf
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect("\0" + address)
        except OSError as error:
            connection.close()
            if not start:
                return None
            if time.monotonic() > until:
                raise EnvironmentProblem(
                    "The process that keeps snapshots did not start.",
                    where=f"{sys.executable} {protocol.__file__}",
                    found=error,
                    do="run this command with a name as its argument and look at what it says, or set "
                    "snapshots.every_steps to null",
                ) from error
            # One that was just about to end may have been met; then another is needed.
            if time.monotonic() - started > 5.0:
                _start(address, label)
                started = time.monotonic()
            time.sleep(0.01)
            continue
        if (user := protocol.owner(connection)) != os.getuid():
            connection.close()
            raise EnvironmentProblem(
                "Another user's process has taken the name of this run's keeper of snapshots.",
                where=f"abstract socket @{address}",
                found=f"user id {user}",
                expected=f"user id {os.getuid()}",
                do="end that process (it is listed by `ss -xlp`), or set snapshots.every_steps to null",
            )
        return connection


def _start(address: str, label: str) -> None:
    """Start a keeper that belongs to nobody's session, so that what ends the trainer does not end it."""
    subprocess.Popen(
        [sys.executable, "-I", "-S", protocol.__file__, address, label],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def rounded(size: int) -> int:
    """Bytes in whole pages."""
    return -(-size // _PAGE) * _PAGE


def memory_bytes(data: int, parity: int) -> int:
    """What a rank's memory takes in all: two slots."""
    return _PAGE + 2 * (2 * _MARK_BYTES + rounded(data) + rounded(parity))


class RankMemory:
    """The memory of one rank's two slots.

    Each slot has two regions, `data` and `parity`, and for each a mark: a record with a digest of its own. A region
    is whole where its mark is, says its digest, and that digest is the region's.

    Args:
        descriptor: Of the memory, from `create` or a keeper; it belongs to this object from then on.

    Raises:
        ValueError: It is no such memory.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        if size < _PAGE:
            raise ValueError("too short")  # nothing can be mapped
        self._map = mmap.mmap(descriptor, size)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        magic, self.data_bytes, self.parity_bytes = _GEOMETRY.unpack_from(self._map)
        if magic.rstrip(b"\0") != _MAGIC or size != memory_bytes(self.data_bytes, self.parity_bytes):
            raise ValueError("of another kind")

    @classmethod
    def create(cls, data_bytes: int, parity_bytes: int) -> RankMemory:
        """New memory, all of it there: filled with zeros, so that nothing fails for want of it later.

        Raises:
            OSError: The machine does not have it.
        """
        size = memory_bytes(data_bytes, parity_bytes)
        descriptor = os.memfd_create("davinci-snapshot", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            os.pwrite(descriptor, _GEOMETRY.pack(_MAGIC, data_bytes, parity_bytes), 0)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def address(self) -> tuple[int, int]:
        """Of all of it in this process, and its bytes."""
        return self._bytes.ctypes.data, self._bytes.nbytes

    def region(self, slot: int, part: Part) -> np.ndarray:
        """A region as [bytes] uint8, which may be written to."""
        begin = self._slot(slot) + 2 * _MARK_BYTES + (rounded(self.data_bytes) if part == "parity" else 0)
        return self._bytes[begin : begin + (self.data_bytes if part == "data" else self.parity_bytes)]

    def invalidate(self, slot: int) -> None:
        """Take both marks off, before anything of the slot changes."""
        for part in _PARTS:
            begin = self._mark(slot, part)
            self._bytes[begin : begin + _MARK.size] = 0

    def mark(self, slot: int, part: Part, record: dict[str, Any]) -> None:
        """Say what is in a region, once it is."""
        content = json.dumps(record).encode()
        if _MARK.size + len(content) > _MARK_BYTES:
            raise ValueError(f"a mark of {len(content)} bytes")
        begin = self._mark(slot, part)
        text = begin + _MARK.size
        self._bytes[text : text + len(content)] = np.frombuffer(content, dtype=np.uint8)
        _MARK.pack_into(self._map, begin, len(content), xxhash.xxh3_128_digest(content))

    def read(self, slot: int, part: Part) -> dict[str, Any] | None:
        """What was marked; None where nothing was, or the mark is torn."""
        begin = self._mark(slot, part)
        length, digest = _MARK.unpack_from(self._map, begin)
        if not 0 < length <= _MARK_BYTES - _MARK.size:
            return None
        content = self._bytes[begin + _MARK.size : begin + _MARK.size + length].tobytes()
        if xxhash.xxh3_128_digest(content) != digest:
            return None
        record = json.loads(content)
        return record if isinstance(record, dict) else None

    def is_whole(self, slot: int, part: Part) -> bool:
        """Whether a region is what its mark says."""
        record = self.read(slot, part)
        return record is not None and digest_of(self.region(slot, part)) == record["digest"]

    def close(self) -> None:
        """Let go of it. It goes when the keeper lets go too.

        Arrays that were given out keep the mapping, and nothing else, until they are gone.
        """
        os.close(self.descriptor)
        del self._bytes
        with contextlib.suppress(BufferError):
            self._map.close()

    def _slot(self, slot: int) -> int:
        return _PAGE + slot * (2 * _MARK_BYTES + rounded(self.data_bytes) + rounded(self.parity_bytes))

    def _mark(self, slot: int, part: Part) -> int:
        return self._slot(slot) + _PARTS.index(part) * _MARK_BYTES


def digest_of(region: np.ndarray) -> str:
    """XXH3, 128 bits, in hex. It is against accidents, and as fast as memory; nobody else can write here."""
    digest = xxhash.xxh3_128()
    for begin in range(0, region.nbytes, _DIGEST_CHUNK):
        digest.update(region[begin : begin + _DIGEST_CHUNK].data)
    return digest.hexdigest()


def boot_id() -> str:
    """What tells this machine from every other, and from itself before it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
