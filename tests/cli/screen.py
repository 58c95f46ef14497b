"""Running `davinci` and looking at its screen as a person would."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from tests.ranks import run_ranks

LINES = 24  # of a terminal


@dataclass(frozen=True)
class Screen:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The error, after checking that it is one: code 2, on one screen, for a person and not a programmer."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert 0 < len(self.err.splitlines()) < LINES
        assert self.err.startswith(("error: ", "usage: "))
        return self.err


def davinci(*arguments: object) -> Screen:
    """Run a command in this process."""
    from megatron_davinci.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse, about its own words
            code = leaving.code
    return Screen(code, out.getvalue(), err.getvalue())


def davinci_on_a_rank(*arguments: object) -> Screen:
    """Run a command as the one rank of a world, where the process groups are its own."""
    return run_ranks(1, davinci, *arguments)[0]
