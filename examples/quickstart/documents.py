"""Which documents a corpus keeps, and on which side of the split each lies. Used by `corpus.py`."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

DOMAINS = ("general", "code", "science", "qa")
VALIDATION_SHARE = 0.04
VALIDATION_DOCUMENTS = 40
VALIDATION_BYTES = 200_000  # some 50,000 tokens of a small vocabulary
SMALL_DOMAIN_SHARE = 0.2  # a domain too small for the two numbers above gives at most this much of itself


class Document(NamedTuple):
    """One text of one domain; `source` names the file (or package) that it was taken from."""

    domain: str
    source: str
    title: str
    text: str
    prompt: str = ""
    response: str = ""


def size_of(document: Document) -> int:
    """The UTF-8 bytes of a document's text."""
    return len(document.text.encode())


def digest(seed: int, *parts: str) -> str:
    """16 hexadecimal digits that depend on the seed and on every part."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8, key=str(seed).encode()).hexdigest()


def shuffled(documents: Iterable[Document], seed: int) -> list[Document]:
    """The documents in an order that is keyed by the seed and blind to the order they came in."""
    return sorted(documents, key=lambda d: digest(seed, d.source, d.title, d.text))


def letters_of(text: str) -> str:
    """The text without case, space, digits and punctuation: what two copies with new dates have in common."""
    return re.sub(r"[\W\d_]+", "", text.lower())


def select(tiers: Iterable[list[Document]], budget: Mapping[str, int], seed: int) -> list[Document]:
    """The first documents of each domain that fit its budget, tier by tier, without copies.

    A copy is a text whose letters are those of an earlier text, of whatever domain. Within a tier the order
    is keyed by the seed, so that a budget that ends inside it takes a sample and not the letter A.
    """
    chosen: list[Document] = []
    seen: set[bytes] = set()
    left = dict(budget)
    for tier in tiers:
        for document in shuffled(tier, seed):
            size = size_of(document)
            if size > left[document.domain]:
                continue
            fingerprint = hashlib.blake2b(letters_of(document.text).encode(), digest_size=16).digest()
            if fingerprint not in seen:
                seen.add(fingerprint)
                left[document.domain] -= size
                chosen.append(document)
    return chosen


def families(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents that must not be parted: of one source, or alike in their first 1000 or last 300 letters."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        root = parent.setdefault(key, key)
        while parent[root] != root:
            root = parent[root]
        while parent[key] != root:
            parent[key], key = root, parent[key]
        return root

    for document in documents:
        letters = letters_of(document.text[:3000])
        ending = letters_of(document.text[-1000:])
        keys = [f"head {letters[:1000]}"] if len(letters) >= 300 else []
        keys += [f"tail {ending[-300:]}"] if len(ending) >= 300 else []
        for key in keys:
            parent[find(key)] = find(f"source {document.source}")
    grouped: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        grouped[find(f"source {document.source}")].append(document)
    return {min(d.source for d in members): members for members in grouped.values()}


def split(documents: list[Document], seed: int) -> dict[tuple[str, str], list[Document]]:
    """`{(domain, "train" | "valid"): documents}`, with each family on one side.

    Families come in an order keyed by the seed and go to validation while a domain that they have text of
    still lacks some. A family that is more than half of what is wanted trains: one file would be the test.
    """
    size: dict[str, int] = dict.fromkeys(DOMAINS, 0)
    count: dict[str, int] = dict.fromkeys(DOMAINS, 0)
    for document in documents:
        size[document.domain] += size_of(document)
        count[document.domain] += 1
    wanted_bytes = {
        d: max(VALIDATION_SHARE * size[d], min(VALIDATION_BYTES, SMALL_DOMAIN_SHARE * size[d]))
        for d in DOMAINS
    }
    wanted_documents = {d: min(VALIDATION_DOCUMENTS, int(SMALL_DOMAIN_SHARE * count[d])) for d in DOMAINS}
    got_bytes = dict.fromkeys(DOMAINS, 0)
    got_documents = dict.fromkeys(DOMAINS, 0)
    sides: dict[tuple[str, str], list[Document]] = {
        (d, side): [] for d in DOMAINS for side in ("train", "valid")
    }
    grouped = families(documents)
    for name in sorted(grouped, key=lambda source: digest(seed, "family", source)):
        members = grouped[name]
        share: dict[str, int] = defaultdict(int)
        for document in members:
            share[document.domain] += size_of(document)
        lacking = [
            d for d in share if got_bytes[d] < wanted_bytes[d] or got_documents[d] < wanted_documents[d]
        ]
        too_large = any(share[d] > max(wanted_bytes[d] / 2, 1) for d in share)
        side = "valid" if lacking and not too_large else "train"
        for document in members:
            sides[document.domain, side].append(document)
            if side == "valid":
                got_bytes[document.domain] += size_of(document)
                got_documents[document.domain] += 1
    return sides
