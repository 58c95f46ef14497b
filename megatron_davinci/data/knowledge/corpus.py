"""A folder of texts with made-up facts, to be tokenised like any other, and the file that says what was made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.data.knowledge.biographies import Person, exposures, people
from megatron_davinci.data.knowledge.facts import CONDITIONS, Fact, facts, injections
from megatron_davinci.data.knowledge.names import CITY
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import disk_errors, write_atomically

FILE = "knowledge.json"
VERSION = 1  # of the lists and sentences: other ones are other facts


@dataclass(frozen=True)
class Knowledge:
    """What decides every text and every probe.

    Attributes:
        people: Persons with biographies.
        exposures: Biographies of each.
        facts: Made-up things, of four conditions in turn.
        seed: Of all that is drawn.
        version: Of the lists and sentences.
    """

    people: int
    exposures: int
    facts: int
    seed: int
    version: int = VERSION

    def persons(self) -> list[Person]:
        """Whom the biographies are about."""
        return people(self.people, self.seed)

    def made_up(self) -> list[Fact]:
        """What the passages are about."""
        return facts(self.facts, self.seed)


def write(knowledge: Knowledge, folder: Path) -> dict[str, int]:
    """Write `biographies.jsonl`, `facts.jsonl` and `knowledge.json`; those of an earlier call go.

    Returns:
        Documents by file.

    Raises:
        ConfigError: A number is impossible.
    """
    _check(knowledge)
    texts = {
        "biographies": exposures(knowledge.persons(), knowledge.exposures, knowledge.seed),
        "facts": injections(knowledge.made_up(), knowledge.seed),
    }
    counts = {}
    # Until all texts are there nothing says what they are.
    _remove(folder / FILE)
    for name, documents in texts.items():
        if count := _write(folder / f"{name}.jsonl", documents):
            counts[f"{name}.jsonl"] = count
    write_atomically(folder / FILE, json.dumps(asdict(knowledge), indent=1) + "\n")
    return counts


def read(path: Path) -> Knowledge:
    """What a folder was made of.

    Raises:
        DataError: There is no such file, it is no such file, or it was made by other lists.
    """
    file = path / FILE if path.is_dir() else path
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "The file that says what was made cannot be read.",
            where=file,
            found=str(error).splitlines()[0],
            do="name the folder that `davinci data knowledge` has made",
        ) from error
    names = Knowledge.__dataclass_fields__
    if (
        not isinstance(fields, dict)
        or {*fields} != {*names}
        or not all(type(x) is int for x in fields.values())
    ):
        raise DataError(
            "The file does not say what was made.",
            where=file,
            found=f"{fields!s:.80}",
            expected=f"whole numbers for {', '.join(names)}",
            do="name the folder that `davinci data knowledge` has made",
        )
    knowledge = Knowledge(**fields)
    if knowledge.version != VERSION:
        raise DataError(
            "The texts were made of other lists and sentences.",
            where=file,
            found=f"version {knowledge.version}",
            expected=f"version {VERSION}",
            do="probe with the version of davinci that made them, or make them and train anew",
        )
    _check(knowledge)
    return knowledge


def _write(path: Path, documents: Iterable[str]) -> int:
    """Write JSON lines, one at a time, under another name until they are whole; nothing for no documents."""
    temporary, count = path.with_name(f".{path.name}.tmp"), 0
    with disk_errors(path, f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                for text in documents:
                    file.write(json.dumps({"text": text}) + "\n")
                    count += 1
            if count:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if not count:
        _remove(path)
    return count


def _remove(path: Path) -> None:
    with disk_errors(path, f"removing {path.name}"), suppress(NotADirectoryError):
        path.unlink(missing_ok=True)


def _check(knowledge: Knowledge) -> None:
    problems = list(_problems(knowledge))
    if problems:
        raise ConfigError(
            "Such texts cannot be made.", where="davinci data knowledge", found="; ".join(problems)
        )


def _problems(knowledge: Knowledge) -> Iterator[str]:
    if knowledge.people < 0 or knowledge.facts < 0 or not (knowledge.people or knowledge.facts):
        yield f"--people {knowledge.people} and --facts {knowledge.facts}, where one is to be above 0"
    if knowledge.people > 10_000_000:
        yield f"--people {knowledge.people:,}, where there are at most 10,000,000"
    if knowledge.people and knowledge.exposures < 1:
        yield f"--exposures {knowledge.exposures}, where there is at least 1"
    if knowledge.facts > len(CITY):
        yield f"--facts {knowledge.facts}, where there are at most {len(CITY)}"
    if knowledge.facts % len(CONDITIONS):
        yield f"--facts {knowledge.facts}, which {len(CONDITIONS)} conditions do not divide evenly"
    if knowledge.seed < 0:
        yield f"--seed {knowledge.seed}, where it is not below 0"
