"""Level 1: PDF files whose pages are pictures, read by a model that sees; pages with a text layer keep it.

Pages are drawn by PDFium in a process of its own, which is killed when it does not come back. A picture goes to the
model as a PNG within the message, as OpenAI's API has it and vLLM and SGLang take it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Asking, AskingParameters, Expected, between
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.extraction import Sandbox, guarded
from megatron_davinci.darwin.formats import layer_of
from megatron_davinci.darwin.step import KEEP, Outcome

_AT_ONCE = 8  # pages that are drawn before their answers are waited for
_PAGE = "word " * 500  # what a page is taken to hold, where none has been read
_POINTS = 72.0  # of a PDF, an inch


class Unreadable(Exception):
    """A PDF that cannot be opened or drawn.

    Attributes:
        reason: Of its quarantine.
        said: What went wrong.
    """

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(f"{reason}: {said}")
        self.reason, self.said = reason, said


class OcrPdf(Asking):
    """Every page of a PDF as text: its text layer, or what a model reads on it."""

    name = "ocr_pdf"
    level = 1
    about = "PDF files: text layers by PDFium, pages without one read by a model that sees"
    tasks = frozenset({"transcribe"})

    class Parameters(AskingParameters):
        """Parameters of `ocr_pdf`.

        Attributes:
            prompt: `transcribe_page`, or a prompt file (`.yaml`).
            least: A page whose text layer has fewer characters that are no blanks is drawn and read.
            dots_per_inch: A page is drawn at.
            edge: Most pixels of a drawn page's longer side; a larger one is drawn smaller.
            pages: Most pages of one document that are read; one with more is quarantined.
            pass_share: Least share of such pages that were read; a document with less is quarantined. Pages that were
                not are empty, and counted.
            seconds: Of processor time to open a document, or to draw eight pages.
        """

        prompt: str = "transcribe_page"
        least: int = Field(default=16, ge=1)
        dots_per_inch: float = Field(default=150.0, gt=0, le=600)
        edge: int = Field(default=2048, ge=64, le=8192)
        pages: int = Field(default=2000, gt=0)
        pass_share: float = Field(default=1.0, ge=0, le=1)
        seconds: float = Field(default=30.0, gt=0)

    parameters: Parameters
    format: Final = "pdf"

    def find_model(self) -> str:
        """As the server calls it, and the library that draws."""
        return f"{self.parameters.endpoint.model}, pypdfium2 {version('pypdfium2')}"

    def _begin(self, asks: bool) -> None:
        self._pdf, self._lock = self._sandbox(), asyncio.Lock()
        # Forked here, before there are threads that may hold a lock.
        self._pdf._ensure_process(pdf_pages)
        super()._begin(asks)

    def _end(self) -> None:
        super()._end()
        self._pdf.__exit__(None, None, None)

    def _sandbox(self) -> Sandbox:
        import PIL.Image
        import pypdfium2  # noqa: F401  (so that the process that is forked need not)

        PIL.Image.init()
        return Sandbox(self.parameters.seconds, ("", "", 1.0, 1))

    def _looked_at(self, sandbox: Sandbox, content: str, numbers: list[int] | None) -> list[str]:
        """The text layers of all pages, or the pictures of some, in base64.

        Raises:
            Unreadable: It is no PDF, broken beyond repair, wants a password, or takes too long.
        """
        given = self.parameters
        said = "" if numbers is None else json.dumps(numbers)
        try:
            answer, trouble = sandbox.process_document(
                (content, said, given.dots_per_inch, given.edge), pdf_pages
            )
        except TimeoutError:
            raise Unreadable(
                "extractor_timeout", f"no answer in {given.seconds:g} seconds of processor time"
            ) from None
        except EOFError:
            raise Unreadable("extractor_died", "its process ended") from None
        if trouble:
            raise Unreadable("extractor_failed", trouble)
        found: list[str] = json.loads(answer)
        return found

    def _without_layer(self, layers: list[str]) -> list[int]:
        return [
            number
            for number, layer in enumerate(layers)
            if len("".join(layer.split())) < self.parameters.least
        ]

    def _messages(self, picture: str) -> list[dict[str, Any]]:
        *system, user = self.prompt.messages(mark=_MARK)
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        return [*system, {"role": "user", "content": [{"type": "text", "text": user["content"]}, shown]}]

    def expected(self, document: Document) -> Iterator[Expected]:
        """One for each page without a text layer."""
        if document.metadata["darwin"]["origin"].get("format") != self.format:
            return
        with self._sandbox() as sandbox:
            try:
                wanted = self._without_layer(self._looked_at(sandbox, document.text, None))
                for first in range(0, len(wanted), _AT_ONCE):
                    for picture in self._looked_at(sandbox, document.text, wanted[first : first + _AT_ONCE]):
                        yield Expected("transcribe", self._messages(picture), _PAGE, 1.0, form=_FORM)
            except Unreadable:
                return

    def suppose(self, document: Document) -> None:
        """Its text layers, and as many words as a page may have for each page without one."""
        if document.metadata["darwin"]["origin"].get("format") != self.format:
            return
        with self._sandbox() as sandbox:
            try:
                layers = self._looked_at(sandbox, document.text, None)
            except Unreadable:
                layers = []
        wanted = set(self._without_layer(layers))
        document.text = "\f".join(_PAGE if number in wanted else text for number, text in enumerate(layers))

    async def process(self, document: Document) -> Outcome:
        """Take the text layer of each page, or ask for what stands on it."""
        if document.metadata["darwin"]["origin"].get("format") != self.format:
            return KEEP
        spent, unused = Counter[str](), Counter[str]()
        try:
            pages = await self._drawn(document.text, None)
            wanted = self._without_layer(pages)
            if len(wanted) > self.parameters.pages:
                said = f"{len(wanted):,} pages without a text layer, {self.parameters.pages:,} allowed"
                return Outcome(quarantine="too_many_pages", notes={"said": said})
            results = Counter({"text layer": len(pages) - len(wanted)})
            for first in range(0, len(wanted), _AT_ONCE):
                numbers = wanted[first : first + _AT_ONCE]
                pictures = await self._drawn(document.text, numbers)
                read = await asyncio.gather(*(self._read(picture, spent, unused) for picture in pictures))
                for number, (text, result) in zip(numbers, read, strict=True):
                    pages[number] = text
                    results[result] += 1
        except Unreadable as error:
            return Outcome(quarantine=error.reason, notes={"said": error.said})
        results = +results
        notes: dict[str, Any] = {"prompt": self.prompt.mark, "pages": dict(sorted(results.items())), **spent}
        counts = {f"pages/{result}": count for result, count in results.items()} | dict(spent)
        counts |= {f"unused answers/{reason}": count for reason, count in unused.items()}
        if len(wanted) - results["read"] > (1 - self.parameters.pass_share) * len(wanted) + 1e-9:
            return Outcome(quarantine="pages_not_read", notes=notes, counts=counts)
        text = "\f".join(pages)
        if not text.strip():
            return Outcome(quarantine="no_text", notes=notes, counts=counts)
        return Outcome(text=text, notes=notes, counts=counts)

    async def _drawn(self, content: str, numbers: list[int] | None) -> list[str]:
        # One document at a time: there is one process that draws.
        async with self._lock:
            return await asyncio.to_thread(self._looked_at, self._pdf, content, numbers)

    async def _read(self, picture: str, spent: Counter[str], unused: Counter[str]) -> tuple[str, str]:
        """What stands on a page, and `read`; or nothing, and why not."""
        result = ""
        for attempt in range(self.parameters.tries):
            try:
                answer = await self.answer(self._messages(picture), attempt, spent, _FORM)
            except Trouble as trouble:
                result = trouble.kind
                continue
            text, result = between(answer, _MARK)
            if text is not None:
                return text, "read"
            unused[result] += 1
        return "", result


_MARK = "passage"
_FORM = forms.within(_MARK, forms.ANY)


def pdf_pages(content: str, numbers: str, dots: float, edge: int) -> tuple[str, str]:
    """Text layers, or pictures where page numbers are given, as a JSON list. Runs in a process of its own."""
    return guarded(_pages, content, numbers, dots, edge) if content else ("", "")


def _pages(content: str, numbers: str, dots: float, edge: int) -> str:
    import pypdfium2

    document = pypdfium2.PdfDocument(content.encode("latin-1"))
    try:
        found = []
        for number in json.loads(numbers) if numbers else range(len(document)):
            page = document[number]
            found.append(_picture(page, dots, edge) if numbers else layer_of(page))
            page.close()
        return json.dumps(found)
    finally:
        document.close()


def _picture(page: Any, dots: float, edge: int) -> str:
    scale = min(dots / _POINTS, edge / max(page.get_size()))
    with io.BytesIO() as file:
        page.render(scale=scale, grayscale=True).to_pil().save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")
