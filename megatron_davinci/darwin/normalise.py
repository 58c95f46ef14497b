"""Level 1: one form of text. Nothing is filtered here; what cannot be turned into text is quarantined."""

from __future__ import annotations

import re
import unicodedata
from importlib.metadata import version
from typing import Any, ClassVar

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.extraction import Extract, ExtractParameters, guarded
from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters

# What no text needs: control characters (but tab and newline), half surrogates, non-characters.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Vertical tabs and separators of files, groups, records and units part what must not become one word.
_LINE_ENDS = re.compile("\r\n?|[\x0b\x1c-\x1f\u2028\u2029\u0085]")
_INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060\ufeff]"
)  # soft hyphen, zero-width space, word joiner, byte-order mark
_TRAILING = re.compile(r"[ \t\u00a0](?:\n|\Z)")


class NormaliseText(Step):
    """Unicode NFC, line ends, control characters, invisible marks, trailing blanks; indentation stays."""

    name = "normalise_text"
    level = 1
    version = 3
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
            # A form feed parts pages; a regular expression would try each blank of a long run.
            if "\x0c" in text:
                pages = [
                    page.lstrip(" \t").lstrip("\n").rstrip(" \t").rstrip("\n") for page in text.split("\x0c")
                ]
                text = "\n\n".join(pages)
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


def html_text(html: str, main_content: bool, links: bool) -> str:
    """The text of an HTML page, with its paragraphs, lists and `<pre>` lines.

    Args:
        html: The page.
        main_content: Leave out navigation, banners and footers.
        links: Write the targets of links.
    """
    from resiliparse.extract.html2text import extract_plain_text

    text: str = extract_plain_text(
        html,
        main_content=main_content,
        links=links,
        preserve_formatting=True,
        skip_elements=["script", "style", ".headerlink", "a.anchor"],
    )
    return text


def html_to_text(html: str, main_content: bool, links: bool) -> tuple[str, str]:
    """The text of a page, or what went wrong. Runs in a process of its own."""
    return guarded(html_text, html, main_content, links)


class ExtractHtml(Extract):
    """Main content of an HTML page by resiliparse, in a process that is killed when it does not come back."""

    name = "extract_html"
    format = "html"
    empty = "no_text_in_page"
    about = "main content of HTML pages by resiliparse, code and mathematics kept; with a deadline a page"

    class Parameters(ExtractParameters):
        """Parameters of `extract_html`.

        Attributes:
            main_content: Leave out navigation, banners and footers.
            links: Write the targets of links.
            seconds: Of processor time that one page may take before it is quarantined.
        """

        main_content: bool = True
        links: bool = False

    parameters: Parameters
    extractor: ClassVar[Any] = staticmethod(html_to_text)

    def options(self) -> tuple[Any, ...]:
        """As `html_text` takes them."""
        return (self.parameters.main_content, self.parameters.links)

    def find_model(self) -> str:
        """The library with its version: another one may extract another text."""
        return f"resiliparse {version('resiliparse')}"

    def load(self) -> None:
        """Import it."""
        import resiliparse.extract.html2text  # noqa: F401
