"""What a step of the catalogue is: a function of one document's text, with a level, a version and typed parameters.

A step that must see all documents at once (deduplication) is a `GlobalStep`: it sketches each document, then one task
looks at all sketches and says which documents go, and the next pass over the documents drops them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from datatrove.data import Document

from megatron_davinci.config.section import Section
from megatron_davinci.darwin.provenance import Entry, parameters_hash

Scores = dict[str, float]


class StepParameters(Section):
    """What every step takes.

    Attributes:
        sources: Names of the sources that the step looks at; None for all. Others pass by untouched.
    """

    sources: list[str] | None = None


class Outcome(NamedTuple):
    """What a step says of one document.

    Attributes:
        text: The new text; None where it stays.
        drop: Why the document is dropped: one of few fixed words, which are counted.
        quarantine: Why it cannot be processed, likewise.
        scores: Numbers that the step measured, which the report draws.
        notes: What else a reader of the document's history should know.
        counts: What the step counts over documents; the report shows the sums.
        level: That the operation raises the document to, where it is not the step's.
        made: Documents that the step made of this one, which follow it.
    """

    text: str | None = None
    drop: str | None = None
    quarantine: str | None = None
    scores: Scores | None = None
    notes: dict[str, Any] | None = None
    counts: dict[str, int] | None = None
    level: int | None = None
    made: list[Document] | None = None


KEEP = Outcome()


class Step:
    """A step. Sub-classes set the class attributes and write `apply`.

    Args:
        parameters: Of the class's own `Parameters`.
        base: The folder that paths count from which a parameter may hold beside other words.

    Attributes:
        name: What recipes call it.
        level: Of Data Darwinism, 0 to 9.
        version: Raised whenever the same parameters would give another result.
        edits: Whether it changes text. Steps of level 3 never do, which is checked by hash.
        about: One line for the catalogue.
    """

    name: ClassVar[str]
    level: ClassVar[int]
    version: ClassVar[int] = 1
    edits: ClassVar[bool] = False
    about: ClassVar[str]
    Parameters: ClassVar[type[StepParameters]] = StepParameters

    def __init__(self, parameters: StepParameters, base: Path = Path()) -> None:
        self.parameters, self.base = parameters, base

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The parameters that decide what the step does to a document."""
        return self.parameters.model_dump(mode="json", exclude=self.undecided()) | self.files()

    def undecided(self) -> set[str]:
        """Parameters that do not decide what the step does to a document."""
        return {"sources"}

    def whereabouts(self) -> dict[str, Any]:
        """What decides nothing, and is needed to tell a document's life again."""
        return {}

    @classmethod
    def restored(cls, settings: dict[str, Any], whereabouts: dict[str, Any]) -> Step:
        """The step that a corpus's manifest describes."""
        return cls(cls.Parameters.model_validate(settings))

    @cached_property
    def hash(self) -> str:
        """Names the step with all its parameters."""
        return parameters_hash(self.name, self.version, self.settings)

    @cached_property
    def model(self) -> str | None:
        """The model that the step asks, with its version; None for a rule."""
        return self.find_model()

    def find_model(self) -> str | None:
        """What `model` is."""
        return None

    def check(self) -> None:
        """Look at what the parameters name, before anything starts.

        Raises:
            DavinciError: It is not there, or not what the step can use.
        """

    def files(self) -> dict[str, Any]:
        """Digests of the files that the step reads, so that another content is another operation."""
        return {}

    def open(self) -> None:
        """Load what is dear to load; called once in each process before the first document."""

    def close(self) -> None:
        """Let go of it."""

    def apply(self, document: Document) -> Outcome:
        """Look at one document."""
        raise NotImplementedError

    def replay(self, document: Document) -> Outcome:
        """Do again what was done, to tell a document's life."""
        self.open()
        try:
            return self.apply(document)
        finally:
            self.close()

    def repeat(self, document: Document, entry: Entry) -> Outcome:
        """Do again what was done, where the entry of the document's history is needed for that."""
        return self.replay(document)


class Verdict(NamedTuple):
    """What a global step has found of a document, for which it drops the document or carries something out on it.

    Attributes:
        place: Of the document among those that its task sketched.
        reason: As in `Outcome.drop`.
        notes: For its history.
    """

    place: int
    reason: str
    notes: dict[str, Any]


class GlobalStep(Step):
    """A step that needs all documents: `sketch` each, `solve` all, carry out what `solve` says; most drop documents.

    `sketch` and `finish` are called in one process for each task; `solve` in one process when all tasks are done. The
    order of tasks and documents is that of the recipe's sources and their files, whatever the number of tasks, so a
    rule that keeps the first of several is one about the recipe.
    """

    quarantines: ClassVar[bool] = False

    def begin(self, folder: Path, task: int) -> None:
        """Begin the sketches of a task."""
        raise NotImplementedError

    def sketch(self, document: Document) -> None:
        """Take a document's sketch, if the step looks at its source; called for every document in turn."""
        raise NotImplementedError

    def skip(self) -> None:
        """A document that the step does not look at; it counts, for the index."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write the sketches, whole or not at all."""
        raise NotImplementedError

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """For each task, which of its documents go."""
        raise NotImplementedError

    def carry_out(self, document: Document, reason: str, notes: dict[str, Any]) -> Outcome:
        """What becomes of a document of which there is a verdict: it goes."""
        if self.quarantines:
            return Outcome(quarantine=reason, notes=notes)
        return Outcome(drop=reason, notes=notes)
