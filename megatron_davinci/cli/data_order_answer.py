"""The answers of `davinci data order` as plain values: they are its JSON, and what its screen shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_davinci.data.explain import DocumentWindows, Explainer, Piece, WindowFacts, excerpt, find_shard
from megatron_davinci.data.manifest import tokenizer_of
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.sidecar import origins_of
from megatron_davinci.data.source import Source
from megatron_davinci.data.transforms import SampleTransforms, as_seen, stage_transforms
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.train.forecast import Forecast
from megatron_davinci.train.outlook import widened

if TYPE_CHECKING:
    from megatron_davinci.data.tokenizer import Tokenizer

_FIRST, _LAST = 300, 100  # characters of a text that are shown
_FIRST_IDS, _LAST_IDS = 64, 16  # tokens, where there is no text
_BEGINNING = 512  # tokens that a document's beginning takes


class Teller:
    """Answers as plain values, which are the JSON, and which the screen shows.

    Args:
        forecast: The run.
        full_text: Whole texts instead of their ends.
        lineage: Where documents are from, too.
    """

    def __init__(self, forecast: Forecast, full_text: bool = False, lineage: bool = False) -> None:
        self._lineage = lineage
        self._forecast, self._full_text = forecast, full_text
        self._explainer = Explainer(forecast.sources)
        self._tokenizer: Tokenizer | None = None
        if forecast.config.data.tokenizer is not None:
            # Here, since text is all that the tokenizers library is needed for.
            from megatron_davinci.data.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.load(forecast.config.data.tokenizer)
        self._made_by: dict[str, str | None] = {}

    def samples(self, at: int | None, step: int | None, count: int) -> dict[str, Any]:
        """Samples by number, or those of a step.

        Raises:
            ConfigError: The run has no such sample or step.
            DataError: A file is missing or damaged.
            EnvironmentProblem: A file cannot be read.
        """
        forecast = self._forecast
        if at is None:
            first = forecast.first_sample_of(step or 0, "--step")
            count = min(count, forecast.schedule.at(first).batch)
        else:
            forecast.check(at, "--at")
            first = at
        end = min(first + count, forecast.total_samples)
        return {
            "run": self._run(),
            "samples": [self._sample(n) for n in range(first, end)],
            "notes": self._notes(),
        }

    def finding(self, window: str | None, document: str | None, most: int) -> dict[str, Any]:
        """When a window, or the windows of a document, are seen; the first `most` times of all.

        Raises:
            ConfigError: What is asked for is not there.
            DataError: A file is missing or damaged.
            EnvironmentProblem: A file cannot be read.
        """
        if window is not None:
            source, number = _parted(window, "--find", "SOURCE:WINDOW", 1)
            windows, sought = self._window(source, number)
        else:
            source, shard, number = _parted(document or "", "--find-document", "SOURCE:SHARD:DOCUMENT", 2)
            windows, sought = self._document(source, shard, number)
        size = self._forecast.sources[source].num_windows
        taken = self._forecast.curriculum.consumed(self._forecast.total_samples)[source]
        times, seen = self._seen(source, windows, taken, most)
        return {
            "run": self._run(),
            **sought,
            "source": {"name": source, "windows": size, "samples": taken, "epochs": taken / size},
            "times": times,
            "seen": seen,
            "notes": self._notes(),
        }

    # ---- one sample --------------------------------------------------------------------------------------

    def _sample(self, n: int) -> dict[str, Any]:
        forecast = self._forecast
        located = forecast.curriculum.locate(n)
        governing = forecast.governing(n)
        weight = Fraction(governing.record.weights[located.source])
        facts = self._explainer.window(located.source, located.window)
        return {
            **self._when(n),
            "record": {
                "number": governing.number,
                "from": "config" if governing.number is None else "journal",
                "first_sample": governing.record.first_sample,
                "stage": governing.record.stage,
                "weights": dict(governing.record.weights),
                "transforms": dict(governing.record.transforms),
            },
            "source": {
                "name": located.source,
                "share": float(weight),
                "position": forecast.position(n),
                "epoch": located.epoch,
                "windows": forecast.sources[located.source].num_windows,
            },
            "window": self._window_facts(facts),
            "transforms": self._transformed(n, facts),
        }

    @cached_property
    def _transforms(self) -> list[SampleTransforms | None]:
        forecast = self._forecast
        config = widened(forecast.config, [governing.record for governing in forecast.records])
        return stage_transforms(config, forecast.sources)

    def _transformed(self, n: int, facts: WindowFacts) -> dict[str, Any]:
        """What is done to a sample on its way to the model, and what becomes of it."""
        stage = self._forecast.seat(n).plan.stage
        settings, transforms = self._forecast.config.curriculum[stage].transforms, self._transforms[stage]
        source, length = self._forecast.sources[facts.source], len(facts.tokens)
        mask, shown = np.empty(length - 1, np.uint8), {"text": None, "ids": None}
        source.read_mask_into(facts.window, mask)
        seen = as_seen(n, facts.source, facts.window, facts.tokens, mask, transforms, settings, source.eod_id)
        if seen.tokens is not facts.tokens:
            shown = self._text(facts.source, seen.tokens[:length])
        return {
            "applied": seen.applied,
            "tokens_cut": len(seen.tokens) - length,
            "labels_with_loss": int(np.count_nonzero(seen.labels)),
            **shown,
        }

    def _when(self, n: int) -> dict[str, Any]:
        seat, skip = self._forecast.seat(n), self._forecast.skipped(n)
        return {
            "n": n,
            "tokens_before": n * self._forecast.config.data.sequence_length,
            "stage": seat.plan.stage_name,
            "step": seat.plan.step,
            "learning_rate": seat.plan.learning_rate,
            "batch": {"first_sample": seat.plan.first_sample, "size": seat.plan.batch, "row": seat.row},
            "rank": {
                "data_rank": seat.data_rank,
                "micro_batch": seat.micro_batch,
                "row": seat.micro_row,
            },
            "done": self._forecast.is_done(n),
            "left_out": None if skip is None else {"record": skip[0], "reason": skip[1].reason},
        }

    def _window_facts(self, facts: WindowFacts) -> dict[str, Any]:
        return {
            "number": facts.window,
            "shard": facts.shard,
            "shards": self._forecast.sources[facts.source].num_shards,
            "file": str(facts.bin),
            "bytes": list(facts.byte_range),
            "tokens": list(facts.token_range),
            "dtype": facts.tokens.dtype.name,
            "documents": [
                {
                    "number": piece.document.number,
                    "first_token": piece.document.first_token,
                    "tokens": piece.document.tokens,
                    "in_window": [piece.first, piece.end],
                    "begins": self._begins(facts.source, facts.tokens[piece.first : piece.end]),
                    **self._origins(facts, piece),
                }
                for piece in facts.pieces
            ],
            "labels": len(facts.tokens) - 1,
            "labels_with_loss": len(facts.tokens) - 1 if facts.loss_labels is None else facts.loss_labels,
            "has_mask": facts.loss_labels is not None,
            **self._text(facts.source, facts.tokens),
        }

    def _origins(self, facts: WindowFacts, piece: Piece) -> dict[str, Any]:
        """Where a piece of the window is from; None where the source does not know it.

        A sequence that is a group of documents has several, as `origins`.
        """
        if not self._lineage:
            return {}
        if not isinstance(facts.prefix, Path):
            return {"origin": None}
        within = facts.token_range[0] + piece.first - piece.document.first_token
        end = within + piece.end - piece.first
        found = origins_of(facts.prefix, piece.document.number, within, end)
        return {"origin": found[0] if found else None, **({"origins": found} if len(found) > 1 else {})}

    # ---- text --------------------------------------------------------------------------------------------

    def _text(self, source: str, tokens: Any) -> dict[str, Any]:
        """The ends of a text: `text` is None and `ids` is not where there is no tokenizer."""
        if self._tokenizer is None:
            ids = tokens.tolist()
            if not self._full_text and len(ids) > _FIRST_IDS + _LAST_IDS:
                return {"text": None, "ids": {"first": ids[:_FIRST_IDS], "last": ids[-_LAST_IDS:]}}
            return {"text": None, "ids": {"first": ids, "last": []}}
        self._look_up_maker(source)
        text = self._tokenizer.decode(tokens)
        first, last = (text, "") if self._full_text else excerpt(text, _FIRST, _LAST)
        return {"text": {"characters": len(text), "first": first, "last": last}, "ids": None}

    def _begins(self, source: str, tokens: Any) -> str:
        if self._tokenizer is None:
            return " ".join(str(token) for token in tokens[:12].tolist())
        # A token is hardly ever shorter than a character; a cut one at the end is cut off with the rest.
        return self._tokenizer.decode(tokens[:96])[:80]

    def _look_up_maker(self, source: str) -> None:
        """Note which tokenizer made a source, by its manifest."""
        if source in self._made_by:
            return
        data = self._forecast.config.data
        self._made_by[source] = tokenizer_of(place(data.sources[source].path, S3Options(**dict(data.s3))))

    def _notes(self) -> list[str]:
        """What the reader should know of the answer."""
        forecast, notes = self._forecast, []
        if not forecast.journal.records:
            notes.append(
                f"{forecast.config.run.directory} has no journal yet: this is the order that the configuration plans"
            )
        if self._tokenizer is None:
            notes.append("data.tokenizer is not set: tokens are shown by their ids")
        else:
            others = [
                name
                for name, made_by in self._made_by.items()
                if made_by not in (None, self._tokenizer.sha256)
            ]
            if others:
                notes.append(
                    f"{', '.join(others)}: made with another tokenizer than data.tokenizer, so the text may be wrong"
                )
        return notes

    # ---- finding -----------------------------------------------------------------------------------------

    def _window(self, source: str, text: str) -> tuple[Iterable[int], dict[str, Any]]:
        number, windows = _number(text, "--find"), self._source(source, "--find").num_windows
        if number >= windows:
            raise ConfigError(
                f"Source {source} has no such window.",
                where="--find",
                found=f"{number:,}",
                expected=f"0 to {windows - 1:,}",
            )
        facts = self._explainer.window(source, number)
        return (number,), {"sought": "window", "window": self._window_facts(facts), "document": None}

    def _document(self, source: str, shard: str, text: str) -> tuple[Iterable[int], dict[str, Any]]:
        opened = self._source(source, "--find-document")
        number = _number(text, "--find-document")
        found = self._explainer.document(source, find_shard(opened, shard), number)
        document, itemsize = found.document, opened.dtype.itemsize
        begins: dict[str, Any] = {"text": None, "ids": None, "whole": not document.tokens}
        if found.windows:
            tokens = self._tokens_of(opened, found)
            whole = len(tokens) == document.tokens
            begins = {**self._text(source, tokens), "whole": whole}
            if not whole:
                # The last of these tokens is no end of anything.
                part = begins["text"] or begins["ids"]
                part["last"] = type(part["last"])()
        return found.windows, {
            "sought": "document",
            "window": None,
            "document": {
                "number": document.number,
                "documents": len(self._explainer.index(source, found.shard)),
                "shard": found.shard,
                "file": str(opened.shard_place(found.shard)) + ".bin",
                "tokens": [document.first_token, document.end_token],
                "bytes": [document.first_token * itemsize, document.end_token * itemsize],
                "windows": [found.windows.start, found.windows.stop],
                "begins": begins,
            },
        }

    def _tokens_of(self, source: Source, found: DocumentWindows) -> np.ndarray:
        """The tokens of a document that windows have: as many as its beginning takes, or all of them."""
        parts: list[np.ndarray] = []
        most = found.document.tokens if self._full_text else _BEGINNING
        end = found.document.first_token
        for window in found.windows:
            if end - found.document.first_token >= most:
                break
            first, tokens = source.locate(window).token_offset, source.read(window)
            parts.append(tokens[max(0, end - first) : found.document.end_token - first])
            end += len(parts[-1])
        return np.concatenate(parts)

    def _seen(
        self, source: str, windows: Iterable[int], taken: int, most: int
    ) -> tuple[int, list[dict[str, Any]]]:
        """How often windows are seen in the run, and the first `most` times."""
        windows = list(windows)
        full = taken // self._forecast.sources[source].num_windows
        shown: list[dict[str, Any]] = []
        last = sorted(self._found(source, full, windows))
        for epoch in range(full + 1):
            if len(shown) >= most:
                break
            found = last if epoch == full else sorted(self._found(source, epoch, windows))
            shown += [
                {**self._when(n), "epoch": epoch, "window": window}
                for n, window in found[: most - len(shown)]
            ]
        return full * len(windows) + len(last), shown

    def _found(self, source: str, epoch: int, windows: list[int]) -> Iterator[tuple[int, int]]:
        """The samples of the run that are these windows in an epoch, each with its window."""
        for window in windows:
            try:
                n = self._forecast.curriculum.find(source, epoch, window)
            except DataError:
                continue  # the mixture has moved on for good before the source came so far
            if n < self._forecast.total_samples:
                yield n, window

    def _source(self, name: str, where: str) -> Source:
        if name not in self._forecast.sources:
            raise ConfigError(
                "The run has no such source.",
                where=where,
                found=name,
                expected="one of " + ", ".join(self._forecast.sources),
            )
        return self._forecast.sources[name]

    def _run(self) -> dict[str, Any]:
        forecast = self._forecast
        return {
            "directory": str(forecast.config.run.directory),
            "seed": forecast.config.run.seed,
            "sequence_length": forecast.config.data.sequence_length,
            "samples": forecast.total_samples,
            "steps": forecast.schedule.total_steps,
            "journal_records": len(forecast.journal.records),
            "done_samples": forecast.done,
            "layout": str(forecast.layout),
            "layout_from": forecast.layout_from,
        }


def _parted(text: str, where: str, form: str, colons: int) -> list[str]:
    # A source's name may have colons itself, a number has none.
    parts = text.rsplit(":", colons)
    if len(parts) != colons + 1 or not all(parts):
        raise ConfigError("This names nothing to find.", where=where, found=text, expected=form)
    return parts


def _number(text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9][0-9_,]*", text, re.ASCII):
        raise ConfigError("This is no number.", where=where, found=text, expected="0 or more")
    return int(text.replace(",", "").replace("_", ""))
