"""The lab book is the user's file: entries are added to it, and nothing else of it changes."""

import os

import pytest

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.lab.book import HEAD, add_entry
from tests.cli.screen import davinci


def test_a_book_begins_with_its_head_and_entries_stand_apart(tmp_path):
    book = tmp_path / "notes" / "LAB.md"
    said = davinci("lab", "log", "Half is enough.", "--book", book)
    assert said.code == 0 and said.out.startswith("## ") and "Half is enough." in said.out
    add_entry(book, "  Again. ", "# Does it?\n\nYes.")
    first, second = book.read_text().removeprefix(HEAD + "\n").split("\n\n## ")
    assert first.endswith("UTC\n\nHalf is enough.") and second.endswith(
        "UTC\n\nAgain.\n\n### Does it?\n\nYes.\n"
    )


@pytest.mark.parametrize("before", [b"# Mine\r\n\r\nd\xe9j\xe0 vu\r\n", b"# Mine", b"# Mine\n\n", b"\n"])
def test_what_is_in_it_stays_and_a_link_stays_one(tmp_path, before):
    (tmp_path / "mine.md").write_bytes(before)
    (tmp_path / "mine.md").chmod(0o600)
    book = tmp_path / "LAB.md"
    book.symlink_to("mine.md")
    entry = add_entry(book, "One\nand two \udcff").encode()
    end = b"\r\n" if b"\r" in before else b"\n"
    after = (tmp_path / "mine.md").read_bytes()
    assert book.is_symlink() and after.startswith(before) and after.endswith(entry.replace(b"\n", end))
    assert after.removesuffix(entry.replace(b"\n", end)).endswith(2 * end)
    assert (tmp_path / "mine.md").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_refuses_leaves_the_book_as_it_was(tmp_path, monkeypatch):
    book = tmp_path / "LAB.md"
    book.write_text("# Mine\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="The disk is full: writing the lab book"):
        add_entry(book, "One")
    assert book.read_text() == "# Mine\n"
