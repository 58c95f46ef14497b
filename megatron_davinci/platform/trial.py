"""A program that nobody has read, with the tests that say whether it is right, run in the sandbox."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from megatron_davinci.platform.sandbox import Limits, run_python

PASSED, WRONG, ERROR, EARLY = "passed", "wrong", "error", "early"
VERSION = 1  # raised whenever the same program and tests would come to something else


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
