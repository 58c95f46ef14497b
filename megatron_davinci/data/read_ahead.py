"""Which ranges of remote objects are fetched when: each once, neighbours together, hints in the background.

A fetch is one request. A reader or a hint puts it into a table; whoever claims it first makes it, and everyone else
who wants the same bytes waits for its result. A reader thus never stands behind hints that have not begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

from megatron_davinci.data.block_cache import BlockCache
from megatron_davinci.data.places import S3Path

THREADS = 16
_LARGEST = 8 << 20  # of one request: what a retry costs again, and what the threads share out
_AHEAD = 64 << 20  # hinted and not yet read or on disk, in bytes
_IDLE_SECONDS = 30


class Remote(NamedTuple):
    """An object as it was when it was opened.

    Attributes:
        place: Where it is.
        etag: What changes when its content does.
        size: In bytes.
        id: 32 hexadecimal digits that stand for all of these, the server and the size of a block.
    """

    place: S3Path
    etag: str
    size: int
    id: str


Get = Callable[[Remote, int, int], bytes]


class _Fetch:
    """One request that is wanted: bytes `start` to `stop` of an object.

    Attributes:
        ahead: A hint asked for it, so its bytes are held for who reads them.
        dropped: Nobody wants it any more, except who has it already.
        taken: A reader has had its bytes.
        held: It is over, and its bytes are here and nowhere else.
        result: Its bytes, or what went wrong.
    """

    def __init__(self, remote: Remote, pieces: list[tuple[int, int]], ahead: bool) -> None:
        self.remote, self.pieces, self.ahead = remote, pieces, ahead
        self.start, self.stop = pieces[0][0], pieces[-1][1]
        self.dropped = self.taken = self.held = False
        self.result: Future[bytes | bytearray] = Future()
        self._claim = Lock()

    def claim(self) -> bool:
        """True for the first who asks, who then makes the request."""
        return self._claim.acquire(blocking=False)


class Reader:
    """Reads ranges of remote objects, through a cache of blocks if there is one.

    Args:
        get: Makes one request: bytes `start` to `stop` of an object, all of them, or raises.
        cache: Keeps blocks on disk; None to fetch the very ranges that are asked for.
        block_bytes: Size of a block.
    """

    def __init__(self, get: Get, cache: BlockCache | None, block_bytes: int) -> None:
        self._get, self._cache, self._block = get, cache, block_bytes
        self._table: dict[tuple[str, int, int], _Fetch] = {}
        self._ahead: dict[_Fetch, None] = {}  # in the order of the hints
        self._ahead_bytes = 0
        self._lock = Lock()
        self._workers = _Workers(self._work)

    def read_into(self, remote: Remote, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on, wholly, or raise what `get` raised. The range lies within the object."""
        missing = [
            piece
            for piece in self._pieces(remote, offset, offset + len(view))
            if not self._from_disk(remote, piece, offset, view)
        ]
        fetches = deque(self._fetches(remote, missing, ahead=False))
        for fetch in islice(fetches, 1, None):
            self._workers.submit(fetch)
        while fetches:
            fetch = fetches.popleft()
            if fetch.claim():
                self._run(fetch)
            content = memoryview(fetch.result.result())
            begin, end = max(fetch.start, offset), min(fetch.stop, offset + len(view))
            view[begin - offset : end - offset] = content[begin - fetch.start : end - fetch.start]
            self._taken(fetch)

    def will_need(self, remote: Remote, offset: int, nbytes: int) -> None:
        """Begin to fetch what is missing of a range, unless 64 MiB are on their way or unread already."""
        missing = [
            piece
            for piece in self._pieces(remote, offset, min(offset + nbytes, remote.size))
            if self._cache is None or not self._cache.holds(remote.id, piece[0] // self._block)
        ]
        for fetch in self._fetches(remote, missing, ahead=True):
            self._workers.submit(fetch)

    def let_go(self, remote: Remote) -> None:
        """Forget the hints on an object and what they fetched into memory."""
        with self._lock:
            for fetch in [fetch for fetch in self._ahead if fetch.remote.id == remote.id]:
                self._remove(fetch)

    def _pieces(self, remote: Remote, offset: int, end: int) -> Iterator[tuple[int, int]]:
        if self._cache is None or not self._cache.accepts(self._block):
            # What cannot be kept is not worth more than was asked for; what was kept is read all the same.
            step = _LARGEST if self._cache is None else self._block
            while offset < end:
                stop = min(end, (offset // step + 1) * step)
                yield offset, stop
                offset = stop
            return
        for start in range(offset - offset % self._block, end, self._block):
            yield start, min(start + self._block, remote.size)

    def _from_disk(self, remote: Remote, piece: tuple[int, int], offset: int, view: memoryview) -> bool:
        if self._cache is None:
            return False
        begin, end = max(piece[0], offset), min(piece[1], offset + len(view))
        number = piece[0] // self._block
        first = number * self._block
        nbytes = min(self._block, remote.size - first)
        part = view[begin - offset : end - offset]
        return self._cache.read_into(remote.id, number, nbytes, begin - first, part)

    def _fetches(self, remote: Remote, pieces: list[tuple[int, int]], ahead: bool) -> Iterator[_Fetch]:
        """For a reader the fetches that bring the pieces, in order; for a hint those that are new."""
        with self._lock:
            run: list[tuple[int, int]] = []
            fetches: list[_Fetch] = []
            for piece in pieces:
                known = self._table.get((remote.id, *piece))
                far = run and (run[-1][1] != piece[0] or piece[1] - run[0][0] > _LARGEST)
                if run and (known or far):
                    fetches.append(self._enter(remote, run, ahead))
                    run = []
                if known is None:
                    if ahead and not self._room(sum(b - a for a, b in run) + piece[1] - piece[0]):
                        break
                    run.append(piece)
                elif not ahead and (not fetches or fetches[-1] is not known):
                    fetches.append(known)
            if run:
                fetches.append(self._enter(remote, run, ahead))
        yield from fetches

    def _enter(self, remote: Remote, pieces: list[tuple[int, int]], ahead: bool) -> _Fetch:
        fetch = _Fetch(remote, pieces, ahead)
        for piece in pieces:
            self._table[(remote.id, *piece)] = fetch
        if ahead:
            self._ahead[fetch] = None
            self._ahead_bytes += fetch.stop - fetch.start
        return fetch

    def _room(self, nbytes: int) -> bool:
        for fetch in list(self._ahead):
            if self._ahead_bytes + nbytes <= _AHEAD:
                break
            if fetch.held:
                self._remove(fetch)
        return self._ahead_bytes + nbytes <= _AHEAD

    def _work(self, fetch: _Fetch) -> None:
        if not fetch.dropped and fetch.claim():
            self._run(fetch)

    def _run(self, fetch: _Fetch) -> None:
        """Make the request and tell everyone who waits. A failure is theirs too; the next reader tries anew."""
        kept = False
        try:
            cache = self._cache
            if cache is None or not cache.accepts(self._block) or not self._of_blocks(fetch):
                fetch.result.set_result(self._get(fetch.remote, fetch.start, fetch.stop))
                return
            with cache.turn(fetch.remote.id, fetch.start // self._block):
                content, missing = self._content(fetch)
                fetch.result.set_result(content)
                whole = memoryview(content)
                kept = all(
                    cache.store(fetch.remote.id, a // self._block, whole[a - fetch.start : b - fetch.start])
                    for a, b in missing
                )
        except BaseException as error:
            if fetch.result.done():
                raise
            fetch.result.set_exception(error)
        finally:
            # Not before it is on disk: until then the table is where the next reader finds it.
            with self._lock:
                fetch.held = fetch.ahead and not kept and not fetch.taken and fetch.result.exception() is None
                if not fetch.held:
                    self._remove(fetch)

    def _taken(self, fetch: _Fetch) -> None:
        with self._lock:
            fetch.taken = True
            if fetch.held:
                self._remove(fetch)

    def _content(self, fetch: _Fetch) -> tuple[bytes | bytearray, list[tuple[int, int]]]:
        """What was asked for, and which blocks of it were not on disk."""
        # Another process may have fetched them while this one waited for its turn, or another thread since they were
        # looked for.
        content = bytearray(fetch.stop - fetch.start)
        view = memoryview(content)
        missing = [
            piece for piece in fetch.pieces if not self._from_disk(fetch.remote, piece, fetch.start, view)
        ]
        if not missing:
            return content, missing
        start, stop = missing[0][0], missing[-1][1]
        answer = self._get(fetch.remote, start, stop)
        if (start, stop) == (fetch.start, fetch.stop):
            return answer, missing
        view[start - fetch.start : stop - fetch.start] = answer
        return content, missing

    def _of_blocks(self, fetch: _Fetch) -> bool:
        return all(
            start % self._block == 0 and stop == min(start + self._block, fetch.remote.size)
            for start, stop in fetch.pieces
        )

    def _remove(self, fetch: _Fetch) -> None:
        fetch.dropped = True
        for piece in fetch.pieces:
            key = (fetch.remote.id, *piece)
            if self._table.get(key) is fetch:
                del self._table[key]
        if fetch in self._ahead:
            del self._ahead[fetch]
            self._ahead_bytes -= fetch.stop - fetch.start


class _Workers:
    """Threads that come with work and go without. Daemons: an ending process waits for no server."""

    def __init__(self, work: Callable[[_Fetch], None]) -> None:
        self._work = work
        self._queue: SimpleQueue[_Fetch] = SimpleQueue()
        self._lock = Lock()
        self._count = 0

    def submit(self, fetch: _Fetch) -> None:
        with self._lock:
            self._queue.put(fetch)
            if self._count >= THREADS:
                return
            self._count += 1
        Thread(target=self._loop, name="s3-read-ahead", daemon=True).start()

    def _loop(self) -> None:
        while True:
            try:
                fetch = self._queue.get(timeout=_IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if self._queue.empty():
                        self._count -= 1
                        return
                continue
            self._work(fetch)
