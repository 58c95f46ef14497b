"""The answers of `davinci data inspect` as plain values: they are its JSON, and what its screen and its page show."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_davinci.cli.data_files import bar
from megatron_davinci.cli.data_inspect_sample import Decode, as_values, spans
from megatron_davinci.data.census import Census, take_census
from megatron_davinci.data.explain import Explainer
from megatron_davinci.data.source import Source
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError, DataError, DavinciError

Answer = dict[str, Any]
Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, list[str]]]
"""Tokens of a window and their weights as labels, to those that the model sees, and what was done to them."""
_T = TypeVar("_T")
PERCENTILES = (1, 50, 99)
LENGTH = 4096  # tokens of a window where nobody says


@dataclass(frozen=True)
class Asked:
    """What was asked for besides the target; the command's arguments of these names.

    Attributes:
        sequence_length: None for `LENGTH`.
        shards: How many shards of each source to read; None for all.
        samples: How many samples to show.
        at: The first of them; None to draw them.
        seed: Draws them.
        by_token: Show where tokens end.
        whole: Whole texts.
        tokenizer: Of a source.
    """

    sequence_length: int | None = None
    shards: int | None = None
    samples: int = 0
    at: int | None = None
    seed: int = 0
    by_token: bool = False
    whole: bool = False
    tokenizer: Path | None = None

    def numbers(self, total: int, what: str) -> list[int]:
        """The samples to show, of `total`.

        Raises:
            ConfigError: There is no such sample.
        """
        if self.at is None:
            return sorted(random.Random(self.seed).sample(range(total), min(self.samples, total)))
        if not 0 <= self.at < total:
            raise ConfigError(
                f"There is no such {what}.",
                where="--at",
                found=f"{self.at:,}",
                expected=f"0 to {total - 1:,}" if total else f"none: there is no {what}",
            )
        return list(range(self.at, min(self.at + self.samples, total)))


def inspect_source(target: str, asked: Asked) -> tuple[Answer, list[DavinciError]]:
    """What a source holds, with samples of it, and what is wrong with its shards.

    Raises:
        ConfigError: A window is asked for that is not there.
        DataError: There is no source, it is damaged as a whole, or the tokenizer is not that of its tokens.
        EnvironmentProblem: A file cannot be read.
    """
    census = counted(target, asked)
    manifest, length = census.manifest, asked.sequence_length or LENGTH
    name = manifest.name if manifest else census.place.name
    tokenizer = None if asked.tokenizer is None else Tokenizer.load(asked.tokenizer)
    facts = source_facts(name, manifest.domain if manifest else name, census, length)
    notes = []
    if tokenizer is not None and manifest is not None:
        if manifest.vocab_size > tokenizer.vocab_size:
            raise DataError(
                "The source has more ids than the tokenizer.",
                where=asked.tokenizer,
                found=f"{tokenizer.vocab_size:,} ids",
                expected=f"{manifest.vocab_size:,}, as the source's manifest says",
                do="give the tokenizer that made the source",
            )
        notes += other_tokenizer(tokenizer, {name: manifest.tokenizer_sha256}, "--tokenizer")
    problems, samples = list(census.problems), []
    if asked.samples and census.windows(length):
        vocabulary = manifest.vocab_size if manifest else tokenizer.vocab_size if tokenizer else None
        source = Source.open(name, census.place, length, vocab_size=vocabulary)
        reader = SampleReader({name: source}, tokenizer, asked)
        eod_id = tokenizer.eod_id if manifest is None and tokenizer else source.eod_id
        for window in asked.numbers(source.num_windows, "window"):
            read = tried(partial(reader.sample, name, window, eod_id), problems)
            unread = {"source": name, "window": window, "spans": None}
            samples.append({"n": None, **(unread if read is None else read)})
    elif asked.samples:
        notes.append(f"no sample is shown: the source has no window of {length:,} tokens")
    if asked.samples and tokenizer is None:
        notes.append("--tokenizer is not given: tokens are shown by their ids")
    return {
        "target": str(target),
        "kind": "source",
        "run": None,
        "sources": [facts],
        "validation": [],
        "stages": [],
        "samples": samples,
        "notes": notes,
        "problems": [str(problem) for problem in problems],
    }, problems


def tried(action: Callable[[], _T], problems: list[DavinciError]) -> _T | None:
    """What an action gives; None where it fails, and why among the problems, once."""
    try:
        return action()
    except DavinciError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
        return None


def counted(path: Any, asked: Asked) -> Census:
    """`take_census` with a progress bar."""
    with bar(f"reading {path}") as progress:
        return take_census(path, sample=asked.shards, progress=progress)


def source_facts(name: str, domain: str, census: Census, length: int) -> Answer:
    """A source's numbers.

    Args:
        name: Its name in the answer.
        domain: Its domain.
        census: What it holds.
        length: Tokens of a window, less one.
    """
    manifest, lengths = census.manifest, census.lengths
    return {
        "name": name,
        "domain": domain,
        "place": str(census.place),
        "has_manifest": manifest is not None,
        "dtype": census.dtype.name,
        "shards": len(census.shard_tokens),
        "tokens": census.tokens,
        "bytes": census.tokens * census.dtype.itemsize,
        "documents": census.documents,
        "vocab_size": manifest.vocab_size if manifest else None,
        "eod_id": manifest.eod_id if manifest else None,
        "tokenizer_sha256": manifest.tokenizer_sha256 if manifest else None,
        "has_mask": census.has_mask,
        "windows": {
            "sequence_length": length,
            "number": census.windows(length),
            "lost_tokens": census.lost_tokens(length),
        },
        "read": {
            "shards": len(census.read),
            "is_sample": census.is_sample,
            "tokens": census.read_tokens,
            "loss_tokens": census.loss_tokens,
            "documents": lengths.documents,
            "empty_documents": lengths.empty,
            "longest": lengths.longest,
            "percentiles": {str(percent): lengths.percentile(percent) for percent in PERCENTILES},
            "histogram": [one._asdict() for one in lengths.bins()],
        },
        "problems": [str(problem) for problem in census.problems],
    }


def other_tokenizer(tokenizer: Tokenizer, made_by: dict[str, str | None], said: str) -> list[str]:
    """A note on sources that another tokenizer made."""
    others = [name for name, digest in made_by.items() if digest not in (None, tokenizer.sha256)]
    if not others:
        return []
    return [f"{', '.join(others)}: made with another tokenizer than {said}, so the text may be wrong"]


class SampleReader:
    """Reads windows, and divides them into what is shown.

    Args:
        sources: Open, by name.
        tokenizer: None to show ids.
        asked: How to show them.
    """

    def __init__(self, sources: dict[str, Source], tokenizer: Tokenizer | None, asked: Asked) -> None:
        self._sources, self._asked = sources, asked
        self._explainer = Explainer(sources)
        self._decode: Decode = _ids if tokenizer is None else partial(_text, tokenizer)

    def sample(self, source: str, window: int, eod_id: int | None, change: Change | None = None) -> Answer:
        """A window's facts and spans.

        Args:
            source: Name of the source.
            window: Number of the window.
            eod_id: The token that ends documents, if one does.
            change: What is done to it on its way to the model.

        Raises:
            DataError: A file of its shard is missing or damaged, or a token is outside the vocabulary.
            EnvironmentProblem: A file cannot be read.
        """
        facts, opened = self._explainer.window(source, window), self._sources[source]
        # The window's first token is nobody's label: it is there to be read only.
        tokens, weights = facts.tokens, np.zeros(len(facts.tokens), np.uint8)
        opened.read_mask_into(window, weights[1:])
        applied: list[str] = []
        if change is not None:
            tokens, weights, applied = change(tokens, weights)
        moved = tokens is not facts.tokens
        parts = spans(
            tokens,
            weights > 0,
            eod_id,
            self._decode,
            starts=None if moved else [piece.first for piece in facts.pieces],
            by_token=self._asked.by_token,
            whole=self._asked.whole,
        )
        return {
            "source": source,
            "window": window,
            "shard": facts.shard,
            "file": str(facts.bin),
            "bytes": list(facts.byte_range),
            "documents": len(facts.pieces),
            "labels": len(facts.tokens) - 1,
            "labels_with_loss": int(np.count_nonzero(weights)),
            "applied": applied,
            "spans": as_values(parts),
        }


def _ids(tokens: np.ndarray) -> str:
    return "".join(f"{token} " for token in tokens.tolist())


def _text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text, with ids that the tokenizer does not have as `<2050>`: it would pass them over."""
    parts, first = [], 0
    for at in [*np.flatnonzero(tokens >= tokenizer.vocab_size).tolist(), len(tokens)]:
        parts.append(tokenizer.decode(tokens[first:at]) if at > first else "")
        parts.append(f"<{tokens[at]}>" if at < len(tokens) else "")
        first = at + 1
    return "".join(parts)
