"""Runs the commands that the documentation shows with their messages, and writes down what they say now.

    .venv/bin/python tools/refresh_messages.py

A `console` block is one command, after `$ `, and what it prints on standard error. The commands are those that are
refused, so nothing is started and nothing is written. tests/docs fails when a page shows another message.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from megatron_davinci.cli.main import main as davinci

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```console\n\$ davinci (.*)\n(?:(?!```).*\n)*```$", re.MULTILINE)


def main() -> None:
    """Write the pages."""
    for path in pages_with_messages():
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


def pages_with_messages() -> list[Path]:
    """The pages of the documentation that show a message."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if _BLOCK.search(path.read_text("utf-8"))]


def refreshed(page: str) -> str:
    """A page with each message as it is now."""
    return _BLOCK.sub(lambda m: f"```console\n$ davinci {m[1]}\n{message(m[1])}\n```", page)


def message(arguments: str) -> str:
    """What a command line says on standard error, run from the repository's root.

    Raises:
        RuntimeError: The command was not refused.
    """
    said = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = davinci(shlex.split(arguments))
    if code != 2:
        raise RuntimeError(f"davinci {arguments} was not refused: it ended with {code} in {os.fspath(ROOT)}")
    return said.getvalue().rstrip()


if __name__ == "__main__":
    main()
