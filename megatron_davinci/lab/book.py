"""The lab book: dated entries in plain Markdown, in the user's own repository."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_davinci.files import write_atomically

HEAD = "# Lab book\n"


def add_entry(book: Path, text: str, verdict: str = "") -> str:
    """Add an entry at the end of the book; it is made if it is not there.

    Args:
        book: The file.
        text: What was thought or seen.
        verdict: A design's, in Markdown; empty for none.

    Returns:
        The entry.
    """
    before = book.read_text(encoding="utf-8") if book.exists() else HEAD
    stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    # The verdict's own headings go below the entry's.
    parts = [f"## {stamp} UTC", "", text.strip(), ""]
    if verdict:
        parts += [
            line.replace("# ", "### ", 1) if line.startswith("# ") else line for line in verdict.splitlines()
        ]
        parts.append("")
    entry = "\n".join(parts)
    write_atomically(book, f"{before.rstrip()}\n\n{entry}")
    return entry
