"""Requests that wait for the model: no more than agreed, taken several at a time, dropped when who asked has left."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from megatron_davinci.evaluate.serving.requests import Asked, Refusal

_WAIT_SECONDS = 1.0


@dataclass
class Job:
    """A text that somebody waits for.

    Attributes:
        asked: What it is to be.
        gone: Whether who asked has left.
        done: Set when there is an outcome.
        tokens: What the model wrote; -1 ends it where a logit was not a number.
        problem: Why it wrote nothing.
        number: Of the text among those of its request.
        news: Is given the number with each token as it is chosen, and with None when there is an outcome; None where
            nobody reads in pieces.
    """

    asked: Asked
    gone: Callable[[], bool] = lambda: False
    done: threading.Event = field(default_factory=threading.Event)
    tokens: list[int] = field(default_factory=list)
    problem: Refusal | None = None
    number: int = 0
    news: SimpleQueue[tuple[int, int | None]] | None = None

    def settle(self, tokens: Sequence[int] = (), problem: Refusal | None = None) -> None:
        """Hand over the outcome."""
        self.tokens, self.problem = list(tokens), problem
        self.done.set()
        if self.news is not None:
            self.news.put((self.number, None))


class Queue:
    """Jobs between the threads that talk to clients and the one that has the model.

    Args:
        most: That wait at a time.
    """

    def __init__(self, most: int) -> None:
        self._most, self._jobs = most, deque[Job]()
        self._changed, self._closed = threading.Condition(), False

    def put(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait, all or none.

        Raises:
            Refusal: There is no room; or the server is about to end.
        """
        with self._changed:
            if self._closed:
                raise Refusal(
                    503, "The server is being stopped.", "server_error", code="shutting_down", wait=5
                )
            if len(jobs) > self._most:
                raise Refusal(
                    400,
                    f"{len(jobs)} prompts in one request; at most {self._most} may wait here",
                    param="prompt",
                )
            if len(self._jobs) + len(jobs) > self._most:
                raise Refusal(
                    503,
                    f"{len(self._jobs)} requests wait already, of at most {self._most}. Ask again later.",
                    "server_error",
                    code="overloaded",
                    wait=1,
                )
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def take(self, most: int) -> list[Job]:
        """Up to `most` jobs, in the order that they came; none after a while without any, or when closed.

        A job whose client has left is dropped unanswered.
        """
        with self._changed:
            if not self._jobs and not self._closed:
                self._changed.wait(_WAIT_SECONDS)
            taken: list[Job] = []
            while self._jobs and len(taken) < most:
                job = self._jobs.popleft()
                if job.gone():
                    job.settle(problem=Refusal(499, "The client has left.", "server_error"))
                else:
                    taken.append(job)
            return taken

    def close(self) -> None:
        """Take no more jobs, and refuse those that wait."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in waiting:
            job.settle(
                problem=Refusal(
                    503, "The server is being stopped.", "server_error", code="shutting_down", wait=5
                )
            )

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed
