"""Near-duplicates and clean twins of real text and of numbers, whose Jaccard similarity is known exactly."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tests.darwin.making import STDLIB, made, prose, recipe

DUPLICATE, TWIN = (0.8, 0.87), (0.5, 0.76)
_WORD = re.compile(r"\w+")


def runs(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """The different runs of words, by a definition of their own: sets of tuples, no hashes."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def similarity(one: str, other: str) -> float:
    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


def base_texts(count: int, draw: random.Random) -> Iterator[str]:
    """Real prose and code, a third of them tables of numbers; none is like another."""
    files = sorted(path for path in STDLIB.glob("*.py") if path.stat().st_size > 2000)
    draw.shuffle(files)
    pool = [
        *prose(),
        *(path.read_text(encoding="utf-8", errors="replace") for path in files[: count // 4 + 40]),
    ]
    pieces = []
    for text in pool:
        words = list(re.finditer(r"\S+", text))
        size = draw.randrange(200, 700)
        pieces += [
            text[words[k].start() : words[k + size].start()] for k in range(0, len(words) - size, size)
        ]
    draw.shuffle(pieces)
    seen: set[tuple[str, ...]] = set()
    given = 0
    for piece in pieces:
        if given == count:
            return
        if given % 3 == 2:
            yield table(draw)
            given += 1
            continue
        found = runs(piece)
        if len(found) > 120 and len(found & seen) < 0.1 * len(found):
            seen |= found
            yield piece
            given += 1


def table(draw: random.Random) -> str:
    rows = [
        f"row {i}: " + " ".join(str(draw.randrange(10_000)) for _ in range(8))
        for i in range(draw.randrange(20, 60))
    ]
    return "\n".join(rows)


def like(text: str, bounds: tuple[float, float], draw: random.Random) -> str:
    """The text with words changed, digits to other digits, until its similarity lies within bounds."""
    words = list(re.finditer(r"\w+", text))
    at = list(range(len(words)))
    draw.shuffle(at)
    changed: dict[int, str] = {}
    wanted = draw.uniform(*bounds)
    for place in at:
        word = words[place][0]
        changed[place] = (
            str(draw.randrange(10_000, 99_999)) if word.isdigit() else f"{word}{draw.choice('abcdefgh')}x"
        )
        pieces, end = [], 0
        for k in sorted(changed):
            pieces += [text[end : words[k].start()], changed[k]]
            end = words[k].end()
        other = "".join(pieces) + text[end:]
        now = similarity(text, other)
        if now <= wanted:
            if bounds[0] <= now <= bounds[1]:
                return other
            changed.clear()  # one word took it past the bounds: another draw
    return text


def plant(folder: Path, count: int, seed: int) -> tuple[set[str], set[str]]:
    """Write `count` texts, a near-duplicate of each second and a clean twin of the others, in two sources.

    Returns:
        The identifiers of the near-duplicates, and of all others.
    """
    draw = random.Random(seed)
    duplicates, others = set(), set()
    first, second = [], []
    for number, text in enumerate(base_texts(count, draw)):
        bounds = DUPLICATE if number % 2 else TWIN
        other = like(text, bounds, draw)
        if other == text:
            continue
        name = f"{'duplicate' if number % 2 else 'twin'}{number}"
        # In the same source or in another, respaced.
        in_other = draw.random() < 0.5
        (duplicates if number % 2 else others).add(f"{'b' if in_other else 'a'}/{name}")
        others.add(f"a/base{number}")
        first.append({"id": f"base{number}", "text": text})
        other = other.replace(" ", "  ").upper() if in_other else other
        (second if in_other else first).append({"id": name, "text": other})
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("a", first), ("b", second)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return duplicates, others


def dedup_figures(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Recall and precision of `minhash_dedup` on planted texts, through a whole run."""
    duplicates, others = plant(folder / "planted", count, seed)
    sources = [{"name": name, "paths": [f"planted/{name}.jsonl"], "id_field": "id"} for name in "ab"]
    corpus = made(recipe(folder, "deduplicated", sources=sources, steps=["minhash_dedup"]))
    dropped = {record["id"] for record in corpus.records("dropped")}
    assert dropped <= duplicates | others
    return {
        "dedup_recall": len(dropped & duplicates) / len(duplicates),
        "dedup_precision": len(dropped & duplicates) / max(1, len(dropped)),
        "dedup_planted": len(duplicates),
        "dedup_clean": len(others),
    }
