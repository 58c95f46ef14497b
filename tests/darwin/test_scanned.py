"""Scans: pages without a text layer are drawn, read by a model that is shown them, and told again without it."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_davinci.darwin import endpoint, scanned
from megatron_davinci.darwin.cost import IMAGE_TOKENS, estimate
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.errors import ConfigError
from tests.darwin.making import made, recipe
from tests.darwin.sources_of import pdf

SQUARES = (3, 1, 4, 2)


def drawing(squares: int) -> Image.Image:
    """A page with so many black squares in a row."""
    sheet = Image.new("L", (640, 800), 255)
    for number in range(squares):
        ImageDraw.Draw(sheet).rectangle((40 + 90 * number, 100, 100 + 90 * number, 160), fill=0)
    return sheet


def scan(squares: tuple[int, ...]) -> bytes:
    """A PDF whose pages are pictures."""
    first, *rest = map(drawing, squares)
    with io.BytesIO() as file:
        first.save(file, "PDF", save_all=True, append_images=rest)
        return file.getvalue()


def pictures_of(content: str) -> list[Image.Image]:
    parts = json.loads(content)
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def seeing(content: str) -> str:
    """A model that sees: it counts the squares of the one page that it is shown."""
    [picture] = pictures_of(content)
    assert max(picture.size) <= 500
    dark = (np.asarray(picture.convert("L")) < 128).any(axis=0)
    return f"<passage>There are {int(np.diff(dark.astype(int)).clip(0).sum())} squares here.</passage>"


@pytest.fixture(autouse=True)
def fresh(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)
    server.forget()
    server.model, server.fault, server.delay, server.finish = seeing, lambda: "", 0.0, "stop"


@pytest.fixture
def papers(tmp_path, server):
    """A recipe of a scan, a paper with a text layer, and what is neither."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "scan.pdf").write_bytes(scan(SQUARES))
    (raw / "text.pdf").write_bytes(pdf(["a line that is long enough to be a layer"]))
    (raw / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing of one")
    (raw / "plain.txt").write_text("text that is text\n")

    def of(out="corpus", **given):
        given = {"endpoint": server.endpoint(timeout=10.0), "edge": 500, "tries": 1} | given
        sources = [{"name": "papers", "paths": ["raw/*"]}]
        steps = [{"ocr_pdf": {"answers": str(tmp_path / f"{out}.sqlite"), **given}}]
        return recipe(tmp_path, out, sources=sources, steps=steps)

    return of


def by_file(records):
    return {record["darwin"]["origin"]["path"].rpartition("/")[2]: record for record in records}


def test_each_page_is_its_text_layer_or_what_was_read_on_it(papers, server):
    loaded = papers()
    (planned,) = estimate(loaded, 10).steps
    assert planned.calls == pytest.approx(4) and planned.prompt_tokens > 4 * IMAGE_TOKENS
    corpus = made(loaded)
    found = by_file(corpus.records())
    assert found["scan.pdf"]["text"].split("\f") == [f"There are {n} squares here." for n in SQUARES]
    assert found["text.pdf"]["text"] == "a line that is long enough to be a layer"
    assert found["plain.txt"]["text"] == "text that is text\n"
    assert len(server.requests) == 4
    operation = found["scan.pdf"]["darwin"]["operations"][-1]
    assert operation["notes"]["pages"] == {"read": 4} and found["scan.pdf"]["darwin"]["level"] == 1
    assert operation["model"].startswith("tiny-1, pypdfium2 ")
    assert corpus.counts["quarantined"] == {"ocr_pdf/extractor_failed": 1}
    # Its life is told from the answers on disk, without the model.
    *_, last = events(find([corpus], found["scan.pdf"]["id"]))
    assert last.after == found["scan.pdf"]["text"] and len(server.requests) == 4
    assert estimate(loaded, 10).steps[0].known == pytest.approx(4)


@pytest.mark.parametrize(("share", "kept"), [(0.7, True), (0.8, False)])
def test_a_page_that_is_not_read_is_counted_and_too_many_are_a_quarantine(papers, server, share, kept):
    server.model = lambda content: "no tags" if "3 squares" in (said := seeing(content)) else said
    corpus = made(papers(f"corpus{share}", pass_share=share))
    pages = ["", *(f"There are {n} squares here." for n in SQUARES[1:])]
    found = by_file(corpus.records())
    assert ("scan.pdf" in found) == kept
    if kept:
        assert found["scan.pdf"]["text"].split("\f") == pages
        assert found["scan.pdf"]["darwin"]["operations"][-1]["notes"]["pages"] == {"no_tags": 1, "read": 3}
    else:
        assert corpus.counts["quarantined"]["ocr_pdf/pages_not_read"] == 1


def test_what_cannot_be_read_is_said(papers, tmp_path, server):
    corpus = made(papers(pages=3))
    assert corpus.counts["quarantined"]["ocr_pdf/too_many_pages"] == 1 and not server.requests
    with pytest.raises(ConfigError, match="extract_pdf and ocr_pdf both read papers"):
        recipe(tmp_path, sources=[{"name": "papers", "paths": ["*"]}],
               steps=["extract_pdf", {"ocr_pdf": {"endpoint": server.endpoint()}}])  # fmt: skip


def test_pictures_are_no_larger_than_agreed():
    [small] = json.loads(scanned.pdf_pages(scan((2,)).decode("latin-1"), "[0]", 36.0, 4096)[0])
    [large] = json.loads(scanned.pdf_pages(scan((2,)).decode("latin-1"), "[0]", 600.0, 300)[0])
    sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in (small, large)]
    assert sizes[0] == (320, 400) and max(sizes[1]) == 300
