"""What a document knows about itself: its level, where it came from, and an append-only list of operations.

It lies in `Document.metadata` of datatrove, so that any pipeline step of datatrove can stand between ours, and in the
records that are written. `fate` is there only in a document that a step has turned away: it travels on to the writer,
past the steps that follow, and is written with the reason.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datatrove.data import Document

DROPPED, QUARANTINED = "dropped", "quarantined"
Entry = dict[str, Any]


def text_hash(text: str) -> str:
    """BLAKE2b of a text's UTF-8 bytes, 128 bits in hex."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def parameters_hash(name: str, version: int, parameters: dict[str, Any]) -> str:
    """Names an operation with all its parameters: 48 bits in hex. The corpus manifest says what they are."""
    written = json.dumps([name, version, parameters], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(written.encode(), digest_size=6).hexdigest()


def begin(
    text: str, identifier: str, source: str, licence: str | None, origin: Entry, fields: Entry | None = None
) -> Document:
    """A document at level 0, without operations yet."""
    darwin: Entry = {"level": 0, "origin": origin, "operations": []}
    metadata: Entry = {"source": source, "licence": licence, "darwin": darwin}
    if fields:
        metadata["fields"] = fields
    return Document(text=text, id=identifier, metadata=metadata)


def append(document: Document, entry: Entry) -> None:
    """Add an operation, and raise the document to its level. Levels never fall, and operations may repeat."""
    darwin = document.metadata["darwin"]
    darwin["operations"].append(entry)
    darwin["level"] = max(darwin["level"], entry["level"])


def turn_away(document: Document, kind: str, step: str, reason: str) -> None:
    """Say that a document goes no further; the steps that follow pass it on as it is."""
    document.metadata["fate"] = {"kind": kind, "step": step, "reason": reason}


def fate_of(document: Document) -> Entry | None:
    """Which step turned the document away and why; None for one that is still in."""
    fate: Entry | None = document.metadata.get("fate")
    return fate


def to_record(document: Document) -> Entry:
    """The document as one JSON object: `id`, `text`, `source`, `licence`, `darwin`, and what else there is."""
    return {"id": document.id, "text": document.text, **document.metadata}


def from_record(record: Entry) -> Document:
    """What `to_record` made."""
    rest = {key: value for key, value in record.items() if key not in ("id", "text")}
    return Document(text=record["text"], id=record["id"], metadata=rest)
