"""Checks out of calls: a model chooses arguments of a function, and the program says what each call gives.

So nobody has to work out what is expected, which small models cannot: as in the regression tests that are generated
for programs (Randoop: Pacheco, Lahiri, Ernst, Ball, "Feedback-directed random test generation", 2007). They say what
the program does, and whether that is right nobody has looked.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.kinds import Kind, kinds_of
from megatron_davinci.platform.sandbox import Limits
from megatron_davinci.platform.syntax import parsed
from megatron_davinci.platform.trial import values_of

VERSION = 1  # raised whenever the same calls would give other checks


class Function(NamedTuple):
    """A function that can be called with literals.

    Attributes:
        name: Its name.
        source: Its text.
        least: Arguments that it must have.
        kinds: What each that it can have by place is likely to be.
    """

    name: str
    source: str
    least: int
    kinds: list[Kind]

    def form(self, count: int, longest: int) -> str:
        """What calls of it look like, as a regular expression.

        Args:
            count: Of calls, at most.
            longest: Most characters of a text among the arguments.
        """
        literals = [forms.literal(kind.of, kind.items, longest) for kind in self.kinds]
        return forms.calls(self.name, self.least, literals, count)


def functions(program: str, longest: int) -> list[Function]:
    """Functions of a program that are called by place, in their order; the first of a name that comes twice is not.

    Args:
        program: Python.
        longest: Most characters of a function's text.

    Raises:
        SyntaxError: It is no Python.
    """
    found = {}
    for node in parsed(program).body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        given = [*node.args.posonlyargs, *node.args.args]
        needs_names = any(default is None for default in node.args.kw_defaults)
        source = ast.get_source_segment(program, node) or ""
        if not needs_names and len(source) <= longest:
            kinds = kinds_of(node)
            if node.args.vararg:
                kinds += [Kind()] * (2 - len(kinds))
            found[node.name] = Function(node.name, source, len(given) - len(node.args.defaults), kinds)
    return list(found.values())


def calls_of(answer: str, name: str, most: int = 8) -> list[str]:
    """At most so many calls of a function with literals, one a line; none where a line is anything else."""
    found = []
    lines = [line.strip() for line in answer.strip().splitlines()]
    for line in (line for line in lines if line and not line.startswith(("#", "```"))):
        try:
            call = parsed(line, "eval").body
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name):
                return []
            if any(keyword.arg is None for keyword in call.keywords):
                return []
            for given in [*call.args, *(keyword.value for keyword in call.keywords)]:
                ast.literal_eval(given)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return []
        found.append(ast.unparse(call))
    return list(dict.fromkeys(found))[:most]


def told(program: str, calls: Sequence[str], limits: Limits) -> str:
    """What calls give in two runs, as JSON: [call, kind, text] of each; `null` where a run came to no end."""
    runs = [values_of(program, calls, limits) for _ in range(2)]
    if runs[0] is None or runs[1] is None:
        return "null"
    return json.dumps(
        [
            [call, *(first if first == second or first[0] == second[0] == "no_literal" else ("differs", ""))]
            for call, first, second in zip(calls, runs[0], runs[1], strict=True)
        ]
    )


def question(program: str, calls: Sequence[str], limits: Limits) -> dict[str, object]:
    """What decides what calls give."""
    return {"calls": list(calls), "ran": program, "limits": asdict(limits), "version": VERSION}


def checks_of(said: Sequence[Sequence[str]]) -> dict[str, str]:
    """By call, the assertion that it gives what it gave."""
    found = {}
    for call, kind, text in said:
        if kind == "value":
            sign = "is" if text in ("None", "True", "False") else "=="
            found[call] = f"assert {call} {sign} {text}\n"
    return found
