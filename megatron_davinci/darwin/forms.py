"""What answers that can be read look like, as regular expressions, for servers that hold a model to one.

A model that is held to a form cannot miss its tags or name a line that is not there. What it says within the form is
judged by the same gates as anybody's. The expressions use what all servers' libraries know: no look-around, no
back-references.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ANY = r"(.|\n)*"
YES_OR_NO = "YES|NO"
PAIRS = r"NO QA|(BEGIN QA\nQUESTION: [^\n]+\nANSWER: [^\n]+(\n[^\n]+)*\nEVIDENCE: [^\n]+\nEND QA\n?)+"
_MOST_CALLS = 3
_TEXT = r'"([^"\\\n]|\\["\\nt]){0,200}"'


def within(mark: str, form: str) -> str:
    """Something between two tags."""
    return rf"<{mark}>\n?({form})\n?</{mark}>"


def turn(longest: int) -> str:
    """One turn of a dialogue, which ends as a sentence does, so that it is not cut off in the middle of one."""
    return rf"<turn>[A-Za-z0-9\"'`$(\\][^<]{{1,{max(1, longest - 2)}}}[.?!]</turn>"


def number(most: int) -> str:
    """An integer from 1 to `most`."""
    digits = str(most)
    ways = [rf"[1-9]\d{{{length}}}" for length in range(len(digits) - 1)]  # with fewer digits
    for at, digit in enumerate(digits):  # as many, and smaller from one digit on
        least = 1 if at == 0 else 0
        if int(digit) > least:
            ways.append(rf"{digits[:at]}[{least}-{int(digit) - 1}]\d{{{len(digits) - at - 1}}}")
    return f"({'|'.join([*ways, digits])})"


def edits(lines: int) -> str:
    """A program of edits of a text of so many lines."""
    line = number(lines)
    call = rf"(remove_lines\({line}, {line}\)|replace\({_TEXT}, {_TEXT}\))"
    return rf"keep_all\(\)|{call}(\n{call}){{0,19}}"


def quotes(sentences: Sequence[int], may_decline: bool = True) -> str:
    """A choice of sentences, of as many passages as `sentences` has numbers; or none, where that may be chosen."""
    calls = [rf"quote\({place}, {number(count)}\)" for place, count in enumerate(sentences, start=1) if count]
    if not calls:
        return r"nothing\(\)"
    call = f"({'|'.join(calls)})"
    chosen = rf"{call}(\n{call}){{0,{_MOST_CALLS - 1}}}"
    return rf"nothing\(\)|{chosen}" if may_decline else chosen


_NUMBER = r"-?(0|[1-9]\d{0,5})(\.\d{1,4})?"
_SCALAR = rf"({_NUMBER}|True|False|None|{_TEXT})"
_ITEMS = rf"({_SCALAR}(, {_SCALAR}){{0,7}})?"
_PAIRS = rf"({_SCALAR}: {_SCALAR}(, {_SCALAR}: {_SCALAR}){{0,7}})?"
LITERAL = rf"({_SCALAR}|\[{_ITEMS}\]|\({_SCALAR}, {_ITEMS}\)|\{{{_PAIRS}\}})"


def calls(name: str, least: int, most: int, count: int) -> str:
    """Calls of a function with literals, one a line.

    Args:
        name: Of the function.
        least: Arguments that it must have.
        most: That it can have.
        count: Of calls, at most.
    """
    if most == 0:
        given = ""
    else:
        first = max(least, 1)
        given = rf"{LITERAL}(, {LITERAL}){{{first - 1},{most - 1}}}"
        given = given if least else f"({given})?"
    call = rf"{re.escape(name)}\({given}\)"
    return rf"{call}(\n{call}){{0,{count - 1}}}"
