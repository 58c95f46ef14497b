"""Level 2: which licence a document is under, and which licences may be used.

Names are those of SPDX (https://spdx.org/licenses), expressions too: `MIT OR Apache-2.0` may be used under either,
`MIT AND CC-BY-NC-4.0` only under both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters

_HEAD = 6000  # characters of a source file that a header lies in
_TEXT = 60_000  # bytes of a file of a licence that are looked at
_ID = r"[A-Za-z0-9](?:[A-Za-z0-9.+-]{0,98}[A-Za-z0-9+])?"
_SPDX = re.compile(
    rf"SPDX-License-Identifier:[ \t]*([( \t]*{_ID}(?:[) \t]*[ \t](?i:AND|OR|WITH)[ \t][( \t]*{_ID})*(?:[ \t]*\))*)"
)
_FILE = re.compile(r"(?i)(?:licen[cs]e|copying|unlicense)(?:[._-][\w.-]*)?\Z")
_MODULE = re.compile(r"\.(?:pyi?|rs|js|ts|go|c|h|cc|hpp|java|rb)\Z")
# Sentences that only one licence has, of which blanks and line marks are taken out first; the more special go first.
_SENTENCES: tuple[tuple[str, str], ...] = (
    ("Apache-2.0", r"apache license,? version 2\.0"),
    ("MPL-2.0", r"mozilla public license,? (?:version|v\.?) ?2\.0"),
    ("EPL-2.0", r"eclipse public license,? (?:-? ?v(?:ersion)? ?)?2\.0"),
    ("AGPL-3.0", r"gnu affero general public license(?:,? version 3| as published by the free software foundation)"),
    ("LGPL-3.0", r"gnu lesser general public license,? (?:as published by the free software foundation[,;]? "
                 r"either )?version 3"),
    ("LGPL-2.1", r"gnu lesser general public license,? (?:as published by the free software foundation[,;]? "
                 r"either )?version 2\.1"),
    ("LGPL-2.0", r"gnu library general public license"),
    ("GPL-3.0", r"gnu general public license,? (?:as published by the free software foundation[,;]? (?:either )?)?"
                r"version 3"),
    ("GPL-2.0", r"gnu general public license,? (?:as published by the free software foundation[,;]? (?:either )?)?"
                r"version 2"),
    ("BSL-1.0", r"boost software license,? (?:-? ?version )?1\.0"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
    ("CC-BY-NC-SA-4.0", r"attribution-noncommercial-sharealike 4\.0"),
    ("CC-BY-NC-4.0", r"attribution-noncommercial 4\.0"),
    ("CC-BY-SA-4.0", r"attribution-sharealike 4\.0"),
    ("CC-BY-4.0", r"(?:creative commons )?attribution 4\.0 international"),
    ("PSF-2.0", r"python software foundation license version 2|psf license agreement"),
    ("Unlicense", r"this is free and unencumbered software released into the public domain"),
    ("Zlib", r"this software is provided 'as-is', without any express or implied warranty.{0,700}?"
             r"altered source versions"),
    ("BSD-4-Clause", r"redistribution and use in source and binary forms.{0,1500}?all advertising materials "
                     r"mentioning"),
    ("Apache-1.1", r"redistribution and use in source and binary forms.{0,2500}?apache software foundation must not"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.{0,1500}?"
                     r"(?:neither the names? of|may not be used to endorse)"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms(?!.{0,2500}? to endorse or promote)"),
    ("0BSD", r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or "
             r"without fee is hereby granted\."),
    ("ISC", r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or "
            r"without fee"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
)  # fmt: skip
_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _SENTENCES]
_LINE_MARKS = re.compile(r"(?m)^[ \t]*(?:#+|//+!?|/\*+|\*+/?|;+|--+|%+|>+|\.\.|\"\"\")")

_OR_LATER = re.compile(r"(?i)[ \t]+or[ \t]+(?:later|newer|above|higher|greater)\b")


def licence_of_text(text: str) -> str | None:
    """The licence whose words a text holds, by its SPDX name; None if it is none of the known ones."""
    if found := _SPDX.search(text):
        return found[1].strip()
    plain = " ".join(_LINE_MARKS.sub(" ", text).replace('"', "").split()).lower()
    return next((name for name, pattern in _PATTERNS if pattern.search(plain)), None)


@lru_cache(maxsize=4096)
def licence_of_folder(folder: Path) -> tuple[str, str] | None:
    """The licence that a file of a folder states, and the file; None where no file of that name holds a known one."""
    try:
        names = sorted(path for path in folder.iterdir() if _FILE.match(path.name) and path.is_file())
    except OSError:
        return None
    for path in names:
        if _MODULE.search(path.name):
            continue
        with path.open("rb") as file:
            found = licence_of_text(file.read(_TEXT).decode("utf-8", "replace"))
        if found:
            return found, str(path)
    return None


class FindLicence(Step):
    """The licence of a source file: of its own header, else of the nearest licence file in the folders above it."""

    name = "find_licence"
    level = 2
    version = 2
    about = "the licence of a source file, by its SPDX line or header, else by the licence file of a folder above it"

    class Parameters(StepParameters):
        """Parameters of `find_licence`.

        Attributes:
            folders_up: How many folders above the file's are looked through; one with `.git` is the last.
            override: Whether what is found replaces a licence that the document or its source already names.
        """

        folders_up: int = Field(default=8, ge=0)
        override: bool = False

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Look into the text, then into the folders."""
        if document.metadata.get("licence") and not self.parameters.override:
            return KEEP
        found: tuple[str, str] | None = None
        if named := licence_of_text(document.text[:_HEAD]):
            found = named, "header"
        elif path := document.metadata["darwin"]["origin"].get("path"):
            found = self._above(Path(path).parent)
        if found is None:
            return KEEP
        document.metadata["licence"] = found[0]
        return Outcome(notes={"licence": found[0], "by": found[1]}, counts={found[0]: 1})

    def _above(self, folder: Path) -> tuple[str, str] | None:
        for each in [folder, *folder.parents][: self.parameters.folders_up + 1]:
            if found := licence_of_folder(each):
                return found
            if (each / ".git").exists():
                break
        return None


class Licence(Step):
    """Licences that may or may not be used."""

    name = "licence"
    level = 2
    version = 3
    about = "documents whose licence is not among those that may be used"

    class Parameters(StepParameters):
        """Parameters of `licence`. Patterns as of file names, case ignored: `cc-by*`, `*gpl*`.

        Attributes:
            keep: Licences that stay; None for all that `drop` does not name.
            drop: Licences that go.
            unknown: What becomes of a document without one.
        """

        keep: list[str] | None = None
        drop: list[str] = Field(default=[])
        unknown: str = Field(default="keep", pattern="^(keep|drop)$")

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Compare with the patterns."""
        licence = document.metadata.get("licence")
        if not licence:
            return Outcome(drop="no_licence" if self.parameters.unknown == "drop" else None)
        if not allowed(str(licence), self._may_be_used):
            return Outcome(drop="licence", notes={"licence": licence})
        return KEEP

    def _may_be_used(self, licence: str) -> bool:
        def among(patterns: list[str]) -> bool:
            return any(fnmatch(licence.lower(), pattern.lower()) for pattern in patterns)

        return (self.parameters.keep is None or among(self.parameters.keep)) and not among(
            self.parameters.drop
        )


def allowed(expression: str, judge: Callable[[str], bool]) -> bool:
    """Whether what an SPDX expression names may be used: either side of an OR, both of an AND.

    Args:
        expression: Of licences, its operators in any case (`MIT and Zlib`, as licence headers write them); what is no
            expression is judged as one name.
        judge: Of one licence, with its exception (`GPL-2.0 WITH Classpath-exception-2.0`) if it has one.
    """
    # "GPL-2.0 or later" names one licence, not two.
    joined = _OR_LATER.sub("-or-later", expression)
    words = [
        word.upper() if word.lower() in ("and", "or", "with") else word
        for word in re.findall(r"[()]|[^\s()]+", joined)
    ]
    if not {"AND", "OR"} & set(words):
        return judge(" ".join(word for word in words if word not in "()"))
    try:
        value, rest = _either(words, judge)
    except (IndexError, RecursionError):  # a thousand brackets are no expression
        return judge(expression)
    return value if not rest else judge(expression)


def _either(words: list[str], judge: Callable[[str], bool]) -> tuple[bool, list[str]]:
    value, words = _both(words, judge)
    while words and words[0] == "OR":
        other, words = _both(words[1:], judge)
        value = value or other
    return value, words


def _both(words: list[str], judge: Callable[[str], bool]) -> tuple[bool, list[str]]:
    value, words = _one(words, judge)
    while words and words[0] == "AND":
        other, words = _one(words[1:], judge)
        value = value and other
    return value, words


def _one(words: list[str], judge: Callable[[str], bool]) -> tuple[bool, list[str]]:
    if words[0] == "(":
        value, rest = _either(words[1:], judge)
        if not rest or rest[0] != ")":
            raise IndexError
        return value, rest[1:]
    if words[1:2] == ["WITH"]:
        return judge(" ".join(words[:3])), words[3:]
    return judge(words[0]), words[1:]
