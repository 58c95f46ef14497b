"""A document's life: found by its identifier, read from its raw bytes, and taken through its operations again.

No text between two operations is stored. Every operation that wrote a text noted its hash; here the operations that
write are applied again, with the parameters in the corpus's manifest, and each text is held against the hash. So what
is shown is what happened, or it is said that it cannot be shown any more: another version of a library, a raw file
that has gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document

from megatron_davinci.darwin import acquire
from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.parts import lines_of_part
from megatron_davinci.darwin.provenance import text_hash
from megatron_davinci.darwin.recipe import SourceRecipe
from megatron_davinci.errors import DataError, DavinciError

KINDS = ("documents", "dropped", "quarantine")


class Found(NamedTuple):
    """A document of a corpus.

    Attributes:
        corpus: The corpus.
        kind: `documents`, `dropped` or `quarantine`.
        path: The file that holds it.
        record: The document.
    """

    corpus: Corpus
    kind: str
    path: Path
    record: dict[str, Any]


class Event(NamedTuple):
    """One operation of a document's life.

    Attributes:
        entry: As the document has it.
        settings: All parameters of the operation; None if the manifest does not know it.
        before: The text before it; None where it did not change, or cannot be shown.
        after: The text after it, likewise.
        trouble: Why the texts cannot be shown.
    """

    entry: dict[str, Any]
    settings: dict[str, Any] | None
    before: str | None = None
    after: str | None = None
    trouble: str = ""


def find_corpora(folder: Path) -> list[Corpus]:
    """The finished corpora in a folder: itself, or those one or two levels below."""
    paths = [
        folder / "corpus.json",
        *sorted(folder.glob("*/corpus.json")),
        *sorted(folder.glob("*/*/corpus.json")),
    ]
    return [Corpus.load(path.parent) for path in paths if path.is_file()]


def find(corpora: list[Corpus], identifier: str) -> Found:
    """A document by its identifier, wherever it came out.

    Raises:
        DataError: No corpus has it.
    """
    marks = [json.dumps(identifier, ensure_ascii=escaped)[1:-1] for escaped in (False, True)]
    plain, escaped = (mark.encode("utf-8", "surrogatepass") for mark in marks)
    like: str | None = None
    for corpus in corpora:
        for kind in KINDS:
            for path in corpus.files(kind):
                for line in lines_of_part(path):
                    if plain in line or escaped in line:
                        record = json.loads(line)
                        if record["id"] == identifier:
                            return Found(corpus, kind, path, record)
                    if like is None:
                        like = json.loads(line)["id"]
    raise DataError(
        "No corpus has such a document.",
        where=", ".join(str(corpus.folder) for corpus in corpora) or "no finished corpus was found",
        found=identifier,
        expected=f"an identifier like {like}" if like else None,
        do="name the corpus by --corpus; identifiers are SOURCE/..., as the field `id` of its files has them",
    )


def events(found: Found) -> Iterator[Event]:
    """A document's operations, with the texts before and after each that changed one."""
    manifest, record = found.corpus.manifest, found.record
    settings = {operation["parameters"]: operation["settings"] for operation in manifest["operations"]}
    where = {
        operation["parameters"]: operation.get("whereabouts", {}) for operation in manifest["operations"]
    }
    text, trouble = _raw_text(record, settings)
    for entry in record["darwin"]["operations"]:
        known = settings.get(entry["parameters"])
        if entry["name"] == "acquire":
            if text is not None and "sha" in entry and text_hash(text) != entry["sha"]:
                text, trouble = None, "the raw file has changed since it was read"
            yield Event(entry, known, trouble=trouble)
        elif entry["result"] not in ("changed", "made"):
            yield Event(entry, known)
        elif text is None or known is None:
            yield Event(entry, known, trouble=trouble or "the corpus's manifest does not know its parameters")
        else:
            after, trouble = _applied(entry, known, where[entry["parameters"]], text, record)
            yield Event(entry, known, text, after, trouble)
            text = after


def _raw_text(record: dict[str, Any], settings: dict[str, Any]) -> tuple[str | None, str]:
    [first] = [entry for entry in record["darwin"]["operations"] if entry["name"] == "acquire"][:1]
    known = settings.get(first["parameters"])
    if known is None:
        return None, "the corpus's manifest does not know how it was read"
    if "sha" not in first:
        return None, ""  # it never was a text
    fields = {key: value for key, value in known.items() if key not in ("source", "document_bytes")}
    source = SourceRecipe(name=known["source"], paths=["-"], **fields)
    raw = acquire.read_raw(record["darwin"]["origin"], source, known["document_bytes"])
    if raw is None or raw.fault:
        return None, "the raw file has gone, or cannot be read any more"
    return raw.text, ""


def _applied(
    entry: dict[str, Any], settings: dict[str, Any], where: dict[str, Any], text: str, record: dict[str, Any]
) -> tuple[str | None, str]:
    """What an operation made of a text, and why that cannot be shown if it cannot."""
    kind = STEPS.get(entry["name"])
    if kind is None or kind.version != entry["version"]:
        return None, f"this version of megatron-davinci has no {entry['name']} of version {entry['version']}"
    metadata = {key: value for key, value in record.items() if key not in ("id", "text", "fate", "prompt")}
    try:
        step = kind.restored(settings, where)
        outcome = step.repeat(Document(text=text, id=record["id"], metadata=metadata), entry)
    except DavinciError as error:  # the answers of a model that has been moved away
        return None, str(error)
    after = outcome.text
    if entry["result"] == "made":
        texts = [each.text for each in outcome.made or []]
        after = next((text for text in texts if text_hash(text) == entry["sha"]), None)
    if after is None or text_hash(after) != entry["sha"]:
        return None, f"{entry['name']} makes another text today" + (
            f" ({step.model}; then {entry['model']})" if step.model != entry.get("model") else ""
        )
    return after, ""
