"""A document's life told again from its raw bytes, and the corpus's page."""

from __future__ import annotations

import json
import re

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import normalise
from megatron_davinci.darwin.lineage import events, find, find_corpora
from megatron_davinci.darwin.page import _histograms
from megatron_davinci.darwin.tally import Tally
from megatron_davinci.errors import DataError
from tests.darwin.making import made, raw_files, recipe


def life(corpus, ending):
    [record] = [
        record
        for kind in ("documents", "dropped")
        for record in corpus.records(kind)
        if record["id"].endswith(ending)
    ]
    return record, list(events(find([corpus], record["id"])))


def test_every_document_can_be_made_again_from_its_raw_bytes(corpus):
    changed = 0
    for kind in ("documents", "dropped"):
        for record in corpus.records(kind):
            found = find([corpus], record["id"])
            assert found.kind == kind and found.record == record
            told = list(events(found))
            assert [event.entry for event in told] == record["darwin"]["operations"]
            assert not any(event.trouble for event in told)
            assert all(event.settings is not None for event in told)
            texts = [event.after for event in told if event.after is not None]
            changed += len(texts)
            if texts:
                assert texts[-1] == record["text"]
    assert changed > 6


def test_the_raw_place_is_that_of_the_documents_bytes(corpus):
    record, _ = life(corpus, "help/k3")
    origin = record["darwin"]["origin"]
    with open(origin["path"], "rb") as file:
        file.seek(origin["first"])
        assert json.loads(file.read(origin["bytes"]))["key"] == "k3"


def test_what_cannot_be_shown_any_more_is_said(tmp_path, monkeypatch):
    raw_files(tmp_path / "raw", documents=2)
    corpus = made(recipe(tmp_path))
    monkeypatch.setattr(normalise.NormaliseText, "version", normalise.NormaliseText.version + 1)
    _, told = life(corpus, "note.txt")
    [event] = [event for event in told if event.entry["name"] == "normalise_text"]
    assert event.after is None and "of version" in event.trouble
    monkeypatch.undo()
    path = tmp_path / "raw" / "note.txt"
    path.write_text("another note")
    _, told = life(corpus, "note.txt")
    assert "cannot be read" in told[0].trouble or "changed" in told[0].trouble
    path.unlink()
    _, told = life(corpus, "note.txt")
    assert "gone" in told[0].trouble and all(event.after is None for event in told)


def test_a_document_that_is_not_there(folder, corpus):
    assert [found.folder for found in find_corpora(corpus.folder)] == [corpus.folder]
    with pytest.raises(DataError, match="identifier like code/"):
        find([corpus], "help/nobody")


def test_the_command_tells_a_life(folder, corpus, capsys):
    assert main(["data", "lineage", "pages/raw/page1.html", "--corpus", str(corpus.folder)]) == 0
    shown = capsys.readouterr().out
    assert "dropped by exact_dedup: exact_duplicate" in shown and "of: pages/raw/again.html" in shown
    assert re.search(r"L1 extract_html +changed", shown) and "-<html>" in shown and "+Heading" in shown
    assert main(["data", "lineage", "pages/raw/note.txt", "--corpus", str(corpus.folder), "--full"]) == 0
    assert "\\x07" in capsys.readouterr().out, "a control character is shown, not sent to the terminal"
    assert main(["data", "lineage", "code/raw/abc.py", "--corpus", str(corpus.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "documents" and told["operations"][0]["entry"]["name"] == "acquire"


def test_scores_that_are_no_finite_numbers_are_in_no_histogram():
    tally = Tally()
    for value in (0.5, float("nan"), float("inf"), -float("inf"), 1.7e308, -1.7e308, 10**400):
        tally.scored("step", {"score": value}, dropped=False)
    [bins] = tally.histograms.values()
    assert sum(bins.values()) == 3
    statistics = tally.dump()
    statistics["histograms"]["step/score/kept"]["-10000"] = 1  # as they were once written
    [plot] = _histograms(statistics)
    assert len(plot.series[0].x) < 8000


def test_the_page_shows_the_funnel_and_examples(corpus, capsys):
    assert main(["data", "report", str(corpus.folder)]) == 0
    page = (corpus.folder / "report.html").read_text()
    assert capsys.readouterr().out.strip().endswith("report.html")
    counts = corpus.counts
    assert f"{counts['output']:,}" in page and "exact dedup: exact duplicate" in page
    assert "pages/raw/again.html" in page and "Turned away by exact_dedup" in page
    assert "<script" not in page and "http://" not in re.sub(r'xmlns="[^"]+"', "", page.split("<main>")[0])
