"""Which of a checkpoint's records of a task counts, where it was asked more than once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def fullest(records: Iterable[Record], point: str) -> list[Record]:
    """One record of each checkpoint, task and way of asking: all items before a limit, a larger limit before a
    smaller one, and of the same the newest.

    So a look at a few items, afterwards, hides nothing. Records of a checkpoint that is there no more, since the run
    was trained anew, are left out.

    Args:
        records: With results, the oldest first.
        point: The key that tells checkpoints apart.
    """
    records = list(records)
    newest = {record.get(point): digest for record in records if (digest := _checkpoint(record))}
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if _checkpoint(record) not in (None, newest.get(record.get(point))):
            continue
        key = record.get(point), str(record.get("task")), str(record.get("protocol")), way_of(record)
        if key not in found or _room(record) >= _room(found[key]):
            found[key] = record
    return list(found.values())


def way_of(record: Record) -> str:
    """How a task was asked beside its number of items, in words: examples before each item, texts that were given."""
    shots, given = record.get("shots"), record.get("given")
    texts = given.get("texts") if isinstance(given, dict) else None
    words = [f"{shots}-shot"] if isinstance(shots, int) else []
    words += [f"texts {' and '.join(map(str, texts))}"] if isinstance(texts, list) and texts else []
    return " with ".join(words)


def limited(record: Record) -> str:
    """With how many items a figure was measured, in words; empty where all were asked."""
    if record.get("limit") is None:
        return ""
    items = record.get("items")
    return f"{items:,} items" if isinstance(items, int) else f"{record['limit']} items a task"


def _room(record: Record) -> float:
    limit = record.get("limit")
    return math.inf if limit is None else float(limit)


def _checkpoint(record: Record) -> str | None:
    identity = record.get("identity")
    return identity.get("checkpoint") if isinstance(identity, dict) else None
