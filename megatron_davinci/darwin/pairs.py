"""Level 5: questions with answers out of passages, a discipline a prompt, and none that does not pass two gates."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Asking, Expected
from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.pair_gates import Pair, faults, parsed
from megatron_davinci.darwin.prompts import Prompt, load_prompt, mark_for
from megatron_davinci.darwin.refine import Chunked, ChunkedParameters
from megatron_davinci.darwin.step import Outcome

_PAIRS = 3.0  # of a passage, that reach the judges; a supposition


class Accepted(NamedTuple):
    """A pair that passed.

    Attributes:
        pair: The pair.
        chunk: The number of its passage in the document.
    """

    pair: Pair
    chunk: int


class WritePairs(Chunked):
    """Questions with answers, as documents of their own that follow the one that they are from."""

    name = "write_pairs"
    level = 5
    version = 2
    about = "a model writes questions with answers; each stands alone and is backed by a quotation, or is not written"
    tasks = frozenset({"pairs"})

    class Parameters(ChunkedParameters):
        """Parameters of `write_pairs`.

        Attributes:
            prompt: `pairs_*`, one for each discipline, or a prompt file (`.yaml`).
            tries: Most answers to one question that are looked at; each further one has another seed.
            chunk: Most characters of a passage, or tokens with `tokenizer`.
            tokenizer: Folder of a tokenizer to measure passages by.
            pass_share: Least share of passages with an answer that can be read.
            judge: Ask the model too whether each question stands alone and its passage supports the answer.
            keep_passages: Keep the document beside its pairs.
            as_source: Name of the source that pairs are written as; None for their document's.
        """

        prompt: str = "pairs_other_stem"
        chunk: int = Field(default=4096, gt=0)
        judge: bool = False
        keep_passages: bool = False
        as_source: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    parameters: Parameters
    _judges: tuple[Prompt, Prompt] | None = None

    def files(self) -> dict[str, Any]:
        """Also the judges' prompts, if they are asked."""
        judges = {"judges": [judge.described for judge in self.judges]} if self.parameters.judge else {}
        return super().files() | judges

    @property
    def judges(self) -> tuple[Prompt, Prompt]:
        """The prompts of the two judges."""
        if self._judges is None:
            one, other = (
                load_prompt(name, Path(), frozenset({name})) for name in ("judge_alone", "judge_support")
            )
            self._judges = (one, other)
        return self._judges

    @classmethod
    def restored(cls, settings: dict[str, Any], whereabouts: dict[str, Any]) -> Asking:
        """Also with the judges' prompts of then."""
        step = super().restored(settings, whereabouts)
        if isinstance(step, WritePairs) and "judges" in settings:
            one, other = (Prompt(**described) for described in settings["judges"])
            step._judges = (one, other)
        return step

    def expected(self, document: Document) -> Iterator[Expected]:
        """Also the judges, of as many pairs as passages are taken to give."""
        for question in super().expected(document):
            yield question._replace(form=forms.PAIRS)
            if self.parameters.judge:
                said = {"question": "?" * 150, "answer": "." * 300}
                for judge in self.judges:
                    slots = {"passage": question.passage, "mark": "passage", **said}
                    messages = judge.messages(**slots)
                    yield Expected(judge.task, messages, "x", 1.0, times=_PAIRS, supposed=True)

    async def process(self, document: Document) -> Outcome:
        """Ask about each passage, and make documents of the pairs that pass."""
        chunks = cut(document.text, self.parameters.chunk, self._measure)
        spent, results = Counter[str](), Counter[str]()
        found = await asyncio.gather(
            *(self._pairs(number, chunk.text, spent, results) for number, chunk in enumerate(chunks))
        )
        accepted = [each for row in found for each in row or []]
        unread = sum(row is None for row in found)
        counts = {f"pairs/{result}": count for result, count in results.items()} | dict(spent)
        notes: dict[str, Any] = {"prompt": self.prompt.mark, "pairs": dict(sorted(results.items())), **spent}
        if unread > (1 - self.parameters.pass_share) * len(chunks) + 1e-9:
            if self.parameters.on_failure == "quarantine":
                return Outcome(quarantine="failed_passages", notes=notes, counts=counts)
            counts["documents/kept as they were"] = 1
            return Outcome(notes=notes, counts=counts, level=document.metadata["darwin"]["level"])
        counts["documents/done"] = 1
        made = [self._document(document, each, number) for number, each in enumerate(accepted)]
        level = document.metadata["darwin"]["level"]
        if self.parameters.keep_passages:
            return Outcome(notes=notes, counts=counts, level=level, made=made)
        drop = "turned_into_pairs" if made else "no_pairs"
        return Outcome(drop=drop, notes=notes, counts=counts, level=level, made=made)

    async def _pairs(
        self, number: int, passage: str, spent: Counter[str], results: Counter[str]
    ) -> list[Accepted] | None:
        """What passes of a passage's pairs; None where no answer could be read."""
        if not passage:
            return []
        why = ""
        for attempt in range(self.parameters.tries):
            try:
                messages = self.prompt.messages(passage=passage, mark=mark_for(passage))
                answer = await self.answer(messages, attempt, spent, forms.PAIRS)
            except Trouble as trouble:
                why = trouble.kind
                continue
            pairs, malformed = parsed(answer.text)
            if answer.finish != "length" and (pairs or not malformed):
                break
            why = "cut_off" if answer.finish == "length" else "malformed"
        else:
            results[why] += 1
            return None
        if malformed:
            results["malformed"] += malformed
        accepted = []
        for pair in pairs:
            broken = faults(pair, passage) or await self._judged(pair, passage, spent)
            results[broken[0] if broken else "accepted"] += 1
            if not broken:
                accepted.append(Accepted(pair, number))
        return accepted

    async def _judged(self, pair: Pair, passage: str, spent: Counter[str]) -> list[str]:
        """What the judges refuse; an answer that is no YES refuses too."""
        if not self.parameters.judge:
            return []
        asked = [
            ("judged_not_alone", self.judges[0].messages(question=pair.question)),
            ("judged_not_supported", self.judges[1].messages(
                passage=passage, mark=mark_for(passage, pair.question, pair.answer),
                question=pair.question, answer=pair.answer)),
        ]  # fmt: skip
        for name, messages in asked:
            try:
                said = (await self.answer(messages, 0, spent, forms.YES_OR_NO)).text
            except Trouble as trouble:
                return [f"judge_{trouble.kind}"]
            if (said.strip().upper().split() or [""])[-1].strip(".!*\"'") != "YES":
                return [name]
        return []

    def _document(self, document: Document, accepted: Accepted, number: int) -> Document:
        """A pair as a document: `prompt` and `response` are what `davinci data tokenize` masks by."""
        pair = accepted.pair
        prompt, response = f"Question: {pair.question}\n\nAnswer: ", pair.answer
        notes = {"prompt": self.prompt.mark, "passage": accepted.chunk, "evidence": pair.evidence}
        fields = {"prompt": prompt, "response": response}
        source = self.parameters.as_source
        return self.derived(document, f"pair-{number}", prompt + response, notes, source, fields)
