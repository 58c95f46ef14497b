"""Level 7, the environment: code with checks that were run, that hold, and that fail when the code is made wrong.

Neither report says how level 7 is made; its seed there is code that was executed before it was kept
(MegaMath-Synth-Code). Here a model writes checks for a program, and they are believed only as far as they were seen
to work: the program runs, all checks hold, and of small faults planted in the program enough make them fail. Or the
model only says how functions are to be called, and the program what that gives (`calls`): a small model can do that.
"""

from __future__ import annotations

import ast
import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import calls, forms
from megatron_davinci.darwin.asking import AskingParameters, Expected, between
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.mutants import mutants
from megatron_davinci.darwin.prompts import mark_for
from megatron_davinci.darwin.step import Outcome
from megatron_davinci.darwin.trials import LIMITS, Trying
from megatron_davinci.darwin.verify import program_of
from megatron_davinci.platform.syntax import parsed, tree_of, unwieldy

_ANSWER_SHARE = 0.6  # tokens of checks for one of the program, where none is known; a supposition
_BETWEEN = "\n\n\n# Checks\n"


class WriteChecks(Trying):
    """Gives programs checks that were seen to work; what gets none stays as it was."""

    name = "write_checks"
    level = 7
    version = 2
    about = "a model writes checks for a program; kept if they run, hold, and fail on the program made wrong"
    tasks = frozenset({"checks", "calls"})

    class Parameters(AskingParameters):
        """Parameters of `write_checks`.

        Attributes:
            prompt: `checks_python`, or `calls_python`, or a prompt file (`.yaml`).
            tries: Most answers that are tried for a program; each further one has another seed. Checks out of calls
                add up over tries.
            longest: Most characters of a program that is asked about.
            functions: Most functions of a program that calls are asked for, the first ones.
            longest_function: Most characters of such a function.
            calls: Most calls of a function out of one answer.
            longest_text: Most characters of a text in a call, for servers that hold answers to a form: a small model
                finds no end.
            faults: Most faults that are planted, one at a time.
            min_noticed: Least share of them that the checks must notice; at least one they always must.
        """

        prompt: str = "checks_python"
        longest: int = Field(default=16_000, gt=0)
        functions: int = Field(default=8, gt=0)
        longest_function: int = Field(default=4_000, gt=0)
        calls: int = Field(default=8, gt=0)
        longest_text: int = Field(default=200, gt=0)
        faults: int = Field(default=8, gt=0)
        min_noticed: float = Field(default=0.25, ge=0, le=1)

    parameters: Parameters

    def expected(self, document: Document) -> Iterator[Expected]:
        """One question about each program that can be one, or about each of its functions."""
        program = document.text
        if unfit(program, self.parameters.longest):
            return
        if self.prompt.task == "checks":
            messages = self.prompt.messages(passage=program, mark=mark_for(program))
            yield Expected("checks", messages, program, _ANSWER_SHARE, form=forms.PROGRAM)
            return
        for function in self._functions(program):
            messages, form = self._about(function), self._form(function)
            yield Expected("calls", messages, function.source, _ANSWER_SHARE, form=form)

    def _functions(self, program: str) -> list[calls.Function]:
        return calls.functions(program, self.parameters.longest_function)[: self.parameters.functions]

    def _about(self, function: calls.Function) -> list[dict[str, str]]:
        mark = mark_for(function.source)
        return self.prompt.messages(passage=function.source, mark=mark, function=function.name)

    def _form(self, function: calls.Function) -> str:
        """What an answer with calls of it looks like, as a regular expression."""
        form = function.form(self.parameters.calls, self.parameters.longest_text)
        return forms.within(mark_for(function.source), form)

    async def process(self, document: Document) -> Outcome:
        """Run the program, ask for checks, and try them."""
        program = document.text
        why = unfit(program, self.parameters.longest)
        if not why and self.prompt.task == "calls" and not self._functions(program):
            why = "no_function_to_call"
        planted = [] if why else mutants(program, self.parameters.faults)
        if not why and not planted:
            why = "nothing_to_get_wrong"
        if not why and (came_of := await self.outcome(program, "")) != "passed":
            why = f"program_{came_of}"
        if why:
            return self._as_it_was(document, {why: 1}, {})
        spent, unused = Counter[str](), Counter[str]()
        held: dict[str, str] = {}  # assertions by call: those of all tries, which add up
        noticed = ["passed"] * len(planted)
        for attempt in range(self.parameters.tries):
            if self.prompt.task == "calls":
                before = held
                held, why = await self._called(program, attempt, spent, unused, held)
                checks = None if why else "".join(held.values())
                grown = before.keys() < held.keys()
            else:
                checks, why = await self._asked(program, attempt, spent)
                grown = False
            if checks is None:
                unused[why] += 1
                continue
            # What fewer checks noticed more of them notice too.
            noticed = await asyncio.gather(
                *(
                    self.outcome(fault, checks) if outcome == "passed" or not grown else _same(outcome)
                    for fault, outcome in zip(planted, noticed, strict=True)
                )
            )
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
            answer = await self.answer(messages, attempt, spent, forms.PROGRAM)
        except Trouble as trouble:
            return None, trouble.kind
        if answer.finish == "length":
            return None, "cut_off"
        checks = program_of(f"{answer.text}\n")
        why = "no_program" if checks is None else await self._wrong(checks, program)
        return (None, why) if why else (checks, "")

    async def _called(
        self, program: str, attempt: int, spent: Counter[str], unused: Counter[str], held: dict[str, str]
    ) -> tuple[dict[str, str], str]:
        """Checks out of calls that a model chose, with those `held` of earlier tries; or these, and why there are no
        others. Calls that give nothing to hold on to are counted and left out.
        """
        answers = await asyncio.gather(
            *(self._calls(function, attempt, spent) for function in self._functions(program))
        )
        chosen = [call for found, _ in answers for call in found]
        unused.update(why for _, why in answers if why)
        if not chosen:
            return held, "no_calls"
        said = await self.ran(
            calls.question(program, chosen, LIMITS), lambda: calls.told(program, chosen, LIMITS)
        )
        told = None if said == "not_run" else json.loads(said)
        if told is None:
            return held, "calls_without_end"
        unused.update(f"call_{kind}" for _, kind, _ in told if kind != "value")
        found = calls.checks_of(told)
        if not found.keys() - held.keys():
            return held, "nothing_new" if found else "no_values"
        why = ""
        # Calls may change what others give: then those of this try stand alone.
        for checks in [held | found, found] if held else [found]:
            why = await self._wrong("".join(checks.values()), program)
            if not why:
                return checks, ""
        return held, why

    async def _calls(
        self, function: calls.Function, attempt: int, spent: Counter[str]
    ) -> tuple[list[str], str]:
        """Calls of a function, or none and why."""
        try:
            answer = await self.answer(self._about(function), attempt, spent, self._form(function))
        except Trouble as trouble:
            return [], trouble.kind
        text, why = between(answer, mark_for(function.source))
        found = calls.calls_of(text, function.name, self.parameters.calls) if text is not None else []
        return found, why or ("" if found else "no_call")

    async def _wrong(self, checks: str, program: str) -> str:
        """Why checks do not hold on the program; empty where they do."""
        if wrong := fault_of(checks, program):
            return wrong
        outcome = await self.outcome(program, checks)
        return "" if outcome == "passed" else f"checks_{outcome}"

    def _as_it_was(self, document: Document, why: dict[str, int], spent: dict[str, int]) -> Outcome:
        counts = {**_prefixed("checks", why), **spent, "documents/kept as they were": 1}
        notes: dict[str, Any] = {"prompt": self.prompt.mark, "checks": dict(sorted(why.items())), **spent}
        return Outcome(notes=notes, counts=counts, level=document.metadata["darwin"]["level"])


async def _same(outcome: str) -> str:
    return outcome


def _prefixed(prefix: str, counts: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}/{name}": count for name, count in counts.items()}


def unfit(program: str, longest: int) -> str:
    """Why a text is no program to be asked about; empty for one that is."""
    if len(program) > longest:
        return "too_long"
    tree = tree_of(program)
    if tree is None:
        return "no_python"
    return unwieldy(tree) or ("" if defined(tree) else "defines_nothing")


def defined(tree: ast.Module) -> set[str]:
    """Names of the functions and classes that a program defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def asserts(checks: str) -> int:
    """How many things are asserted."""
    return sum(isinstance(node, ast.Assert) for node in ast.walk(parsed(checks)))


def fault_of(checks: str, program: str) -> str:
    """What is wrong with checks, as far as their syntax tells; empty for good ones."""
    tree = tree_of(checks)
    if tree is None:
        return "no_python"
    names = defined(parsed(program))
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
