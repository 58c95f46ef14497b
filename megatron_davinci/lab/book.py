"""The lab book: dated entries in plain Markdown, in the user's own repository."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_davinci.files import disk_errors, in_utf8

HEAD = "# Lab book\n"


def add_entry(book: Path, text: str, verdict: str = "") -> str:
    """Add an entry at the end of the book; it is made if it is not there.

    The book is the user's: what is in it stays byte for byte, and a link to it stays a link.

    Args:
        book: The file.
        text: What was thought or seen.
        verdict: A design's, in Markdown; empty for none.

    Returns:
        The entry.

    Raises:
        EnvironmentProblem: The disk refused; the book is as it was.
    """
    stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    # The verdict's own headings go below the entry's.
    parts = [f"## {stamp} UTC", "", in_utf8(text.strip()), ""]
    if verdict:
        parts += [
            line.replace("# ", "### ", 1) if line.startswith("# ") else line for line in verdict.splitlines()
        ]
        parts.append("")
    entry = "\n".join(parts)
    with disk_errors(book, "writing the lab book"):
        book.parent.mkdir(parents=True, exist_ok=True)
        # At the end and in one write, so that of two entries at a time none is lost.
        with open(book, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4))
            last = file.read(4)
            end = b"\r\n" if last.endswith(b"\r\n") else b"\n"
            said = entry.encode().replace(b"\n", end)
            if size == 0:
                said = HEAD.encode() + end + said
            elif not last.endswith(2 * end):
                said = (end if last.endswith(end) else 2 * end) + said
            try:
                if file.write(said) != len(said):
                    raise OSError("a part of the entry was written")
                os.fsync(file.fileno())
            except OSError:
                os.truncate(book, size)
                raise
    return entry
