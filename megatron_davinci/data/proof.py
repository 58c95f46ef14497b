"""Whether an encoder gives the reference's ids, found out while a job has begun to use it.

The comparison takes a second or two, in which workers of a new job can do something. What they make until then is
worth nothing if an id differs, so a file in the job's folder says that it is not proven: who finds it there when the
job is begun again (`unproven`) starts from nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from megatron_davinci.files import write_atomically

_MARK = "unproven"


class NotTheReference(Exception):
    """An encoder differs from the reference; the message says where."""


class Proof:
    """A comparison under way on a thread.

    Args:
        folder: The job's, in which nothing has been made yet.
        compare: Says where the encoder differs; None where it does not.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """

    def __init__(self, folder: Path, compare: Callable[[], str | None]) -> None:
        self._mark, self._compare = folder / _MARK, compare
        self._difference: str | None = None
        self._error: BaseException | None = None
        write_atomically(self._mark, b"")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._difference = self._compare()
        except BaseException as error:
            self._error = error

    def look(self, *, wait: bool = False) -> None:
        """Take notice of the outcome, if there is one; or wait for it.

        Raises:
            NotTheReference: The encoder differs.
        """
        if wait:
            self._thread.join()
        elif self._thread.is_alive():
            return
        if self._error is not None:
            raise self._error
        if self._difference is not None:
            raise NotTheReference(self._difference)
        self._mark.unlink(missing_ok=True)


def unproven(folder: Path) -> bool:
    """Whether what a job has made is by an encoder of which nobody knows whether it may be trusted."""
    return (folder / _MARK).exists()
