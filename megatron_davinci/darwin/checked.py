"""Level 7, the environment: code with checks that were run, that hold, and that fail when the code is made wrong.

Neither report says how level 7 is made; its seed there is code that was executed before it was kept
(MegaMath-Synth-Code). Here a model writes checks for a program, and they are believed only as far as they were seen
to work: the program runs, all checks hold, and of small faults planted in the program enough make them fail.
"""

from __future__ import annotations

import ast
import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.asking import AskingParameters, Expected
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.mutants import mutants
from megatron_davinci.darwin.prompts import mark_for
from megatron_davinci.darwin.step import Outcome
from megatron_davinci.darwin.trials import Trying
from megatron_davinci.darwin.verify import program_of

_ANSWER_SHARE = 0.6  # tokens of checks for one of the program, where none is known; a supposition
_BETWEEN = "\n\n\n# Checks\n"


class WriteChecks(Trying):
    """Gives programs checks that were seen to work; what gets none stays as it was."""

    name = "write_checks"
    level = 7
    about = "a model writes checks for a program; kept if they run, hold, and fail on the program made wrong"
    tasks = frozenset({"checks"})

    class Parameters(AskingParameters):
        """Parameters of `write_checks`.

        Attributes:
            endpoint: The model.
            prompt: `checks_python`, or a prompt file (`.yaml`).
            answers: File of the answers, on a local disk. Recipes may share one.
            tries: Most answers that are tried for a program; each further one has another seed.
            longest: Most characters of a program that is asked about.
            faults: Most faults that are planted, one at a time.
            min_noticed: Least share of them that the checks must notice; at least one they always must.
        """

        prompt: str = "checks_python"
        longest: int = Field(default=16_000, gt=0)
        faults: int = Field(default=8, gt=0)
        min_noticed: float = Field(default=0.25, ge=0, le=1)

    parameters: Parameters

    def expected(self, document: Document) -> Iterator[Expected]:
        """One question about each program that can be one."""
        program = document.text
        if not unfit(program, self.parameters.longest):
            messages = self.prompt.messages(passage=program, mark=mark_for(program))
            yield Expected("checks", messages, program, _ANSWER_SHARE)

    async def process(self, document: Document) -> Outcome:
        """Run the program, ask for checks, and try them."""
        program = document.text
        why = unfit(program, self.parameters.longest)
        if not why and (came_of := await self.outcome(program, "")) != "passed":
            why = f"program_{came_of}"
        planted = [] if why else mutants(program, self.parameters.faults)
        if not why and not planted:
            why = "nothing_to_get_wrong"
        if why:
            return self._as_it_was(document, {why: 1}, {})
        spent, unused = Counter[str](), Counter[str]()
        for attempt in range(self.parameters.tries):
            checks, why = await self._asked(program, attempt, spent)
            if checks is None:
                unused[why] += 1
                continue
            noticed = await asyncio.gather(*(self.outcome(fault, checks) for fault in planted))
            share = sum(outcome != "passed" for outcome in noticed) / len(noticed)
            if share == 0 or share < self.parameters.min_noticed:
                unused["notice_too_little" if share else "cannot_fail"] += 1
                continue
            faults = dict(sorted(Counter(noticed).items()))
            notes = {
                "prompt": self.prompt.mark, "checks": asserts(checks), "faults": len(planted), "by_outcome": faults,
                "noticed": round(share, 4), "try": attempt, **spent,
            }  # fmt: skip
            counts = {"checks/accepted": 1, "documents/checked": 1, **_prefixed("checks", unused), **spent}
            return Outcome(
                text=program.rstrip() + _BETWEEN + checks.strip() + "\n",
                notes=notes,
                counts=counts,
                scores={"faults_noticed": share},
            )
        return self._as_it_was(document, unused, spent)

    async def _asked(self, program: str, attempt: int, spent: Counter[str]) -> tuple[str | None, str]:
        """Checks that hold on the program, or None and what is wrong with them."""
        try:
            messages = self.prompt.messages(passage=program, mark=mark_for(program))
            answer = await self.answer(messages, attempt, spent)
        except Trouble as trouble:
            return None, trouble.kind
        if answer.finish == "length":
            return None, "cut_off"
        checks = program_of(answer.text)
        if checks is None:
            return None, "no_program"
        if wrong := fault_of(checks, program):
            return None, wrong
        outcome = await self.outcome(program, checks)
        return (checks, "") if outcome == "passed" else (None, f"checks_{outcome}")

    def _as_it_was(self, document: Document, why: dict[str, int], spent: dict[str, int]) -> Outcome:
        counts = {**_prefixed("checks", why), **spent, "documents/kept as they were": 1}
        notes: dict[str, Any] = {"prompt": self.prompt.mark, "checks": dict(sorted(why.items())), **spent}
        return Outcome(notes=notes, counts=counts, level=document.metadata["darwin"]["level"])


def _prefixed(prefix: str, counts: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}/{name}": count for name, count in counts.items()}


def unfit(program: str, longest: int) -> str:
    """Why a text is no program to be asked about; empty for one that is."""
    if len(program) > longest:
        return "too_long"
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "no_python"
    return "" if defined(tree) else "defines_nothing"


def defined(tree: ast.Module) -> set[str]:
    """Names of the functions and classes that a program defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def asserts(checks: str) -> int:
    """How many things are asserted."""
    return sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(checks)))


def fault_of(checks: str, program: str) -> str:
    """What is wrong with checks, as far as their syntax tells; empty for good ones."""
    try:
        tree = ast.parse(checks)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "no_python"
    names = defined(ast.parse(program))
    nodes = list(ast.walk(tree))
    if not any(isinstance(node, ast.Assert) for node in nodes):
        return "assert_nothing"
    if not any(
        isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names for node in nodes
    ):
        return "of_something_else"
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    stored |= {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            stored |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return "redefine_the_program" if stored & names else ""
