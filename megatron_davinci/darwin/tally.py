"""What passes over the documents count: by source and step, mergeable over tasks, small whatever the corpus is."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from datatrove.data import Document

from megatron_davinci.darwin.provenance import fate_of

_EXAMPLES = 4
_EXCERPT = 700
NO_NUMBER = -10_000  # the bin that statistics of former versions have for what is no finite number
Counts = dict[str, Any]


class Tally:
    """Counts of one task or of many.

    Attributes:
        documents: By `(source, what)`: how many, where what is `input`, `derived/STEP`, `kept`, `dropped/STEP/REASON`
            or `quarantined/STEP/REASON`.
        characters: Likewise; of `input`, those of the raw text.
        tokens: Of kept documents, by source and level, where they are counted.
        levels: Kept documents and characters by source and level.
        histograms: By name, documents in each bin.
        examples: By what, a few documents that the hash of their identifier chose.
        seconds: That were spent in each step.
        counts: What steps count themselves, by `STEP/WHAT`.
        requests: To models, by `STEP/WHAT` too; these differ from run to run.
    """

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.levels: Counter[str] = Counter()
        self.histograms: dict[str, Counter[int]] = {}
        self.examples: dict[str, list[list[Any]]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    def read(self, source: str, characters: int) -> None:
        """A document, or what cannot be one, has been read."""
        self.documents[f"{source}/input"] += 1
        self.characters[f"{source}/input"] += characters

    def derived(self, step: str, document: Document) -> None:
        """A step made a document out of another."""
        source = document.metadata["source"]
        self.documents[f"{source}/derived/{step}"] += 1
        self.characters[f"{source}/derived/{step}"] += len(document.text)

    def counted(self, step: str, counts: dict[str, int]) -> None:
        """A step counted something."""
        self.counts.update({f"{step}/{what}": count for what, count in counts.items()})

    def requested(self, step: str, requests: dict[str, int]) -> None:
        """A step asked a model."""
        self.requests.update({f"{step}/{what}": count for what, count in requests.items()})

    def written(self, document: Document, last: bool, tokens: int | None) -> str:
        """A document leaves a pass.

        Args:
            document: With its fate, if it has one.
            last: Whether the pass is the last.
            tokens: Of a kept document; None where they are not counted.

        Returns:
            What has become of it: `kept`, `dropped` or `quarantined`.
        """
        fate, source, size = fate_of(document), document.metadata["source"], len(document.text)
        what = f"{fate['kind']}/{fate['step']}/{fate['reason']}" if fate else "kept"
        if fate is None and not last:
            return "kept"
        self.documents[f"{source}/{what}"] += 1
        self.characters[f"{source}/{what}"] += size
        self._remember(what, document)
        if fate is not None:
            return str(fate["kind"])
        level = document.metadata["darwin"]["level"]
        for unit, count in (("documents", 1), ("characters", size), ("tokens", tokens)):
            if count is not None:
                self.levels[f"{source}/{level}/{unit}"] += count
        self.histograms.setdefault("length", Counter())[size.bit_length()] += 1
        language = document.metadata.get("language")
        if language:
            self.documents[f"{source}/language/{language}"] += 1
        return "kept"

    def scored(self, step: str, scores: dict[str, float], dropped: bool) -> None:
        """A step measured a document. What is no finite number has no place in a histogram."""
        for name, value in scores.items():
            if abs(value) <= sys.float_info.max:
                key = f"{step}/{name}/{'dropped' if dropped else 'kept'}"
                self.histograms.setdefault(key, Counter())[score_bin(value)] += 1

    def _remember(self, what: str, document: Document) -> None:
        rank = hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        kept = self.examples.setdefault(what, [])
        if len(kept) == _EXAMPLES and rank >= kept[-1][0]:
            return
        operations = document.metadata["darwin"]["operations"]
        notes = operations[-1].get("notes") if operations and what != "kept" else None
        kept.append([rank, document.metadata["source"], document.id, document.text[:_EXCERPT], notes])
        kept.sort(key=_rank)
        del kept[_EXAMPLES:]

    def dump(self) -> Counts:
        """As plain values."""
        return {
            "documents": dict(sorted(self.documents.items())),
            "characters": dict(sorted(self.characters.items())),
            "levels": dict(sorted(self.levels.items())),
            "histograms": {
                name: {str(bin_): count for bin_, count in sorted(bins.items())}
                for name, bins in sorted(self.histograms.items())
            },
            "examples": dict(sorted(self.examples.items())),
            "counts": dict(sorted(self.counts.items())),
            "requests": dict(sorted(self.requests.items())),
            "seconds": {name: round(value, 3) for name, value in sorted(self.seconds.items())},
        }

    @classmethod
    def merged(cls, all_counts: Iterable[Counts]) -> Tally:
        """One tally of many that were dumped; in any order, it is the same."""
        total = cls()
        for counts in all_counts:
            total.documents.update(counts["documents"])
            total.characters.update(counts["characters"])
            total.levels.update(counts["levels"])
            total.counts.update(counts.get("counts", {}))
            total.requests.update(counts.get("requests", {}))
            for name, seconds in counts["seconds"].items():
                total.seconds[name] += seconds
            for name, bins in counts["histograms"].items():
                total.histograms.setdefault(name, Counter()).update(
                    {int(bin_): count for bin_, count in bins.items()}
                )
            for what, examples in counts["examples"].items():
                kept = sorted(
                    total.examples.get(what, []) + [list(example) for example in examples], key=_rank
                )
                total.examples[what] = kept[:_EXAMPLES]
        return total


def _rank(example: list[Any]) -> tuple[str, str]:
    return str(example[0]), str(example[2])


def score_bin(value: float) -> int:
    """The bin of a score: fiftieths up to 1, tenths of a decade beyond; negative ones mirror them."""
    size = abs(value)
    bin_ = int(size * 50) if size <= 1 else 50 + int(10 * math.log10(size))
    return bin_ if value >= 0 else -bin_ - 1


def bin_edge(bin_: int) -> float:
    """The least size of score in a bin."""
    if bin_ < 0:
        return -bin_edge(-bin_ - 1)
    return bin_ / 50 if bin_ <= 50 else 10 ** min((bin_ - 50) / 10, 308.25)
