"""Refinement as a program: a model says which lines go and which strings are replaced, and it is carried out here.

After ProX (arXiv 2409.17115), whose small models write such programs for a fraction of what writing the text anew
costs. A program is calls of three functions with constants, one a line; it is read as syntax and never run as Python.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

from megatron_davinci.platform.syntax import parsed

_MOST_LINES = 400
_COMMENT = "#"


class Edit(NamedTuple):
    """One call.

    Attributes:
        name: `keep_all`, `remove_lines` or `replace`.
        given: Its constants.
    """

    name: str
    given: tuple[object, ...]


def numbered(text: str) -> str:
    """A text with the number of each line before it, from 1 on."""
    return "\n".join(f"[{number}] {line}" for number, line in enumerate(text.split("\n"), start=1))


def carried_out(text: str, program: str) -> str | None:
    """The text after a program; None where it is none, or does not fit the text.

    Args:
        text: The text.
        program: Calls of `keep_all()`, `remove_lines(first, last)` and `replace("old", "new")`, one a line. Lines are
            numbered as the text has them before any call.
    """
    edits = calls_of(program)
    if not edits:
        return None
    lines: list[str | None] = list(text.split("\n"))
    replaced = []
    for edit in edits:
        match edit:
            case Edit("keep_all", ()):
                if len(edits) > 1:
                    return None
            case Edit("remove_lines", (int() as first, int() as last)):
                if not 1 <= first <= last <= len(lines):
                    return None
                lines[first - 1 : last] = [None] * (last - first + 1)
            case Edit("replace", (str() as old, str() as new)) if old:
                replaced.append((old, new))
            case _:
                return None
    made = "\n".join(line for line in lines if line is not None)
    for old, new in replaced:
        if old not in made:
            return None
        made = made.replace(old, new)
        if len(made) > 2 * len(text) + 100:
            return None
    return made.strip()


def calls_of(program: str) -> list[Edit]:
    """The calls of a program; none where it is no program."""
    edits = []
    lines = [line.strip() for line in program.strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith((_COMMENT, "```"))]
    if len(lines) > _MOST_LINES:
        return []
    for line in lines:
        try:
            call = parsed(line, "eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.keywords:
            return []
        if not all(
            isinstance(given, ast.Constant) and type(given.value) in (int, str) for given in call.args
        ):
            return []
        edits.append(
            Edit(call.func.id, tuple(given.value for given in call.args if isinstance(given, ast.Constant)))
        )
    return edits
