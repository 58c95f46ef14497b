"""The books of an import: every flag of the command ends in exactly one of three classes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_davinci.convert import megatron_flags
from megatron_davinci.convert.megatron_command import Command, Occurrence, printable

_LONGEST = 80  # characters of a flag and its values in an error


@dataclass(frozen=True)
class Entry:
    """What became of a flag.

    Attributes:
        flag: The flag with its values; where it is not given, what Megatron-LM takes without it.
        line: Of the script; 0 for what it does not say.
        what: Where it went, or why it did not.
        do: What to do, for what was not carried over.
    """

    flag: str
    line: int
    what: str
    do: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{place}{self.flag}: {self.what}" + (f" (do: {self.do})" if self.do else "")


@dataclass
class Ledger:
    """The flags of a command, and what became of each.

    Attributes:
        carried: What is in the configuration.
        idle: What has no effect here.
        lost: What is not carried over.
        problems: Contradictions of the command with itself, and values that are none.
        because: See `Command`.
    """

    where: str
    given: dict[str, Occurrence] = field(default_factory=dict)
    carried: list[Entry] = field(default_factory=list)
    idle: list[Entry] = field(default_factory=list)
    lost: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    because: dict[str, str] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _wrong: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, command: Command, where: str) -> Ledger:
        """Open the books: what a later flag overrides, the launcher's flags and what was not read are in them."""
        ledger = cls(where, because=command.because)
        for occurrence in command.flags:
            name = megatron_flags.ALIASES.get(occurrence.flag, occurrence.flag)
            if before := ledger.given.get(name):
                ledger._add(ledger.idle, before, f"given again on line {occurrence.line}, which counts")
            ledger.given[name] = occurrence
        for occurrence in command.launcher:
            ledger._add(ledger.idle, occurrence, megatron_flags.launcher(occurrence.flag).what)
        for word in command.stray:
            what = "a word that belongs to no flag"
            if word.text in ("$@", "$*"):
                what = "what the script is called with is not known"
            ledger.lost.append(Entry(word.text, word.line, what, "add it to the command, if it is a flag"))
        for passage in command.unread:
            for flag in passage.flags:
                what = f"not read: {passage.why}"
                ledger.lost.append(
                    Entry(flag.text, flag.line, what, "say it with --set, or write the command out")
                )
            if not passage.flags:
                what = "what it assigns is not known"
                ledger.lost.append(
                    Entry(passage.why, passage.line, what, "say it with --set, or write it out")
                )
        return ledger

    # ---- reading -----------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the command gives a flag."""
        return name in self.given

    def text(self, name: str, default: str | None = None) -> str | None:
        """The value of a flag."""
        occurrence = self.given.get(name)
        if occurrence is None:
            return default
        if not occurrence.values:
            self.problem(name, expected="a value")
            return default
        return occurrence.values[0]

    def integer(self, name: str, default: int | None = None, least: int = 0) -> int | None:
        """The value of a flag that is a whole number."""
        return self._number(name, int, default, least, f"a whole number, {least} or more")

    def number(self, name: str, default: float | None = None) -> float | None:
        """The value of a flag that is a number, 0 or more."""
        return self._number(name, float, default, 0, "a number, 0 or more")

    def _number(self, name: str, kind: Any, default: Any, least: int, expected: str) -> Any:
        text = self.text(name)
        if text is None:
            return default
        try:
            value = kind(text[:40])
            if least <= value < 10**18:
                return value
        except ValueError:
            pass
        self.problem(name, expected=expected)
        return default

    def problem(self, *names: str, expected: str) -> None:
        """Note what the command gets wrong, with the lines of the flags that do; of a flag one thing."""
        if not self._wrong.isdisjoint(names):
            return
        self._wrong.update(names)
        known = [self.given[name] for name in names if name in self.given]
        found = "; ".join(f"line {o.line}: {_short(str(o))}" for o in known) or ", ".join(names)
        unknown = [written for o in known for written in o.unknown]
        if unknown:
            expected += f"; {_short(unknown[0])} is not known: {self._how_to_say(unknown[0])}"
        self.problems.append(printable(f"{found}; expected {expected}"))

    def _how_to_say(self, written: str) -> str:
        """What a user can do about an expansion that the script alone does not say."""
        if written.startswith("$((") and (named := re.search(r"\$\{?(\d+)|([A-Za-z_]\w*)", written)):
            return f"--set {named[1] or named[2]}=VALUE"
        found = re.fullmatch(r"\$\{?(\w+).*", written, re.DOTALL)
        if found is None:
            return "write its value in its place"
        said = f"--set {found[1]}=VALUE"
        decides = self.because.get(found[1])
        return said if decides is None else f"{self._how_to_say(decides)}, which decides it, or {said}"

    # ---- booking -----------------------------------------------------------------------------------------

    def carry(self, name: str, to: str) -> None:
        """Book a flag as carried over, if it is given."""
        self._book(self.carried, name, to)

    def ignore(self, name: str, why: str) -> None:
        """Book a flag as without effect, if it is given."""
        self._book(self.idle, name, why)

    def lose(self, name: str, why: str, do: str) -> None:
        """Book a flag as not carried over, if it is given."""
        self._book(self.lost, name, why, do)

    def lost_note(self, name: str, why: str, do: str) -> None:
        """Say what of a flag is not carried over, though the flag is."""
        self.lost.append(Entry(f"(a part of {name})", self.given[name].line, why, do))

    def lose_default(self, flag: str, why: str, do: str) -> None:
        """Book what Megatron-LM does when a flag is not given, and this package does not."""
        self.lost.append(Entry(f"{flag} (not given)", 0, why, do))

    def _book(self, books: list[Entry], name: str, what: str, do: str = "") -> None:
        if name in self.given and name not in self._done:
            self._done.add(name)
            self._add(books, self.given[name], what, do)

    def _add(self, books: list[Entry], occurrence: Occurrence, what: str, do: str = "") -> None:
        if occurrence.unknown and books is self.carried:
            what += f"; to be filled in: {', '.join(dict.fromkeys(occurrence.unknown))}"
        books.append(Entry(str(occurrence), occurrence.line, what, do))

    def close(self) -> None:
        """Book by the table what is not booked yet, and what its absence means."""
        for name, occurrence in self.given.items():
            row = megatron_flags.row(name)
            if name in self._done:
                continue
            if row is None:
                near = difflib.get_close_matches(name, megatron_flags.FLAGS, n=1, cutoff=0.8)
                do = f"did you mean {near[0]}?" if near else "look up what it does, and decide"
                self.lose(name, "not a flag that is known here", do)
            elif row.kind == "fixed":
                value = occurrence.values[0] if occurrence.values else ""
                if value in row.has:
                    self.ignore(name, row.what)
                else:
                    self.lose(name, row.what, row.do)
            elif row.kind == "idle":
                self.ignore(name, row.what)
            elif row.kind == "lost":
                self.lose(name, row.what, row.do)
            else:
                self.lose(name, "there is nothing that it applies to", "leave it out")
        rotary = self.has("--use-rotary-position-embeddings")
        for row in megatron_flags.FLAGS.values():
            if row.absent and not self.has(row.name) and not (rotary and "rope" in row.has):
                self.lose_default(f"{row.absent}, as without {row.name}", row.what, row.do)
        for books in (self.carried, self.idle, self.lost):
            books.sort(key=lambda entry: entry.line or 10**9)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def lines_of(entries: Iterable[Entry]) -> list[str]:
    """Entries as lines of text."""
    return [" ".join(str(entry).split()) for entry in entries]
