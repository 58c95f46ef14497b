"""Level 3 by a model that is asked: a grade for each document, by which it stays or goes; no text is touched.

FineWeb-Edu (Penedo and others 2024, section 3.4) has a large model grade the educational value of a sample from 0 to
5, and trains a small classifier on its grades for the rest. `labels.FIELD` of the records holds them for that:
`davinci data train-classifier --label-field labels.quality --at-least 3`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Asking, AskingParameters, Expected
from megatron_davinci.darwin.prompts import mark_for
from megatron_davinci.darwin.step import Outcome

_GRADE = "[0-5]"


class Rate(Asking):
    """Asks a model for a grade from 0 to 5."""

    name = "rate"
    level = 3
    edits = False
    about = "a model's grade from 0 to 5 of each document's beginning, and who stays by it"
    tasks = frozenset({"rate"})

    class Parameters(AskingParameters):
        """Parameters of `rate`.

        Attributes:
            prompt: `rate_educational`, or a prompt file (`.yaml`).
            field: What the grade is called in the record: `labels.quality`.
            characters: Of a document's beginning that the model is shown.
            least: Lowest grade that stays; None for all.
            on_failure: What becomes of a document without a usable answer: `quarantine` it, or `keep` it.
        """

        prompt: str = "rate_educational"
        field: str = Field(default="quality", pattern="^[a-z][a-z0-9_]*$")
        characters: int = Field(default=6000, gt=0)
        least: int | None = Field(default=None, ge=1, le=5)
        on_failure: str = Field(default="quarantine", pattern="^(keep|quarantine)$")

    parameters: Parameters

    def expected(self, document: Document) -> Iterator[Expected]:
        """One."""
        shown = document.text[: self.parameters.characters]
        mark = mark_for(shown)
        messages = self.prompt.messages(passage=shown, mark=mark)
        yield Expected("rate", messages, shown, 0.0, form=forms.within(mark, _GRADE))

    async def process(self, document: Document) -> Outcome:
        """Ask until there is a grade, note it, compare."""
        given, spent, unused = self.parameters, Counter[str](), Counter[str]()
        shown, result = document.text[: given.characters], ""
        for attempt in range(given.tries):
            said, result = await self.tagged(shown, attempt, spent, _GRADE)
            if said is not None and re.fullmatch(_GRADE, said):
                return self._graded(document, int(said), self._notes(spent), self._counts(spent, unused))
            if said is not None:
                result = "no_grade"
            if result in ("cut_off", "no_tags", "no_grade"):  # else there is no answer
                unused[result] += 1
        notes, counts = self._notes(spent) | {"failed": result}, self._counts(spent, unused)
        if given.on_failure == "quarantine":
            return Outcome(quarantine="not_rated", notes=notes, counts=counts)
        return Outcome(notes=notes, counts=counts)

    def _graded(
        self, document: Document, grade: int, notes: dict[str, Any], counts: dict[str, int]
    ) -> Outcome:
        given = self.parameters
        document.metadata.setdefault("labels", {})[given.field] = str(grade)
        drop = f"low_{given.field}" if given.least is not None and grade < given.least else None
        return Outcome(drop=drop, scores={given.field: float(grade)}, notes=notes, counts=counts)

    def _notes(self, spent: Counter[str]) -> dict[str, Any]:
        return {"prompt": self.prompt.mark, **spent}

    def _counts(self, spent: Counter[str], unused: Counter[str]) -> dict[str, int]:
        return dict(spent) | {f"unused answers/{reason}": count for reason, count in unused.items()}
