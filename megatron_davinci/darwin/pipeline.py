"""Our steps as pipeline steps of datatrove, whose executors run them: read, apply, sketch, drop, write.

A document that a step turns away stays in the stream with its fate, past the steps that follow, so that one writer at
the end sees every document that was read, and puts each where it belongs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from megatron_davinci.darwin import acquire, provenance
from megatron_davinci.darwin.asking import StreamStep
from megatron_davinci.darwin.formats import ExtractLatex, ExtractNotebook, ExtractPdf, ExtractThread
from megatron_davinci.darwin.inventory import InputFile
from megatron_davinci.darwin.parts import Parts, read_part
from megatron_davinci.darwin.provenance import DROPPED, QUARANTINED, fate_of
from megatron_davinci.darwin.recipe import SourceRecipe
from megatron_davinci.darwin.scanned import OcrPdf
from megatron_davinci.darwin.step import KEEP, GlobalStep, Outcome, Step
from megatron_davinci.darwin.tally import Tally
from megatron_davinci.errors import DataError
from megatron_davinci.files import write_json

logger.disable("datatrove")  # it says each file and task on standard error; ours is a bar, counts and errors

# The steps that make text of a format, the one to name first.
EXTRACTORS = {
    each.format: (each.name,) for each in (ExtractPdf, ExtractNotebook, ExtractLatex, ExtractThread)
} | {OcrPdf.format: (ExtractPdf.name, OcrPdf.name)}
SELECTION = 3  # the level whose steps leave text as it is


class Shared:
    """What the steps of one task count together: the executor copies a pipeline as a whole for each task."""

    def __init__(self) -> None:
        self.tally = Tally()


class Acquire(PipelineStep):
    """Documents of a task's files."""

    name = "acquire"
    type = "READER"

    def __init__(
        self,
        shared: Shared,
        files: list[InputFile],
        deal: list[int],
        sources: list[SourceRecipe],
        limit: int,
        steps: list[Step],
    ) -> None:
        super().__init__()
        self.shared, self.files, self.deal, self.limit, self.steps = shared, files, deal, limit, steps
        self.sources = {source.name: source for source in sources}

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read every file of the task; what cannot be read is a document with its fate."""
        for file in self.files[self.deal[rank] : self.deal[rank + 1]]:
            source = self.sources[file.source]
            hash_ = acquire_hash(source, self.limit)
            for raw in acquire.read_file(file, source, self.limit):
                if raw.fault is None and (
                    wanted := missing_extractor(raw.origin["format"], file.source, self.steps)
                ):
                    said = f"the recipe has no step {wanted} for it"
                    raw = raw._replace(text="", fault="not_extracted", said=said)
                self.shared.tally.read(file.source, len(raw.text))
                yield first_document(raw, source, hash_)


def missing_extractor(format_: str, source: str, steps: list[Step]) -> str | None:
    """The step that a document of a format needs to be text, where a recipe lacks it; None if all is well."""
    wanted = EXTRACTORS.get(format_, ())
    for step in steps:
        if step.name in wanted and (step.parameters.sources is None or source in step.parameters.sources):
            return None
    return wanted[0] if wanted else None


def acquire_hash(source: SourceRecipe, limit: int) -> str:
    """Names the acquisition of a source with its parameters."""
    return provenance.parameters_hash("acquire", acquire.VERSION, acquire_settings(source, limit))


def acquire_settings(source: SourceRecipe, limit: int) -> dict[str, Any]:
    """What of a recipe decides what is read out of a file."""
    fields = {"format", "licence", "text_field", "id_field", "licence_field"}
    return {"source": source.name, **source.model_dump(mode="json", include=fields), "document_bytes": limit}


def first_document(raw: acquire.Raw, source: SourceRecipe, hash_: str) -> Document:
    """The document at level 0, with its first operation; turned away if there was a fault."""
    document = provenance.begin(
        raw.text,
        f"{source.name}/{raw.name}",
        source.name,
        raw.licence or source.licence,
        raw.origin,
        raw.fields,
    )
    entry: dict[str, Any] = {"name": "acquire", "level": 0, "version": acquire.VERSION, "parameters": hash_}
    if raw.fault:
        entry |= {"result": QUARANTINED, "reason": raw.fault, "notes": {"said": raw.said}}
        provenance.turn_away(document, QUARANTINED, "acquire", raw.fault)
    else:
        entry |= {"result": "read", "sha": provenance.text_hash(raw.text), "characters": len(raw.text)}
        if raw.encoding not in (None, "utf-8", "bytes"):
            entry["notes"] = {"encoding": raw.encoding}
    provenance.append(document, entry)
    return document


class ReadParts(PipelineStep):
    """Documents that the pass before has kept, without those that a global step says go."""

    name = "read"
    type = "READER"

    def __init__(self, shared: Shared, documents: Path, step: GlobalStep, verdicts: Path) -> None:
        super().__init__()
        self.shared, self.documents, self.step, self.verdicts = shared, documents, step, verdicts

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read the task's file and turn away what the verdicts name."""
        goes = {verdict["place"]: verdict for verdict in read_part(self.verdicts / f"{rank:05d}.jsonl")}
        path = self.documents / f"{rank:05d}.jsonl.zst"
        for index, record in enumerate(read_part(path) if path.exists() else ()):
            document = provenance.from_record(record)
            if looks_at(self.step, document):
                verdict = goes.get(index)
                outcome = (
                    self.step.carry_out(document, verdict["reason"], verdict["notes"]) if verdict else KEEP
                )
                if outcome.counts:
                    self.shared.tally.counted(self.step.name, outcome.counts)
                note(self.step, document, outcome)
            yield document


def looks_at(step: Step, document: Document) -> bool:
    """Whether a step looks at a document: one that is still in, of a source that the step is for."""
    chosen = step.parameters.sources
    if step.edits and "prompt" in document.metadata:
        return False  # a question with its answer: its text is both, and would no longer be
    return fate_of(document) is None and (chosen is None or document.metadata["source"] in chosen)


def note(step: Step, document: Document, outcome: Outcome) -> None:
    """Carry out what a step said of a document, and write it into its history.

    Raises:
        DataError: A step of selection changed a text.
    """
    entry: dict[str, Any] = {
        "name": step.name, "level": step.level, "version": step.version, "parameters": step.hash
    }  # fmt: skip
    if step.model is not None:
        entry["model"] = step.model
    if outcome.scores:
        entry["scores"] = outcome.scores
    if outcome.notes:
        entry["notes"] = outcome.notes
    if outcome.level is not None:
        entry["level"] = outcome.level
    kind, reason = (QUARANTINED, outcome.quarantine) if outcome.quarantine else (DROPPED, outcome.drop)
    if reason:
        entry |= {"result": kind, "reason": reason}
        provenance.turn_away(document, kind, step.name, reason)
    elif outcome.text is not None and outcome.text != document.text:
        if not step.edits:
            raise DataError(
                f"The step {step.name!r} changed a text, and may not.",
                where=document.id,
                expected="the same text",
                do="a step that edits says so by `edits`, and is not one of selection",
            )
        entry |= {
            "result": "changed",
            "sha": provenance.text_hash(outcome.text),
            "characters": len(outcome.text),
        }
        document.text = outcome.text
    else:
        entry["result"] = "kept"
    provenance.append(document, entry)


class Apply(PipelineStep):
    """One step of the catalogue on every document that is still in."""

    type = "STEP"

    def __init__(self, shared: Shared, step: Step, told: Path, place: int) -> None:
        self.name = step.name
        super().__init__()
        self.shared, self.step, self.told, self.place = shared, step, told, place

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Apply."""
        step, tally = self.step, self.shared.tally
        if isinstance(step, StreamStep):
            step.told = self.told / f"{rank:05d}-{self.place:02d}.json"
        step.open()
        try:
            for document, outcome in self._outcomes(data):
                if outcome is None:
                    yield document
                    continue
                if step.level == SELECTION:
                    _assert_untouched(step, document)
                made = outcome.made or []
                note(step, document, outcome)
                if outcome.scores:
                    tally.scored(step.name, outcome.scores, fate_of(document) is not None)
                tally.counted(step.name, outcome.counts or {})
                yield document
                for each in made:
                    tally.derived(step.name, each)
                    yield each
        finally:
            if isinstance(step, StreamStep):
                tally.requested(step.name, step.requests())
            step.close()

    def _outcomes(self, data: DocumentsPipeline) -> Iterator[tuple[Document, Outcome | None]]:
        """Every document with what the step says of it; the time that the step takes is counted."""
        step, seconds, clock = self.step, self.shared.tally.seconds, time.perf_counter
        if isinstance(step, StreamStep):
            began = clock()
            for pair in step.apply_all(data, lambda document: looks_at(step, document)):
                seconds[step.name] += clock() - began
                yield pair
                began = clock()
            return
        for document in data:
            outcome = None
            if looks_at(step, document):
                began = clock()
                outcome = step.apply(document)
                seconds[step.name] += clock() - began
            yield document, outcome


def _assert_untouched(step: Step, document: Document) -> None:
    """Compare the text with the hash that the last operation that changed it wrote down.

    Raises:
        DataError: It is another.
    """
    last = next(entry for entry in reversed(document.metadata["darwin"]["operations"]) if "sha" in entry)
    if provenance.text_hash(document.text) != last["sha"]:
        raise DataError(
            f"Selection by {step.name!r} did not leave a text as it was.",
            where=document.id,
            expected=f"the text of hash {last['sha']}, as {last['name']} left it",
        )


class Sketch(PipelineStep):
    """The sketches of a global step, of every document that goes on to it."""

    type = "SKETCH"

    def __init__(self, shared: Shared, step: GlobalStep, folder: Path) -> None:
        self.name = step.name
        super().__init__()
        self.shared, self.step, self.folder = shared, step, folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Sketch what passes."""
        step, clock, spent = self.step, time.perf_counter, 0.0
        step.open()
        step.begin(self.folder, rank)
        for document in data:
            if looks_at(step, document):
                began = clock()
                step.sketch(document)
                spent += clock() - began
            elif fate_of(document) is None:
                step.skip()
            yield document
        step.finish()
        self.shared.tally.seconds[step.name] += spent


class Solve(PipelineStep):
    """The verdicts of a global step, for every task."""

    type = "SOLVE"

    def __init__(self, step: GlobalStep, folder: Path, verdicts: Path, tasks: int) -> None:
        self.name = step.name
        super().__init__()
        self.step, self.folder, self.verdicts, self.tasks = step, folder, verdicts, tasks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write a file of verdicts for each task; empty where nothing goes."""
        with Parts() as parts:
            for task, verdicts in self.step.solve(self.folder, range(self.tasks)):
                path = self.verdicts / f"{task:05d}.jsonl"
                parts.open(path)
                for verdict in verdicts:
                    parts.write(path, verdict._asdict())
        return
        yield


class WriteParts(PipelineStep):
    """What a pass leaves: kept documents, dropped ones, quarantined ones, counts; all of a task or nothing."""

    name = "write"
    type = "WRITER"

    def __init__(
        self, shared: Shared, out: Path, number: int, last: str | None, tokenizer: Path | None, work: Path
    ) -> None:
        super().__init__()
        self.shared, self.out, self.number, self.last, self.work = shared, out, number, last, work
        self.tokenizer = tokenizer

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write every document where it belongs."""
        tally, count = self.shared.tally, token_counter(self.tokenizer) if self.last else None
        entered = 0
        self._forget(rank)
        aside = f"{self.number:02d}-{rank:05d}.jsonl.zst"
        with Parts() as parts:
            for document in data:
                entered += 1
                fate = fate_of(document)
                tokens = count(document.text) if count is not None and fate is None else None
                what = tally.written(document, self.last is not None, tokens)
                record = provenance.to_record(document)
                if what == QUARANTINED:
                    parts.write(self.out / "quarantine" / aside, record)
                elif what == DROPPED:
                    parts.write(self.out / "dropped" / aside, record)
                elif self.last:
                    folder = self.out / "documents" / document.metadata["source"]
                    parts.write(folder / f"{rank:05d}.{self.last}", record)
                else:
                    parts.write(self.work / "documents" / f"{rank:05d}.jsonl.zst", record)
        write_json(self.work / "counts" / f"{rank:05d}.json", tally.dump() | {"entered": entered})
        return
        yield

    def _forget(self, rank: int) -> None:
        """Do away with what an attempt that did not finish may have left; this one may put a document elsewhere."""
        for pattern in (
            f"quarantine/{self.number:02d}-{rank:05d}.*",
            f"dropped/{self.number:02d}-{rank:05d}.*",
        ):
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        if self.last:
            for path in self.out.glob(f"documents/*/{rank:05d}.*"):
                path.unlink(missing_ok=True)


def token_counter(folder: Path | None) -> Any:
    """Counts the tokens of a text by the tokenizer in a folder; None for no folder."""
    if folder is None:
        return None
    from megatron_davinci.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return lambda text: len(tokenizer.encode_batch([text])[0])
