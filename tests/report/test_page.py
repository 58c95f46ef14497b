"""A page: one file, nothing from outside, everything escaped, written whole or not at all."""

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_davinci import files
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.page import KeyFigure, Page
from megatron_davinci.report.plots import LinePlot, Series

_LOADS = re.compile(r"""url\(\s*["']?(?!["']?\#)|@import""", re.IGNORECASE)


def fetches(html: str) -> list[str]:
    """Everything in a page that would load or run something."""
    return Outline(html).fetches


class Outline(HTMLParser):
    """The tags and ids of a page, what it would load or run, and whether every tag was closed in order."""

    VOID = ("meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self._look(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._look(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style" and _LOADS.search(data):
            self.fetches.append(data)

    def _look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.fetches.append(tag)
        for name, value in attrs:
            outside = name in ("src", "srcset", "href", "xlink:href", "action") and not (
                value or ""
            ).startswith("#")
            if outside or name.startswith("on") or (name != "aria-label" and _LOADS.search(value or "")):
                self.fetches.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def plot(title: str = "Loss") -> LinePlot:
    series = [Series(name="general", x=[1, 2, 3], y=[3, 2, 1])]
    return LinePlot(title=title, x=Axis("tokens", "tokens"), y=Axis("loss", "nats per token"), series=series)


def full_page() -> Page:
    page = Page("A run", "on a laptop").figures(
        [("Tokens", "2M", "10 steps"), KeyFigure("Loss", "3.1", "", "blue")]
    )
    page.section("Loss", "One paragraph.\n\nAnother.").plot(plot(), "It falls.").plot(plot("Loss again"))
    page.section("Numbers").table(["stage", "loss"], [["1-1", 3.41234], ["1-2", 2.0]], "By stage.")
    page.section("Samples").text_block("  world\n\tagain", label="general", lead="hello")
    return page.section("Record", collapsed=True).table(["a"], [["b"]])


@cache
def full_html() -> str:
    return full_page().html()


def test_nothing_is_loaded_from_outside_and_nothing_runs() -> None:
    html = full_html()
    assert fetches(html) == []
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//""", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    "markup",
    [
        "<img src=x>",
        '<a href="http://a.b">there</a>',
        "<style>a{background:url(//a.b)}</style>",
        "<script></script>",
        "<b onclick='x()'></b>",
    ],
)
def test_the_check_for_outside_references_can_fail(markup: str) -> None:
    assert fetches(f"<p>{markup}</p>")


def test_tags_are_closed_in_order_and_ids_are_unique() -> None:
    outline = Outline(full_html())
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))


def test_every_plot_has_a_label_and_its_data_in_a_table() -> None:
    html = full_html()
    assert html.count("<figure") == html.count('role="img" aria-label="Loss') == 2
    assert html.count('<details class="data">') == 2
    assert "<td" in html.split('<details class="data">')[1].split("</details>")[0]


def test_light_and_dark_and_paper() -> None:
    html = full_html()
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html


def test_columns_of_numbers_are_set_to_the_right() -> None:
    html = full_html()
    assert '<td class="num">3.412</td>' in html
    assert '<td class="num">1-1</td>' not in html


def test_text_blocks_keep_their_white_space() -> None:
    assert '<span class="lead">hello</span><span>  world\n\tagain</span>' in full_html()


HOSTILE = (
    '</pre></style><script src="http://evil.example/x.js">alert(1)</script>'
    "<img src=x onerror=alert(1)>&'\"{{ 7*7 }}"
)


def test_importing_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys, megatron_davinci.report.run; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    page = (
        Page(HOSTILE, HOSTILE)
        .figures([(HOSTILE, HOSTILE, HOSTILE)])
        .notice(HOSTILE)
        .section(HOSTILE, HOSTILE)
    )
    page.plot(plot(HOSTILE), HOSTILE).table([HOSTILE], [[HOSTILE]], HOSTILE)
    page.text_block(HOSTILE, label=HOSTILE, lead=HOSTILE).section(HOSTILE, collapsed=True)
    html = page.html()
    outline = Outline(html)
    assert not {"script", "img"} & set(outline.tags)
    assert fetches(html) == []
    assert "&lt;script src=" in html
    assert "{{ 7*7 }}" in html
    assert outline.open == []


def test_what_utf8_cannot_hold_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = (
        Page("bytes").section("Samples").text_block("a\x00b\ud800c\x1bd é 語").write(tmp_path / "page.html")
    )
    assert "a\ufffdb\ufffdc\ufffdd é 語" in path.read_text(encoding="utf-8")


def test_the_same_page_gives_the_same_characters() -> None:
    assert full_page().html() == full_html()


def test_items_before_the_first_section_have_a_place() -> None:
    assert "only this" in Page("short").text_block("only this").html()


def test_writing_leaves_one_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = full_page().write(tmp_path / "deep" / "page.html")
    assert path.read_text(encoding="utf-8") == full_html()
    assert os.listdir(path.parent) == ["page.html"]


def test_a_write_that_fails_leaves_the_old_page_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("the old page")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        full_page().write(path)
    assert path.read_text() == "the old page"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"old")
    seen: list[bytes] = []
    real = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: (seen.append(path.read_bytes()), real(descriptor))[1]
    )
    files.write_atomically(path, b"new")
    # The bytes are on the disk before the rename, and the rename is flushed after it.
    assert seen == [b"old", b"new"]


def test_marked_text_is_escaped_and_its_marks_are_known():
    parts = [("<b>grey</b> ", "quiet"), ("plain", ""), ("⏎", "other end")]
    html = Page("t").section("s").marked_text(parts, label="<i>").html()
    assert (
        '<span class="quiet">&lt;b&gt;grey&lt;/b&gt; </span><span>plain</span><span class="other end">⏎</span>'
        in html
    )
    assert "&lt;i&gt;" in html and fetches(html) == []
    with pytest.raises(ValueError, match='found red"'):
        Page("t").marked_text([("x", 'quiet red"')])
