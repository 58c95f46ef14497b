"""A program that nobody has read, with the tests that say whether it is right, run in the sandbox; or its values."""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_davinci.platform.sandbox import Limits, run_python
from megatron_davinci.platform.syntax import parsed

PASSED, WRONG, ERROR, EARLY = "passed", "wrong", "error", "early"
VERSION = 2  # raised whenever the same program and tests would come to something else


@dataclass(frozen=True)
class Trial:
    """What came of a program and its tests.

    Attributes:
        outcome: `passed`; `wrong` (a test said no); `error` (any other exception, a syntax error too); `early` (it
            ended, as if all was well, before its tests had); or which limit it reached: `timeout`, `memory`,
            `processes`, `output`, `disk`, `forbidden`, `killed`.
        detail: The last line that it said on standard error.
    """

    outcome: str
    detail: str = ""


def run_with_tests(program: str, tests: str, limits: Limits) -> Trial:
    """Run a program and then its tests, in one process, as the benchmarks of code have it.

    To pass, all of it must have run to its end: exit code 0 is not enough, which a program that leaves early has too.
    What says so is a word that is another each time. A program that looks for it in its own source could say it.

    Args:
        program: What a model wrote, and what stands before it.
        tests: What raises where the program is wrong.
        limits: What both may use.

    Raises:
        NoSandbox: This machine has none.
    """
    word = secrets.token_hex(16)
    text = f"{program}\n\n{tests}\n\n__import__('sys').__stdout__.write('\\n{word}\\n')\n"
    ran = run_python(text, limits=limits)
    last = ran.stderr.strip().rsplit("\n", 1)[-1][:300]
    if ran.status == "ok":
        ended = ran.stdout.rstrip("\n").rsplit("\n", 1)[-1] == word
        return Trial(PASSED if ended else EARLY)
    if ran.status == "failed":
        return Trial(WRONG if re.match(r"AssertionError\b", last) else ERROR, last)
    return Trial(ran.status, last)


_TELLING = """
def _told(call):
    import contextlib, io
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return ["value", repr(call())]
    except Exception as error:
        return ["raised", type(error).__name__]
"""


def values_of(program: str, calls: Sequence[str], limits: Limits) -> list[tuple[str, str]] | None:
    """What calls of a program give, one after another in one process.

    Args:
        program: Python.
        calls: Expressions, each to be evaluated where the program ends.
        limits: What all may use together.

    Returns:
        For each call `value` and a literal that is equal to what it gave; or why there is none, with a word about it:
        `raised` and the exception, `no_literal` and what was given. None where the program came to no end.

    Raises:
        NoSandbox: This machine has none.
    """
    word = secrets.token_hex(16)
    asked = "".join(f"_said.append(_told(lambda: {call}))\n" for call in calls)
    said = f"__import__('sys').__stdout__.write('\\n{word}' + __import__('json').dumps(_said) + '\\n')\n"
    text = f"{program}\n{_TELLING}\n_said = []\n{asked}{said}"
    ran = run_python(text, limits=limits)
    begin = ran.stdout.rfind(word)
    if ran.status != "ok" or begin < 0:
        return None
    try:
        told = json.loads(ran.stdout[begin + len(word) :])
    except ValueError:
        return None
    if not isinstance(told, list) or len(told) != len(calls):
        return None
    found = []
    for each in told:
        if not (isinstance(each, list) and len(each) == 2 and all(isinstance(part, str) for part in each)):
            return None
        kind, said = each
        found.append((kind, said) if kind != "value" or _is_literal(said) else ("no_literal", said[:200]))
    return found


def _is_literal(text: str) -> bool:
    """Whether a text is a literal of Python that says all of its value: no `nan`, no `<object>`."""
    try:
        value = ast.literal_eval(parsed(text.lstrip(" \t"), "eval"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return bool(value == value) and len(text) <= 2000
