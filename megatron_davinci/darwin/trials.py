"""Programs run in the sandbox for steps that ask models: each once, with what came of it kept where answers are.

Whether a program is right is asked as a model is: under the hash of all that decides it. So a run that was killed
runs nothing twice, a document's life is told again without running anything, and a machine that is slower another
time changes no verdict.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megatron_davinci.darwin.answers import Answer, question_key
from megatron_davinci.darwin.asking import Asking
from megatron_davinci.platform.cores import usable_cores
from megatron_davinci.platform.sandbox import MIB, Limits, strongest_way
from megatron_davinci.platform.trial import VERSION, run_with_tests

LIMITS = Limits(cpu_seconds=10, wall_seconds=120, memory_bytes=1024 * MIB)


class Trying(Asking):
    """A step that also runs what its model wrote. Sub-classes write `process`."""

    _room: asyncio.Semaphore | None = None

    def check(self) -> None:
        """Also whether anything here keeps such programs in.

        Raises:
            NoSandbox: Nothing does.
        """
        super().check()
        if self.runs_programs():
            strongest_way()

    def runs_programs(self) -> bool:
        """Whether the step, by its parameters, runs any."""
        return True

    def _begin(self, asks: bool) -> None:
        self._room = asyncio.Semaphore(max(1, usable_cores() // max(1, self.processes)))
        super()._begin(asks)

    async def outcome(self, program: str, tests: str) -> str:
        """What comes of a program and its tests: by `platform.trial`; `not_run` where none is on record."""
        asked = {"ran": program, "tests": tests, "limits": asdict(LIMITS), "version": VERSION}
        return await self.ran(asked, lambda: run_with_tests(program, tests, LIMITS).outcome)

    async def ran(self, asked: dict[str, Any], run: Callable[[], str]) -> str:
        """What came of something that is run once, and kept; `not_run` where it was not, and may not be now.

        Args:
            asked: All that decides it.
            run: Runs it.
        """
        assert self._answers is not None and self._room is not None
        key = question_key(asked)
        found = self._answers.get(key)
        if found is None:
            if self._client is None:
                return "not_run"
            async with self._room:
                said = await asyncio.to_thread(run)
            found = self._answers.put(key, Answer(said, "ran", 0, 0))
        return found.text
