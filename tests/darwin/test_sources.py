"""Formats that are no text, from raw files to a corpus: what is read, what is quarantined, every life told again."""

from __future__ import annotations

import gzip
import json
import re
import time
import tracemalloc
import zlib

import pyarrow.parquet
import pytest

from megatron_davinci.darwin import formats
from megatron_davinci.darwin.acquire import read_file
from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.formats import latex_text, notebook_text, pdf_text, thread_text
from megatron_davinci.darwin.inventory import InputFile
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.recipe import SourceRecipe
from megatron_davinci.darwin.warc import read_warc, read_warc_at
from megatron_davinci.errors import ConfigError, DataError
from tests.darwin import sources_of
from tests.darwin.making import made, recipe
from tests.darwin.sources_of import LATEX, answer, notebook, page, pdf, write_crawl, write_posts
from tests.darwin.test_rules import document

EXTRACT = [
    "extract_html",
    "extract_pdf",
    "extract_notebook",
    "extract_latex",
    "extract_thread",
    "normalise_text",
]
STARS = {"stars": {"min_stars": 10, "sources": ["code"]}}
SOURCES = [
    {"name": "crawl", "paths": ["raw/*.warc.gz"], "licence": "various"},
    {"name": "papers", "paths": ["raw/*.pdf", "raw/*.ipynb", "raw/*.tex"]},
    {"name": "threads", "paths": ["raw/Posts*"], "format": "thread", "licence": "CC-BY-SA-4.0"},
    {"name": "saved", "dataset": {"path": "raw/saved"}, "id_field": "key", "licence_field": "terms"},
    {"name": "code", "repositories": "raw/repositories.jsonl", "paths": ["**/*.py"], "licence": "unknown"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("sources")
    raw = folder / "raw"
    raw.mkdir()
    write_crawl(raw / "crawl.warc.gz")
    (raw / "good.pdf").write_bytes(pdf(["The first line", "and the second"]))
    (raw / "scan.pdf").write_bytes(pdf([]))
    (raw / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing of one")
    (raw / "new.ipynb").write_text(notebook())
    (raw / "old.ipynb").write_text(notebook(old=True))
    (raw / "broken.ipynb").write_text('{"cells": [')
    (raw / "paper.tex").write_text(LATEX)
    write_posts(raw / "Posts.xml")
    (raw / "Posts-packed.gz").write_bytes(gzip.compress((raw / "Posts.xml").read_bytes().splitlines(True)[5]))
    rows = [
        {"key": f"k{i}", "text": f"row {i} of a dataset", "terms": "MIT" if i else None} for i in range(3)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(raw / "saved")
    for name in ("one", "two"):
        (raw / name / ".git").mkdir(parents=True)
        (raw / name / ".git" / "hook.py").write_text("not a file of the repository")
        (raw / name / "a.py").write_text(f"print('{name}')\n")
    about = [
        {"path": "one", "name": "ann/one", "stars": 10, "licence": "MIT"},
        {"path": "two", "full_name": "bob/two", "stargazers_count": 9, "license": {"spdx_id": "NOASSERTION"}},
    ]
    (raw / "repositories.jsonl").write_text("\n".join(map(json.dumps, about)))
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    limits = {"document_bytes": 50_000}
    return made(recipe(folder, sources=SOURCES, steps=[*EXTRACT, STARS], limits=limits))


def texts(corpus, source):
    return {record["id"]: record["text"] for record in corpus.records() if record["source"] == source}


def test_everything_is_accounted_for(corpus):
    assert corpus.counts["quarantined"] == {
        "acquire/binary": 1, "acquire/broken_gzip": 2, "acquire/broken_record": 1, "acquire/http_status": 1,
        "acquire/no_post": 2, "acquire/no_question": 1, "acquire/not_http": 1, "acquire/other_media": 1,
        "acquire/too_large": 1, "extract_notebook/extractor_failed": 1, "extract_pdf/extractor_failed": 1,
        "extract_pdf/no_text_layer": 1, "extract_thread/extractor_failed": 1,
    }  # fmt: skip
    assert corpus.counts["dropped"] == {"stars/few_stars": 1}
    assert corpus.counts["input"] == corpus.counts["output"] + 16
    for record in corpus.records("quarantine"):
        assert record["fate"]["reason"] and record["darwin"]["operations"][-1]["notes"]["said"]


@pytest.mark.parametrize(
    ("named", "licence"),
    [
        ('["MIT"]', "MIT"),
        ('["MIT", "Apache-2.0 OR GPL-2.0"]', "MIT AND (Apache-2.0 OR GPL-2.0)"),
        ('["MIT or GPL-2.0", "CC0-1.0"]', "(MIT or GPL-2.0) AND CC0-1.0"),
        ("[]", None),
        ("null", None),
        ('"CC0-1.0"', "CC0-1.0"),
    ],
)
def test_a_text_of_several_licences_is_under_all_of_them(tmp_path, named, licence):
    path = tmp_path / "code.jsonl"
    path.write_text(f'{{"text": "x = 1", "licences": {named}}}\n')
    source = SourceRecipe(name="code", paths=[str(path)], licence_field="licences")
    [raw] = read_file(InputFile("code", str(path), "code.jsonl", "jsonl", 99), source, 10_000)
    assert raw.licence == licence


PACKED = gzip.compress(page("packed"))
CHUNKS = "Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_a_body_that_is_not_as_its_header_says_costs_no_other_record(tmp_path, compressed):
    raw_deflate = zlib.compress(page("raw"))[2:-4]
    bodies = {
        "unpacked already": ("Content-Encoding: gzip\r\n", page("unpacked already")),
        "raw": ("Content-Encoding: deflate\r\n", raw_deflate),
        "one chunk": (CHUNKS, page("one chunk")),
        "extended": (
            f"Content-Encoding: gzip\r\n{CHUNKS}",
            b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(PACKED), PACKED),
        ),
        "in brotli": ("Content-Encoding: br\r\n", page("in brotli")),
        "cut": (CHUNKS, b"fff\r\n<p>cut off"),
        "torn": ("Content-Encoding: gzip\r\n", PACKED[:10] + b"\xff" * 40),
        "last": ("", page("last")),
    }
    members = [answer(body, n, more=more) for n, (more, body) in enumerate(bodies.values())]
    members.append(
        sources_of.record("response", b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n" + page("old lines"), 99)
    )
    members[-1] = members[-1].replace(
        b"http://site.example/99", b"<http://site.example/99>"
    )  # as wget writes it
    path = tmp_path / "x.warc"
    path.write_bytes(b"".join(map(gzip.compress, members) if compressed else members))
    source = SourceRecipe(name="x", paths=[str(path)])
    found = list(read_file(InputFile("x", str(path), "x.warc", "warc", 99), source, 10_000))
    assert [raw.fault for raw in found] == [None] * 5 + ["broken_http"] * 2 + [None] * 2
    assert found[-1].fields["url"] == "http://site.example/99"
    said = ["unpacked already", "raw", "one chunk", "packed", "in brotli", "last", "old lines"]
    assert [raw.text.encode() for raw in found if raw.fault is None] == [page(words) for words in said]


def test_a_crawl_is_read_past_its_damage(corpus):
    found = texts(corpus, "crawl")
    assert [" ".join(text.split()) for text in found.values()] == [
        "Title plain words", "Title packed words", "chunked", "été à Besançon", "out of a crawl",
        "text of a WET file", "Title after the second damage",
    ]  # fmt: skip
    record = next(record for record in corpus.records() if "chunked" in record["text"])
    assert record["fields"] == {"url": "http://site.example/4", "date": "2024-05-06T07:08:09Z"}
    origin = record["darwin"]["origin"]
    with open(origin["path"], "rb") as file:
        file.seek(origin["first"])
        assert b"<urn:uuid:4>" in gzip.GzipFile(fileobj=file).read(300)
    damaged = [r for r in corpus.records("quarantine") if r["fate"]["reason"] == "broken_gzip"]
    with open(origin["path"], "rb") as file:
        content = file.read()
    for each in damaged:
        place = each["darwin"]["origin"]
        assert content[place["first"] + place["bytes"] :].startswith(b"\x1f\x8b")
    assert [content[r["darwin"]["origin"]["first"] :][:2] for r in damaged] == [b"\x1f\x8b", b"no"]


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_a_crawl_that_is_cut_off_anywhere_says_so(tmp_path, pack):
    path, records = tmp_path / "x.warc", [pack(answer(page(f"page {number}"), number)) for number in range(2)]
    first, whole = len(records[0]), b"".join(records)
    origin = {"path": str(path), "format": "warc"}
    rest = (
        20 if pack is gzip.compress else 4
    )  # checks and blank lines, without which the record is there all the same
    for cut in [1, 9, first // 2, *range(first + 1, len(whole) - rest, 7)]:
        path.write_bytes(whole[:cut])
        found = list(read_warc(path, "x", origin, 10_000))
        assert [raw.fault is None for raw in found] == ([True] if cut > first else []) + [False], cut
        assert found[-1].origin["first"] == (first if cut > first else 0)
    path.write_bytes(whole)
    assert [raw.fault for raw in read_warc(path, "x", origin, 10_000)] == [None, None]


def test_a_crawl_that_was_compressed_as_a_whole_has_a_name_for_each_page(tmp_path):
    path, records = tmp_path / "x.warc.gz", [answer(page(f"page {number}"), number) for number in range(4)]
    one = len(gzip.compress(b"".join(records[:2]), mtime=0))
    origin = {"path": str(path), "format": "warc"}
    for members, names in (([4], ["0", "0.1", "0.2", "0.3"]), ([2, 2], ["0", "0.1", f"{one}", f"{one}.1"])):
        parts = iter(records)
        packed = [gzip.compress(b"".join(next(parts) for _ in range(count)), mtime=0) for count in members]
        path.write_bytes(b"".join(packed))
        found = list(read_warc(path, "x", origin, 10_000))
        assert [raw.name for raw in found] == [f"x#{name}" for name in names]
        for raw in found:
            again = read_warc_at(path, "x", raw.origin, 10_000)
            assert again is not None and again.text == raw.text and raw.fault is None


@pytest.mark.parametrize("length", [b"12x", b"-5", b"99999999999999999999", b"", b"9" * 5000])
def test_a_crawl_with_a_length_that_is_none_says_so(tmp_path, length):
    records = [answer(page(f"page {number}"), number) for number in range(2)]
    records[1] = re.sub(rb"Content-Length: \d+", b"Content-Length: " + length, records[1], count=1)
    (tmp_path / "x.warc").write_bytes(b"".join(records))
    corpus = made(recipe(tmp_path, sources=[{"name": "a", "paths": ["x.warc"]}], steps=["extract_html"]))
    assert corpus.counts["output"] == 1
    assert corpus.counts["quarantined"]["acquire/broken_warc"] == 1


def test_a_mark_before_the_first_line_is_none_of_it(tmp_path):
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two"))
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    corpus = made(recipe(tmp_path, sources=[{"name": "a", "paths": ["x.jsonl"]}], steps=["exact_dedup"]))
    assert [record["text"] for record in corpus.records()] == ["one", "two"]
    assert [record["darwin"]["origin"]["first"] for record in corpus.records()] == [
        0,
        3 + lines.index(b"\n") + 1,
    ]


def test_two_columns_of_one_name_are_none(tmp_path):
    two = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(two, tmp_path / "x.parquet")
    corpus = made(recipe(tmp_path, sources=[{"name": "a", "paths": ["x.parquet"]}], steps=["exact_dedup"]))
    assert corpus.counts["quarantined"] == {"acquire/broken_parquet": 1}
    [record] = corpus.records("quarantine")
    assert "more than one column 'text'" in record["darwin"]["operations"][-1]["notes"]["said"]


def test_a_date_that_python_has_not_is_said(tmp_path):
    late = pyarrow.array([0, 1 << 62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "at": late}), tmp_path / "x.parquet")
    corpus = made(recipe(tmp_path, sources=[{"name": "a", "paths": ["x.parquet"]}], steps=["exact_dedup"]))
    assert corpus.counts["quarantined"] == {"acquire/broken_parquet": 1}


def test_pdf_notebooks_and_latex_are_text(corpus):
    found = {identifier.rsplit("/")[-1]: text for identifier, text in texts(corpus, "papers").items()}
    assert found == {
        "good.pdf": "The first line\nand the second",
        "new.ipynb": "# Sums\nWe add $a + b$.\n\n```python\nx = 2\nprint(x + x)\n```",
        "old.ipynb": "## Old\n\n```python\n1 + 1\n```",
        "paper.tex": found["paper.tex"],
    }
    paper = found["paper.tex"]
    assert paper.startswith("On Sums\n") and "remark" not in paper and "50% more" in paper
    assert r"$x_i \in \mathbb{R}$" in paper and r"\[ \sum_i x_i = \half . \]" in paper
    assert r"\begin{equation}\label{e} a^2 + b^2 = c^2 \end{equation}" in paper
    assert "newcommand" not in paper and r"\section" not in paper
    empty = {"cells": [{"cell_type": "code", "source": None}, {"cell_type": "markdown", "source": "a"}]}
    assert notebook_text(json.dumps(empty), outputs=False) == "a"
    assert notebook_text(notebook(), outputs=True).endswith("```\n\n```\n4\n```")
    assert latex_text(r"no \textbf{document} here") == "no document here"
    author, body = r"\author{Ann}", r"\begin{document}\maketitle Of \today{} it speaks.\end{document}"
    for preamble in (
        rf"\title{{On Sums}}{author}",
        rf"{author}\title{{On Sums}}",
        "% \\title{Old}\n\\title{On Sums}",
    ):
        assert (
            latex_text(preamble + body) == "On Sums\n\nOf  it speaks."
        )  # and nothing of the day it is read on
    assert latex_text(r"\begin{document}\title{On Sums}\maketitle Text.\end{document}") == "On Sums\n\nText."
    assert pdf_text(pdf(["a"]).decode("latin-1")) == "a"


def test_threads_have_the_accepted_answer_first(corpus):
    found = texts(corpus, "threads")
    assert list(found) == [
        "threads/raw/Posts-packed.gz#3",
        "threads/raw/Posts.xml#3",
        "threads/raw/Posts.xml#7",
    ]
    text = found["threads/raw/Posts.xml#7"]
    assert text.startswith(
        "# Why < and &?\n\nI wonder.\n\n## Accepted answer\n\nThe accepted one.\n\n## Answer\n\nBecause"
    )
    assert "if a < b:\n  x" in text
    assert found["threads/raw/Posts.xml#3"] == "# Alone\n\nNo answer yet."
    ends = "one\u2028two\u0085three"  # which XML takes for characters, and Python for ends of lines
    assert "one" in thread_text(f'<row Id="1" Title="A" Body="{ends}" />')


def test_rows_of_a_dataset_and_files_of_repositories_carry_what_is_known(corpus):
    records = {record["id"]: record for record in corpus.records()}
    assert [records[f"saved/k{i}"]["licence"] for i in range(3)] == [None, "MIT", "MIT"]
    assert records["saved/k2"]["text"] == "row 2 of a dataset"
    assert records["code/ann/one/a.py"]["licence"] == "MIT"
    assert records["code/ann/one/a.py"]["fields"] == {"repository": "ann/one", "stars": 10}
    [gone] = corpus.records("dropped")
    assert gone["id"] == "code/bob/two/a.py" and gone["licence"] == "unknown" and gone["fields"]["stars"] == 9


def test_every_document_can_be_made_again_from_its_raw_bytes(corpus):
    for record in corpus.records():
        told = list(events(find([corpus], record["id"])))
        assert not any(event.trouble for event in told), record["id"]
        assert next((e.after for e in reversed(told) if e.after), record["text"]) == record["text"]


def test_other_datasets_are_loaded_and_a_selection_is_not(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    both = datasets.Dataset.from_list([{"text": "three"}, {"text": "four"}])
    datasets.DatasetDict({"valid": both}).save_to_disk(tmp_path / "splits")
    sources = [
        {"name": "folder", "dataset": {"path": "raw"}},
        {"name": "splits", "dataset": {"path": "splits", "split": "valid"}},
    ]
    corpus = made(recipe(tmp_path, sources=sources, steps=[]))
    assert [record["text"] for record in corpus.records()] == ["one", "two", "three", "four"]
    both.select([1]).save_to_disk(tmp_path / "some")
    loaded = recipe(tmp_path, "chosen", sources=[{"name": "a", "dataset": {"path": "some"}}], steps=[])
    assert [record["text"] for record in made(loaded).records()] == ["four"]
    for wrong, said in (
        ({"path": "./none"}, "is not there"),
        ({"path": "raw", "split": "test"}, "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(recipe(tmp_path, "wrong", sources=[{"name": "a", "dataset": wrong}], steps=[]))


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2"),
        ('{"name": "x"}', "no `path`"),
        ('{"path": "nowhere"}', "not there"),
        ('{"path": "one", "stars": "many"}', "stars: 'many'"),
        ('{"path": "one"}', "one name"),
    ],
)
def test_a_list_of_repositories_that_is_not_one(tmp_path, line, said):
    (tmp_path / "one").mkdir()
    (tmp_path / "list.jsonl").write_text('{"path": "one"}\n' + line)
    source = {"name": "a", "repositories": "list.jsonl", "paths": ["*.py"]}
    with pytest.raises(DataError, match=said):
        made(recipe(tmp_path, sources=[source], steps=[]))


def test_files_that_need_a_step_have_one(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["a"]))
    write_crawl(tmp_path / "b.warc.gz")
    source = {"name": "a", "paths": ["*.pdf"]}
    with pytest.raises(ConfigError, match="extract_pdf"):
        made(recipe(tmp_path, sources=[source], steps=["normalise_text"]))
    corpus = made(recipe(tmp_path, sources=[{"name": "a", "paths": ["*.warc.gz"]}], steps=[]))
    assert corpus.counts["quarantined"]["acquire/not_extracted"] == 1


def never(text: str) -> tuple[str, str]:
    time.sleep(600 if text else 0)
    return "", ""


def test_an_extractor_that_never_comes_back_is_left(monkeypatch):
    monkeypatch.setattr(formats.ExtractPdf, "extractor", staticmethod(never))
    step = STEPS["extract_pdf"](STEPS["extract_pdf"].Parameters(seconds=0.05))
    step.open()
    scan = document("bytes")
    scan.metadata["darwin"]["origin"]["format"] = "pdf"
    began = time.monotonic()
    assert step.apply(scan).quarantine == "extractor_timeout"
    assert time.monotonic() - began < 20
    step.close()


def test_a_document_of_a_gigabyte_is_not_read_into_memory(tmp_path):
    for name in ("a.txt", "b.pdf", "c.ipynb", "d.tex", "e.html"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 30)
    head = answer(b"", 1).replace(
        b"Content-Length: 63\r\n\r\nHTTP", b"Content-Length: 1073741824\r\n\r\nHTTP"
    )
    with (tmp_path / "f.warc").open("wb") as file:
        file.write(head)
        file.truncate(1 << 30)
    source = SourceRecipe(name="s", paths=["-"])
    tracemalloc.start()
    for format_, name in [("text", "a.txt"), ("pdf", "b.pdf"), ("notebook", "c.ipynb"), ("latex", "d.tex"),
                          ("html", "e.html"), ("warc", "f.warc")]:  # fmt: skip
        file = InputFile("s", str(tmp_path / name), name, format_, 1 << 30)
        assert next(read_file(file, source, 1_000_000)).fault == "too_large", name
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()
