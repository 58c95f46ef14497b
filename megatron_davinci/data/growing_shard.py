"""A shard that is written while its documents are still being encoded, on a thread of the job's own process.

Reading, hashing and writing let go of the interpreter lock. So when the last document is known there is little left
to do, where a shard that is begun then would have to be read and written as a whole, by one process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from megatron_davinci.data.assemble import Assembler


class _Stopped(Exception):
    """The job has ended before the shard."""


class GrowingShard:
    """One shard under way.

    Args:
        number: The shard's.
        first: Its first document: the number of the part, and its own there.
        assembler: Writes it; nobody else's.
        post: Takes the answer when the shard is done, or the error because of which it is not.

    Attributes:
        number: The shard's.
    """

    def __init__(
        self,
        number: int,
        first: tuple[int, int],
        assembler: Assembler,
        post: Callable[[dict[str, Any] | BaseException], None],
    ) -> None:
        self.number, self._first, self._assembler, self._post = number, first, assembler, post
        self._ends: queue.Queue[tuple[tuple[int, int], bool] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def grow(self, end: tuple[int, int], *, whole: bool = False) -> None:
        """Documents up to this one are known, it not among them; and with `whole` they are all."""
        self._ends.put((end, whole))

    def stop(self) -> None:
        """Do away with the shard unless it is done, and wait for it."""
        self._ends.put(None)
        self._thread.join()

    def _known(self) -> Iterator[tuple[int, int]]:
        whole = False
        while not whole:
            told = self._ends.get()
            if told is None:
                raise _Stopped
            end, whole = told
            yield end

    def _run(self) -> None:
        try:
            shard = self._assembler.in_order(self.number, self._first, self._known())
            self._post({"do": "shard", "number": self.number, "record": shard.model_dump()})
        except _Stopped:
            pass
        except BaseException as error:
            self._post(error)
