"""Level 1: PDF (text layer), notebooks, LaTeX and threads of questions and answers, as text; nothing is filtered."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import Any

from megatron_davinci.darwin.extraction import Extract, ExtractParameters, guarded
from megatron_davinci.darwin.normalise import html_text

_HYPHEN = re.compile(
    "[\x02\ufffe](?:\r?\n)?"
)  # what PDFium gives for a hyphen that only the line's end asks for


class ExtractPdf(Extract):
    """The text layer of a PDF, by PDFium, pages parted by form feeds."""

    name = "extract_pdf"
    format = "pdf"
    empty = "no_text_layer"
    about = "text layer of PDF files by PDFium; a scan without one is quarantined (see ocr_pdf)"

    def find_model(self) -> str:
        """The library with its version: another one may extract another text."""
        return f"pypdfium2 {version('pypdfium2')}"

    def load(self) -> None:
        """Import it."""
        import pypdfium2  # noqa: F401

    @staticmethod
    def extractor(text: str) -> tuple[str, str]:
        """The text of a PDF, whose bytes are the characters of a string. Runs in a process of its own."""
        return guarded(pdf_text, text) if text else ("", "")


def pdf_text(content: str) -> str:
    """The text layer.

    Raises:
        PdfiumError: It is no PDF, broken beyond repair, or wants a password.
    """
    import pypdfium2

    document = pypdfium2.PdfDocument(content.encode("latin-1"))
    try:
        pages = []
        for number in range(len(document)):
            page = document[number]
            pages.append(layer_of(page))
            page.close()
        return "\f".join(pages)
    finally:
        document.close()


def layer_of(page: Any) -> str:
    """The text layer of one of PDFium's pages."""
    layer = page.get_textpage()
    text: str = _HYPHEN.sub("", layer.get_text_bounded()).replace("\r\n", "\n")
    layer.close()
    return text


class ExtractNotebook(Extract):
    """The cells of a Jupyter notebook in order, code between fences."""

    name = "extract_notebook"
    format = "notebook"
    empty = "no_text_in_notebook"
    about = "cells of Jupyter notebooks: prose as it is, code between fences, outputs of text if asked for"

    class Parameters(ExtractParameters):
        """Parameters of `extract_notebook`.

        Attributes:
            outputs: Write what cells printed and returned, where it is text.
            seconds: Of processor time that one notebook may take.
        """

        outputs: bool = False

    parameters: Parameters

    def options(self) -> tuple[Any, ...]:
        """Whether outputs are wanted."""
        return (self.parameters.outputs,)

    @staticmethod
    def extractor(text: str, outputs: bool) -> tuple[str, str]:
        """The text of a notebook. Runs in a process of its own."""
        return guarded(notebook_text, text, outputs) if text else ("", "")


def notebook_text(content: str, outputs: bool) -> str:
    """The cells of a notebook of format 3 or 4.

    Raises:
        ValueError: It is no notebook.
    """
    notebook = json.loads(content)
    if not isinstance(notebook, dict):
        raise ValueError("not a notebook: no JSON object")
    cells = notebook.get("cells")
    if cells is None:  # format 3
        cells = [cell for sheet in notebook.get("worksheets") or [] for cell in sheet.get("cells") or []]
        if "worksheets" not in notebook:
            raise ValueError("not a notebook: neither cells nor worksheets")
    about = notebook.get("metadata") or {}
    kernel, language = about.get("kernelspec") or {}, about.get("language_info") or {}
    named = language.get("name") or kernel.get("language") or "python"
    parts = []
    for cell in cells:
        kind, source = cell.get("cell_type"), _joined(cell.get("source", cell.get("input")) or "")
        if not source.strip():
            continue
        if kind == "heading":  # format 3
            parts.append("#" * int(cell.get("level", 1)) + " " + source)
        elif kind != "code":
            parts.append(source)
        else:
            parts.append(f"```{named}\n{source}\n```")
            shown = [_output(output) for output in cell.get("outputs") or []] if outputs else []
            parts += [f"```\n{text.rstrip()}\n```" for text in shown if text.strip()]
    return "\n\n".join(parts)


def _joined(lines: Any) -> str:
    return "".join(lines) if isinstance(lines, list) else str(lines)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data") or {}
    return _joined(output.get("text") or data.get("text/plain") or "")


class ExtractLatex(Extract):
    """LaTeX as text: markup goes, mathematics stays as it is written."""

    name = "extract_latex"
    version = 2
    format = "latex"
    empty = "no_text_in_latex"
    about = "LaTeX sources as text by pylatexenc: markup and comments go, mathematics stays as LaTeX"

    def find_model(self) -> str:
        """The library with its version."""
        return f"pylatexenc {version('pylatexenc')}"

    def load(self) -> None:
        """Import it."""
        import pylatexenc.latex2text  # noqa: F401

    @staticmethod
    def extractor(text: str) -> tuple[str, str]:
        """The text of a LaTeX source. Runs in a process of its own."""
        return guarded(latex_text, text) if text else ("", "")


_BODY = re.compile(r"\\begin\s*\{document\}(.*?)(?:\\end\s*\{document\}|\Z)", re.DOTALL)
# Not behind the sign that makes the rest of a line a comment.
_TITLE = re.compile(r"^(?:[^%\n\\]|\\.)*?\\title\s*(?:\[[^\]]*\])?\s*\{", re.MULTILINE)


def latex_text(source: str) -> str:
    """The text of a LaTeX source, its title first; a file without `\\begin{document}` is all body.

    Files that it takes in by `\\input` are documents of their own. Macros of the author's are not expanded.
    """
    from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db

    macros = get_default_latex_context_db()
    # The library would write the day on which it runs, and that there is no title or author.
    silent = [MacroTextSpec(name, simplify_repl="") for name in ("maketitle", "today")]
    macros.add_context_category("silent", prepend=True, macros=silent)
    convert = LatexNodes2Text(macros, math_mode="verbatim", keep_comments=False, strict_latex_spaces=False)
    body, found = _BODY.search(source), _TITLE.search(source)
    title = _braced(source, found.end() - 1) if found else ""
    text = convert.latex_to_text(body[1] if body else source)
    heading = convert.latex_to_text(title).strip()
    text = re.sub(r"\n[ \t]*\n\s*\n", "\n\n", text).strip()
    return f"{heading}\n\n{text}" if heading else text


def _braced(source: str, begin: int) -> str:
    depth = 0
    for at in range(begin, len(source)):
        depth += {"{": 1, "}": -1}.get(source[at], 0) if source[at - 1] != "\\" else 0
        if depth == 0:
            return source[begin + 1 : at]
    return ""


class ExtractThread(Extract):
    """A question with its answers, as Stack Exchange gives them: title, question, the accepted answer, the others."""

    name = "extract_thread"
    version = 2
    format = "thread"
    empty = "no_text_in_thread"
    about = "threads of Stack Exchange dumps: the question, the accepted answer, the others by their votes"

    def find_model(self) -> str:
        """The library that makes text of the posts' HTML, with its version."""
        return f"resiliparse {version('resiliparse')}"

    def load(self) -> None:
        """Import it."""
        import resiliparse.extract.html2text  # noqa: F401

    @staticmethod
    def extractor(text: str) -> tuple[str, str]:
        """The text of a thread's rows. Runs in a process of its own."""
        return guarded(thread_text, text) if text else ("", "")


def thread_text(rows: str) -> str:
    """The posts of a thread in order: the question, the accepted answer, the others by votes, then by number.

    Raises:
        ParseError: A row is not well formed.
    """
    from xml.etree.ElementTree import fromstring

    question, *answers = [fromstring(row).attrib for row in rows.split("\n") if row.strip()]
    accepted = question.get("AcceptedAnswerId")
    answers.sort(key=lambda post: (post["Id"] != accepted, -int(post.get("Score") or 0), int(post["Id"])))
    parts = [f"# {question['Title']}"] if question.get("Title") else []
    parts.append(html_text(question.get("Body", ""), False, False))
    for post in answers:
        mark = "Accepted answer" if post["Id"] == accepted else "Answer"
        parts += [f"## {mark}", html_text(post.get("Body", ""), False, False)]
    return "\n\n".join(part.strip("\n") for part in parts)
