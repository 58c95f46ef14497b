"""Level 5: rejection sampling: several answers to a question, of which those are kept that a verifier finds right.

Llama-Nemotron's science and mathematics, MegaMath-QA and MegaScience were made so for daVinci-LLM (arXiv 2603.27164):
original questions, answers that match the ground truth. Numbers of samples, temperature and verifier are not given
there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from datatrove.data import Document
from pydantic import Field, model_validator

from megatron_davinci.darwin.asking import AskingParameters, Expected
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.step import Outcome
from megatron_davinci.darwin.trials import Trying
from megatron_davinci.darwin.verify import equal, final_answer, program_of

RIGHT = "right"
_ANSWER_SHARE = 4.0  # tokens of an answer for one of its question, where none is known; a supposition


class SampleAnswers(Trying):
    """Answers to documents that are questions; the right ones become documents of their own."""

    name = "sample_answers"
    level = 5
    version = 2
    about = "a model answers a question several times; answers that a verifier finds right are kept, the rest counted"
    tasks = frozenset({"answer"})
    asks_all = True

    class Parameters(AskingParameters):
        """Parameters of `sample_answers`.

        Attributes:
            endpoint: The model; its temperature must be above 0 for samples to differ.
            prompt: `answer_mathematics`, `answer_code`, or a prompt file (`.yaml`).
            tries: Answers asked for, of each question.
            verify: `answer` compares the final answer with the reference; `code` runs the program with its tests.
            reference: Field of the record with the right answer, or with tests: lines of Python, a text or a list.
            most_kept: Most right answers of a question that are kept.
            keep_questions: Keep the question beside its answers.
            as_source: Name of the source that answers are written as; None for their question's.
        """

        prompt: str = "answer_mathematics"
        tries: int = Field(default=4, gt=0)
        verify: Literal["answer", "code"] = "answer"
        reference: str = "answer"
        most_kept: int = Field(default=1, gt=0)
        keep_questions: bool = False
        as_source: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

        @model_validator(mode="after")
        def _samples_differ(self) -> SampleAnswers.Parameters:
            if self.tries > 1 and self.endpoint.temperature == 0:
                raise ValueError(
                    f"endpoint.temperature: is 0, so {self.tries} answers would be the same; "
                    "give a temperature, such as 0.7, or tries: 1"
                )
            return self

    parameters: Parameters

    def runs_programs(self) -> bool:
        """By `verify: code`."""
        return self.parameters.verify == "code"

    def expected(self, document: Document) -> Iterator[Expected]:
        """The question, as often as it is asked."""
        if reference_of(document, self.parameters.reference) is not None:
            question = document.text.strip()
            messages = self.prompt.messages(question=question)
            yield Expected("answer", messages, question, _ANSWER_SHARE, times=self.parameters.tries)

    async def process(self, document: Document) -> Outcome:
        """Ask, verify, and make documents of what is right."""
        level = document.metadata["darwin"]["level"]
        reference = reference_of(document, self.parameters.reference)
        if reference is None:
            return Outcome(quarantine="no_reference", level=level, counts={"answers/no_reference": 1})
        spent, results = Counter[str](), Counter[str]()
        tries = range(self.parameters.tries)
        judged = await asyncio.gather(*(self._judged(document, reference, number, spent) for number in tries))
        kept: list[tuple[int, str]] = []
        seen: set[str] = set()
        for number, (text, result) in enumerate(judged):
            if result == RIGHT:
                if text.strip() in seen:
                    result = "repeated"
                elif len(kept) == self.parameters.most_kept:
                    result = "right_and_not_needed"
                else:
                    kept.append((number, text))
                seen.add(text.strip())
            results["accepted" if result == RIGHT else result] += 1
        right = sum(result == RIGHT for _, result in judged)
        counts = {f"answers/{result}": count for result, count in results.items()} | dict(spent)
        notes: dict[str, Any] = {
            "prompt": self.prompt.mark,
            "answers": dict(sorted(results.items())),
            **spent,
        }
        notes |= {"tried": len(judged), "right": right}
        made = [self._document(document, text, number, right) for number, text in kept]
        counts["documents/answered" if made else "documents/not answered"] = 1
        if self.parameters.keep_questions:
            return Outcome(notes=notes, counts=counts, level=level, made=made)
        drop = "turned_into_answers" if made else "no_right_answer"
        return Outcome(drop=drop, notes=notes, counts=counts, level=level, made=made)

    async def _judged(
        self, document: Document, reference: str, number: int, spent: Counter[str]
    ) -> tuple[str, str]:
        """An answer, and `right` or what is wrong with it."""
        try:
            answer = await self.answer(self.prompt.messages(question=document.text.strip()), number, spent)
        except Trouble as trouble:
            return "", trouble.kind
        if answer.finish == "length":
            return answer.text, "cut_off"
        if self.parameters.verify == "answer":
            final = final_answer(answer.text)
            if final is None:
                return answer.text, "no_final_answer"
            return answer.text, RIGHT if equal(final, reference) else "wrong_answer"
        program = program_of(answer.text)
        if program is None:
            return answer.text, "no_program"
        outcome = await self.outcome(program, reference)
        return answer.text, RIGHT if outcome == "passed" else f"program_{outcome}"

    def _document(self, document: Document, text: str, number: int, right: int) -> Document:
        """An answer as a document: `prompt` and `response` are what `davinci data tokenize` masks by."""
        prompt, response = f"Question: {document.text.strip()}\n\nAnswer: ", text.strip()
        notes = {
            "prompt": self.prompt.mark, "verified": self.parameters.verify, "try": number,
            "tried": self.parameters.tries, "right": right,
        }  # fmt: skip
        fields = {"prompt": prompt, "response": response}
        source, kept = self.parameters.as_source, ("licence", "labels", "fields")
        return self.derived(document, f"answer-{number}", prompt + response, notes, source, fields, kept)


def reference_of(document: Document, field: str) -> str | None:
    """What a record says is right: text, a number, or lines of tests; None where it says nothing."""
    value = (document.metadata.get("fields") or {}).get(field)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None
