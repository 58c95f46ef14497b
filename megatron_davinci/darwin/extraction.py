"""Steps that make text of another format: in a process of its own, which is killed when it does not come back."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import psutil
from datatrove.data import Document
from datatrove.pipeline.extractors.base import ExtractorSandbox
from pydantic import Field

from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters

_START_SECONDS = 120.0
_CLOCK = 10  # times the limit of processor time: a process that waits instead of computing
_LOOK_SECONDS = 0.25

Extractor = Callable[..., tuple[str, str]]


class Sandbox(ExtractorSandbox):
    """datatrove's, with a limit of processor time: on a busy machine a document is not at fault for waiting."""

    def __init__(self, seconds: float, warmup: tuple[Any, ...]) -> None:
        super().__init__(_START_SECONDS, warmup_text=warmup)
        self.seconds = seconds

    def process_document(self, arguments: tuple[Any, ...], extractor: Extractor) -> tuple[str, str]:
        """What the extractor returns.

        Raises:
            TimeoutError: It has used more processor time than it may, or ten times that by the clock.
            EOFError: Its process has ended.
        """
        self._ensure_process(extractor)
        try:
            return self._answer(arguments)
        except (TimeoutError, EOFError, OSError) as error:
            self._cleanup_process()
            if isinstance(error, TimeoutError | EOFError):
                raise
            raise EOFError(str(error)) from error

    def _answer(self, arguments: tuple[Any, ...]) -> tuple[str, str]:
        process = psutil.Process(self.process.pid)
        began, used = time.monotonic(), _used(process)
        self.parent_conn.send(arguments)
        wait = self.seconds
        while not self.parent_conn.poll(wait):
            wait = min(_LOOK_SECONDS, self.seconds)
            if not self.process.is_alive():
                raise EOFError
            if _used(process) - used > self.seconds or time.monotonic() - began > _CLOCK * self.seconds:
                raise TimeoutError
        answer: tuple[str, str] = self.parent_conn.recv()
        return answer


def _used(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


@cache
def die_with_parent() -> None:
    """Ask Linux to end this process with the one that asks it for text, which may be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class ExtractParameters(StepParameters):
    """What every extraction takes.

    Attributes:
        seconds: Of processor time that one document may take before it is quarantined; ten times that by the clock.
    """

    seconds: float = Field(default=10.0, gt=0)


class Extract(Step):
    """A step that makes text of documents of one format, and passes others by.

    Attributes:
        format: Of the documents' origin.
        extractor: A function of a text and what `options` gives, which runs in another process: the new text and an
            empty string, or an empty text and what went wrong.
        empty: The reason to quarantine a document without text.
    """

    level = 1
    edits = True
    format: ClassVar[str]
    extractor: ClassVar[Any]
    empty: ClassVar[str]
    Parameters: ClassVar[type[StepParameters]] = ExtractParameters
    parameters: ExtractParameters

    def options(self) -> tuple[Any, ...]:
        """What the extractor gets beside the text."""
        return ()

    def load(self) -> None:
        """Import what the extractor needs, before its process is forked, which then need not."""

    def open(self) -> None:
        """Make the sandbox; its process starts with the first document."""
        self.load()
        self._sandbox = Sandbox(self.parameters.seconds, ("", *self.options()))

    def close(self) -> None:
        """End the process."""
        self._sandbox.__exit__(None, None, None)

    def apply(self, document: Document) -> Outcome:
        """Extract, if the document is of the format."""
        if document.metadata["darwin"]["origin"].get("format") != self.format:
            return KEEP
        try:
            text, said = self._sandbox.process_document(
                (document.text, *self.options()), type(self).extractor
            )
        except TimeoutError:
            said = f"no answer in {self.parameters.seconds:g} seconds of processor time"
            return Outcome(quarantine="extractor_timeout", notes={"said": said})
        except EOFError:
            return Outcome(quarantine="extractor_died", notes={"said": "its process ended"})
        if said:
            return Outcome(quarantine="extractor_failed", notes={"said": said})
        if not text.strip():
            return Outcome(quarantine=self.empty, notes={"said": "the extractor found no text"})
        return Outcome(text=text)


def guarded(extract: Callable[..., str], *arguments: Any) -> tuple[str, str]:
    """What an extraction returns, or what it raised, as an extractor's answer."""
    die_with_parent()
    try:
        return extract(*arguments), ""
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
