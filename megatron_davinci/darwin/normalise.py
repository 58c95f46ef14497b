"""Level 1: one form of text. Nothing is filtered here; what cannot be turned into text is quarantined."""

from __future__ import annotations

import ctypes
import re
import signal
import sys
import unicodedata
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters

# What no text needs: control characters (but tab and newline), half surrogates, non-characters.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_PAGE = re.compile("\n*[ \t]*\x0c[ \t]*\n*")  # a form feed parts pages
_LINE_ENDS = re.compile("\r\n?|\u2028|\u0085")
_INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060\ufeff]"
)  # soft hyphen, zero-width space, word joiner, byte-order mark
_TRAILING = re.compile(r"[ \t\u00a0](?:\n|\Z)")
_START_SECONDS = 120.0


class NormaliseText(Step):
    """Unicode NFC, line ends, control characters, invisible marks, trailing blanks; indentation stays."""

    name = "normalise_text"
    level = 1
    version = 1
    edits = True
    about = "Unicode NFC, one kind of line end, no control characters; indentation and words stay as they are"

    class Parameters(StepParameters):
        """Parameters of `normalise_text`.

        Attributes:
            unicode: The normal form, or `none`. NFC changes no meaning; NFKC would flatten x² to x2.
            blank_lines: Most blank lines in a row.
        """

        unicode: str = Field(default="NFC", pattern="^(NFC|none)$")
        blank_lines: int = Field(default=2, ge=1)

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Normalise, and count what was taken out."""
        text, controls = document.text, 0
        if not text.isascii() or _CONTROL.search(text) or "\r" in text or "\x0c" in text:
            text = _LINE_ENDS.sub("\n", text)
            text = _PAGE.sub("\n\n", text)
            text, controls = _CONTROL.subn("", text)
            text = _INVISIBLE.sub("", text)
            if self.parameters.unicode == "NFC":
                text = unicodedata.normalize("NFC", text)
        if _TRAILING.search(text):
            text = "\n".join([line.rstrip(" \t\u00a0") for line in text.split("\n")])
        most = "\n" * (self.parameters.blank_lines + 1)
        if most + "\n" in text:
            text = re.sub(f"\n{{{len(most) + 1},}}", most, text)
        text = text.strip("\n")
        if text == document.text:
            return KEEP
        return Outcome(text=text, notes={"control_characters": controls} if controls else None)


def html_to_text(html: str, main_content: bool, links: bool) -> tuple[str, str]:
    """The text of an HTML page, and what went wrong if anything did. Runs in a process of its own.

    Args:
        html: The page.
        main_content: Leave out navigation, banners and footers.
        links: Write the targets of links.

    Returns:
        The text with its paragraphs, lists and `<pre>` lines, and an empty string; or an empty text and a message.
    """
    from resiliparse.extract.html2text import extract_plain_text

    _die_with_parent()
    try:
        text = extract_plain_text(
            html,
            main_content=main_content,
            links=links,
            preserve_formatting=True,
            skip_elements=["script", "style", ".headerlink", "a.anchor"],
        )
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    return text, ""


@cache
def _die_with_parent() -> None:
    """Ask Linux to end this process with the one that asks it for text, which may be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class ExtractHtml(Step):
    """Main content of an HTML page by resiliparse, in a process that is killed when it does not come back."""

    name = "extract_html"
    level = 1
    version = 1
    edits = True
    about = "main content of HTML pages by resiliparse, code and mathematics kept; with a deadline a page"

    class Parameters(StepParameters):
        """Parameters of `extract_html`.

        Attributes:
            main_content: Leave out navigation, banners and footers.
            links: Write the targets of links.
            seconds: That one page may take before it is quarantined.
        """

        main_content: bool = True
        links: bool = False
        seconds: float = Field(default=10.0, gt=0)

    parameters: Parameters
    extractor: ClassVar[Any] = staticmethod(html_to_text)

    def find_model(self) -> str:
        """The library with its version: another one may extract another text."""
        return f"resiliparse {version('resiliparse')}"

    def open(self) -> None:
        """Import the library before its process is forked, which then need not."""
        import resiliparse.extract.html2text  # noqa: F401
        from datatrove.pipeline.extractors.base import ExtractorSandbox

        chosen = self.parameters
        self._sandbox = ExtractorSandbox(_START_SECONDS, warmup_text=("", chosen.main_content, chosen.links))
        self._started = False

    def close(self) -> None:
        """End the process."""
        self._sandbox.__exit__(None, None, None)

    def apply(self, document: Document) -> Outcome:
        """Extract, if the document is a page."""
        if document.metadata["darwin"]["origin"].get("format") != "html":
            return KEEP
        chosen = self.parameters
        options = (chosen.main_content, chosen.links)
        if not self._started:
            # A process that starts slowly on a busy machine is no page's fault.
            self._sandbox.timeout = _START_SECONDS
            self._sandbox.process_document(("", *options), type(self).extractor)
            self._sandbox.timeout, self._started = chosen.seconds, True
        try:
            text, said = self._sandbox.process_document((document.text, *options), type(self).extractor)
        except TimeoutError:
            self._started = False
            return Outcome(
                quarantine="extractor_timeout", notes={"said": f"no answer in {chosen.seconds:g} seconds"}
            )
        except EOFError:
            self._started = False
            return Outcome(quarantine="extractor_died", notes={"said": "its process ended"})
        if said:
            return Outcome(quarantine="extractor_failed", notes={"said": said})
        if not text.strip():
            return Outcome(
                quarantine="no_text_in_page", notes={"said": "the extractor found no main content"}
            )
        return Outcome(text=text)
