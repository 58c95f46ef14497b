"""Level 4: faithful refinement by a model, chunk by chunk, through gates; what fails stays as it was.

The report's policy (Data Darwinism, appendix B.3): a chunk without a usable answer keeps its text, and a document
is done when 95% of its chunks are. What it asks of models in words only is checked here (`fidelity`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Asking, AskingParameters, Expected, measure_of
from megatron_davinci.darwin.chunks import Chunk, cut, join
from megatron_davinci.darwin.edits import carried_out, numbered
from megatron_davinci.darwin.fidelity import violations
from megatron_davinci.darwin.prompts import mark_for
from megatron_davinci.darwin.step import Outcome
from megatron_davinci.files import file_digest


class Piece(NamedTuple):
    """What came of a chunk.

    Attributes:
        text: The new text; None where it stays.
        result: `refined`, `completed`, `put_into_context`, `unchanged`, `verbatim`, or why there is no usable answer.
    """

    text: str | None
    result: str


# Tokens of an answer for one of its chunk, where none has been seen: suppositions.
ANSWER_SHARE = {
    "purify": 0.95,
    "reorganise": 0.9,
    "edit": 0.1,
    "complete": 2.0,
    "pairs": 0.5,
    "contextualise": 1.3,
    "quote": 0.05,
}
GOOD = ("refined", "completed", "put_into_context", "unchanged", "verbatim")


class ChunkedParameters(AskingParameters):
    """What steps take that rewrite documents chunk by chunk.

    Attributes:
        chunk: Most that a chunk measures.
        tokenizer: Folder of a tokenizer to measure chunks by, in tokens; without one they are measured in characters.
        pass_share: Least share of a document's chunks with a usable answer; else all of it stays as it was.
        on_failure: What becomes of a document below it: `keep` it at the level that it had, or `quarantine` it.
    """

    chunk: int = Field(gt=0)
    tokenizer: Path | None = None
    pass_share: float = Field(default=0.95, ge=0, le=1)
    on_failure: str = Field(default="keep", pattern="^(keep|quarantine)$")


class Chunked(Asking):
    """Rewrites documents chunk by chunk. Sub-classes write `judge`.

    Attributes:
        done: What a chunk is called that has been rewritten.
    """

    parameters: ChunkedParameters
    done: ClassVar[str] = "refined"

    def files(self) -> dict[str, Any]:
        """Also the tokenizer's digest."""
        folder = self.parameters.tokenizer
        return super().files() | (
            {} if folder is None else {"tokenizer_sha256": file_digest(folder / "tokenizer.json")}
        )

    def undecided(self) -> set[str]:
        """Also where the tokenizer lies, whose digest stands for it."""
        return super().undecided() | {"tokenizer"}

    def whereabouts(self) -> dict[str, Any]:
        """Also the tokenizer."""
        folder = self.parameters.tokenizer
        return super().whereabouts() | ({} if folder is None else {"tokenizer": str(folder.absolute())})

    def check(self) -> None:
        """Also the tokenizer."""
        super().check()
        measure_of(self.parameters.tokenizer)

    def _begin(self, asks: bool) -> None:
        self._measure = measure_of(self.parameters.tokenizer)
        super()._begin(asks)

    def judge(self, document: Document, source: str, answer: str) -> list[str]:
        """Gates that an answer does not pass."""
        raise NotImplementedError

    def slots(self, document: Document) -> dict[str, str]:
        """What else stands in the prompt."""
        return {}

    def shown(self, source: str) -> str:
        """What of a chunk stands in the prompt."""
        return source

    def form(self, document: Document, source: str) -> str:
        """What an answer about a chunk looks like, as a regular expression."""
        return forms.ANY

    def understood(self, document: Document, source: str, answer: str) -> str | None:
        """The new text that an answer means; None where it means none."""
        return answer

    def expected(self, document: Document) -> Iterator[Expected]:
        """One for each chunk that is not left as it is."""
        task, slots = self.prompt.task, self.slots(document)
        for chunk in cut(document.text, self.parameters.chunk, measure_of(self.parameters.tokenizer)):
            if not chunk.verbatim:
                shown = self.shown(chunk.text)
                mark = mark_for(shown, *slots.values())
                messages = self.prompt.messages(passage=shown, mark=mark, **slots)
                form = forms.within(mark, self.form(document, chunk.text))
                yield Expected(task, messages, chunk.text, ANSWER_SHARE[task], form=form)

    async def process(self, document: Document) -> Outcome:
        """Cut, ask about each chunk, put together; or leave all as it was."""
        chunks = cut(document.text, self.parameters.chunk, self._measure)
        spent, unused = Counter[str](), Counter[str]()
        pieces = await asyncio.gather(*(self._rewrite(document, chunk, spent, unused) for chunk in chunks))
        results = Counter(piece.result for piece in pieces)
        failed = {result: count for result, count in results.items() if result not in GOOD}
        notes: dict[str, Any] = {"prompt": self.prompt.mark, "chunks": dict(sorted(results.items())), **spent}
        counts = {f"chunks/{result}": count for result, count in results.items()} | dict(spent)
        counts |= {f"unused answers/{reason}": count for reason, count in unused.items()}
        if sum(failed.values()) > (1 - self.parameters.pass_share) * len(chunks) + 1e-9:
            if self.parameters.on_failure == "quarantine":
                return Outcome(quarantine="failed_chunks", notes=notes, counts=counts)
            counts["documents/kept as they were"] = 1
            return Outcome(notes=notes, counts=counts, level=document.metadata["darwin"]["level"])
        counts["documents/done"] = 1
        text = join(chunks, [piece.text for piece in pieces])
        if not text.strip() and document.text.strip():
            return Outcome(drop="nothing_left", notes=notes, counts=counts)
        return Outcome(text=text, notes=notes, counts=counts)

    async def _rewrite(
        self, document: Document, chunk: Chunk, spent: Counter[str], unused: Counter[str]
    ) -> Piece:
        if chunk.verbatim:
            return Piece(None, "verbatim")
        result, slots, form = "", self.slots(document), self.form(document, chunk.text)
        for attempt in range(self.parameters.tries):
            answer, result = await self.tagged(self.shown(chunk.text), attempt, spent, form, **slots)
            if answer is None:
                if result in ("cut_off", "no_tags"):  # else there is no answer
                    unused[result] += 1
                continue
            text = self.understood(document, chunk.text, answer)
            if text is None:
                result = "no_program"
                unused[result] += 1
                continue
            broken = self.judge(document, chunk.text, text)
            if not broken:
                return Piece(None, "unchanged") if text == chunk.text else Piece(text, self.done)
            result = broken[0]
            unused[result] += 1
        return Piece(None, result)


class Refine(Chunked):
    """Level 4 by a model."""

    name = "refine"
    level = 4
    version = 2
    about = "a model cleans or reorganises, chunk by chunk; what adds or loses something is not used"
    tasks = frozenset({"purify", "reorganise", "edit"})

    class Parameters(ChunkedParameters):
        """Parameters of `refine`.

        Attributes:
            prompt: `purify_*`, `reorganise_*` or `edit_lines`, or a prompt file (`.yaml`).
            chunk: Most characters of a chunk, or tokens with `tokenizer`.
        """

        prompt: str = "purify_general"
        chunk: int = Field(default=1024, gt=0)

    parameters: Parameters

    def shown(self, source: str) -> str:
        """With numbers before the lines, where the answer is a program."""
        return numbered(source) if self.prompt.task == "edit" else source

    def form(self, document: Document, source: str) -> str:
        """Of a program, lines that there are."""
        return forms.edits(source.count("\n") + 1) if self.prompt.task == "edit" else forms.ANY

    def understood(self, document: Document, source: str, answer: str) -> str | None:
        """What the program makes of the chunk, where the answer is one."""
        return carried_out(source, answer) if self.prompt.task == "edit" else answer

    def judge(self, document: Document, source: str, answer: str) -> list[str]:
        """The gates of fidelity."""
        return violations(source, answer, "purify" if self.prompt.task == "edit" else self.prompt.task)
