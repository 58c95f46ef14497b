"""What answers that can be read look like, as regular expressions, for servers that hold a model to one.

A model that is held to a form cannot miss its tags or name a line that is not there. What it says within the form is
judged by the same gates as anybody's. The expressions use what all servers' libraries know: no look-around, no
back-references.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

ANY = r"(.|\n)*"
PROGRAM = rf"```python\n{ANY}\n```"
YES_OR_NO = "YES|NO"
PAIRS = r"NO QA|(BEGIN QA\nQUESTION: [^\n]+\nANSWER: [^\n]+(\n[^\n]+)*\nEVIDENCE: [^\n]+\nEND QA\n?)+"
_MOST_CALLS = 3
_MOST_TERMS = 400  # that are all written out; beyond that a form only says that there are words
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
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


def says(plain: Sequence[int], worded: Sequence[int], terms: Mapping[int, Sequence[str]], most: int) -> str:
    """A choice of forms of a turn and of sentences that they speak of; empty where there is none.

    Args:
        plain: Numbers of forms that take a sentence.
        worded: Of those that take words of it too.
        terms: Words that may be taken of each sentence, by its number.
        most: Of calls, one a line.
    """
    calls = []
    if plain and terms:
        calls.append(rf"say\({one_of(plain)}, {one_of(terms)}\)")
    few = sum(map(len, terms.values())) <= _MOST_TERMS
    for number, words in terms.items():
        if worded and words:
            said = one_of(words) if few else r'[^"\\\n]{1,80}'
            calls.append(rf'say\({one_of(worded)}, {number}, "{said}"\)')
    call = f"({'|'.join(calls)})"
    more = rf"(\n{call}){{0,{most - 1}}}" if most > 1 else ""
    return call + more if calls else ""


def one_of(values: Iterable[object]) -> str:
    """One of some values, as they are written."""
    return "(" + "|".join(_SPECIAL.sub(r"\\\g<0>", str(value)) for value in values) + ")"


def literal(of: Collection[str], items: Collection[str], longest: int) -> str:
    """A plain value of Python.

    Args:
        of: Kinds that it may be, of `kinds.ALL`.
        items: Kinds of what it holds, where it is a list, a tuple or a dictionary.
        longest: Most characters of a text.
    """
    one = {
        "integer": _INTEGER, "decimal": _DECIMAL, "truth": "True|False", "none": "None",
        "text": rf'"([^"\\\n]|\\["\\nt]){{0,{longest}}}"', "bytes": rf'b"[ !#-\[\]-~]{{0,{longest}}}"',
    }  # fmt: skip
    held = "|".join(form for name, form in one.items() if name in items) or _INTEGER
    key = "|".join(form for name, form in one.items() if name in ("integer", "text"))
    some = rf"(({held})(, ({held})){{0,7}})?"
    pair = rf"({key}): ({held})"
    many = {
        "list": rf"\[{some}\]", "tuple": rf"\(({held}), {some}\)", "dict": rf"\{{({pair}(, {pair}){{0,7}})?\}}",
    }  # fmt: skip
    return f"({'|'.join(form for name, form in (one | many).items() if name in of)})"


_INTEGER = r"-?(0|[1-9]\d{0,5})"
_DECIMAL = rf"{_INTEGER}\.\d{{1,4}}"


def calls(name: str, least: int, literals: Sequence[str], count: int) -> str:
    """Calls of a function with literals, one a line.

    Args:
        name: Of the function.
        least: Arguments that it must have.
        literals: Of each argument that it can have, in their order.
        count: Of calls, at most.
    """
    must = ", ".join(literals[:least])
    may = ""
    for place in range(len(literals) - 1, least - 1, -1):
        may = rf"({', ' if place else ''}{literals[place]}{may})?"
    call = rf"{re.escape(name)}\({must}{may}\)"
    return rf"{call}(\n{call}){{0,{count - 1}}}"
