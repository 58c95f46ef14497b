"""Level 6: a document is made to stand alone, with what related documents of the corpus say, cited.

The report names the level and leaves it open; this is our reading of it. `relate` finds the passages. A model writes
the document anew with what a reader would miss, or only says which sentences to quote before it (as `edit_lines` does
for level 4): a small model can do that, and what it quotes is copied here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Expected
from megatron_davinci.darwin.context_gates import (
    CITATION,
    context_violations,
    sentence_counts,
    sentences_of,
    with_quotations,
)
from megatron_davinci.darwin.refine import Chunked, ChunkedParameters
from megatron_davinci.darwin.step import Outcome

_SUPPOSED = [{"id": "", "text": "." * 800}] * 3


class Contextualise(Chunked):
    """Level 6 by a model."""

    name = "contextualise"
    level = 6
    version = 4
    about = (
        "a model adds what a reader would miss out of related documents; every addition is cited and backed"
    )
    tasks = frozenset({"contextualise", "quote"})
    done = "put_into_context"

    class Parameters(ChunkedParameters):
        """Parameters of `contextualise`.

        Attributes:
            prompt: `contextualise` or `quote_related`, or a prompt file (`.yaml`).
            chunk: Most characters of a chunk, or tokens with `tokenizer`.
            may_decline: Whether a model that chooses sentences may say that none helps; else `relate` alone decides
                what is related, and the model which of it is quoted.
        """

        prompt: str = "contextualise"
        chunk: int = Field(default=4096, gt=0)
        may_decline: bool = True

    parameters: Parameters

    def slots(self, document: Document) -> dict[str, str]:
        """The passages that may be cited, numbered; their sentences too, where sentences are chosen."""
        texts = _texts(document)
        if self.prompt.task == "quote":
            return {"related": sentences_of(texts)}
        return {"related": "\n\n".join(f"[[{n}]] {text}" for n, text in enumerate(texts, start=1))}

    def form(self, document: Document, source: str) -> str:
        """Where sentences are chosen, sentences that there are."""
        if self.prompt.task != "quote":
            return forms.ANY
        return forms.quotes(sentence_counts(_texts(document)), self.parameters.may_decline)

    def understood(self, document: Document, source: str, answer: str) -> str | None:
        """The text; where sentences are chosen, with those before it."""
        if self.prompt.task != "quote":
            return answer
        text = with_quotations(source, answer, _texts(document))
        declined = text == source and not self.parameters.may_decline
        return None if declined and any(sentence_counts(_texts(document))) else text

    def judge(self, document: Document, source: str, answer: str) -> list[str]:
        """The gates of context."""
        return context_violations(source, answer, _texts(document))

    def expected(self, document: Document) -> Iterator[Expected]:
        """As many related passages as `relate` finds by default, where it has not looked yet."""
        if document.metadata.get("related"):
            yield from super().expected(document)
            return
        supposed = Document(document.text, document.id, metadata={**document.metadata, "related": _SUPPOSED})
        yield from (question._replace(supposed=True) for question in super().expected(supposed))

    async def process(self, document: Document) -> Outcome:
        """Put into context, and name what is cited by its identifier; without anything related, leave it."""
        level = document.metadata["darwin"]["level"]
        if not document.metadata.get("related"):
            return Outcome(counts={"documents/nothing related": 1}, level=level)
        outcome = await super().process(document)
        if outcome.text is None or outcome.text == document.text:
            return outcome if outcome.quarantine or outcome.drop else outcome._replace(level=level)
        names = [each["id"] for each in document.metadata["related"]]
        cited = Counter(names[int(number) - 1] for number in CITATION.findall(outcome.text))
        text = CITATION.sub(
            lambda found: f"{found[0].partition('[[')[0]}[[{names[int(found[1]) - 1]}]]", outcome.text
        )
        notes: dict[str, Any] = {**(outcome.notes or {}), "cites": dict(sorted(cited.items()))}
        counts = {**(outcome.counts or {}), "citations/made": sum(cited.values())}
        return outcome._replace(text=text, notes=notes, counts=counts)


def _texts(document: Document) -> list[str]:
    return [each["text"] for each in document.metadata.get("related", [])]
