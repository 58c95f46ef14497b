"""Lines and paragraphs that stand in several documents, over tasks and sources."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.page import write_corpus_report
from megatron_davinci.darwin.pieces import DedupPieces, pieces, runs
from tests.darwin.making import made, prose, recipe
from tests.darwin.test_rules import document

NOTICE = "This page is kept by nobody, and what it says is of no warranty at all."
FOOTER = "Copyright of the authors of this page.\nAll rights are reserved by them, whoever they may be."


@given(st.lists(st.sampled_from(["a", "b c", "\n", "\n\n", " ", "\n \n", "\r"])).map("".join))
def test_joined_they_are_the_text(text):
    assert "".join(pieces(text, "line")) == text == "".join(pieces(text, "paragraph"))


def test_runs():
    assert runs(np.array([0, 1, 2, 5, 7, 8])) == [[0, 3], [5, 6], [7, 9]]


def test_the_first_stays_over_sources_and_a_life_can_be_told(tmp_path):
    parts = [part for text in prose()[:6] for part in text.split("\n\n") if len(part) > 120]
    texts = {
        "a": [f"{NOTICE}\n\n{parts[0]}\n\n\n{FOOTER}", f"{parts[1]}\n\n{NOTICE}"],
        "b": [
            f"  {NOTICE.replace(' ', '  ')}\n\n{parts[2]}\n\nshort\n\n{FOOTER}",
            f"{NOTICE}\n\n{FOOTER}",
            "short",
        ],
    }
    raw = tmp_path / "raw"
    raw.mkdir()
    for source, own in texts.items():
        lines = [json.dumps({"text": text, "key": f"{i}"}) for i, text in enumerate(own)]
        (raw / f"{source}.jsonl").write_text("\n".join(lines))
    sources = [{"name": name, "paths": [f"raw/{name}.jsonl"], "id_field": "key"} for name in texts]
    corpus = made(recipe(tmp_path, sources=sources, steps=["dedup_pieces"], limits={"task_bytes": 500}))
    assert corpus.manifest["input"]["tasks"] == 2
    assert {record["id"]: record["text"] for record in corpus.records()} == {
        "a/0": texts["a"][0], "a/1": parts[1], "b/0": f"{parts[2]}\n\nshort", "b/2": "short",
    }  # fmt: skip
    [gone] = corpus.records("dropped")
    assert gone["id"] == "b/1" and gone["fate"]["reason"] == "nothing_left"
    assert corpus.counts["dropped"] == {"dedup_pieces/nothing_left": 1}
    told = list(events(find([corpus], "b/0")))
    assert told[-1].after == f"{parts[2]}\n\nshort" and told[-1].before == texts["b"][0]
    assert told[-1].entry["notes"] == {"removed": [[0, 1], [3, 4]], "of": "a/0"}
    counted = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert counted["dedup_pieces/removed_characters"] > 3 * len(NOTICE)
    page = write_corpus_report(corpus).read_text()
    assert "removed characters" in page and f"{counted['dedup_pieces/removed_characters']:,}" in page


@pytest.mark.parametrize(
    "parameters, left",
    [
        ({}, ["one\ntwo\nthree\nab", "ab\nfour", "five\n\nab"]),
        ({"occurrences": 3}, ["one\ntwo\nthree\nab", "two\nab\nfour", "five\n\nab"]),
        ({"keep_first": False}, ["three\nab", "ab\nfour", "five\n\nab"]),
        ({"min_characters": 2, "min_left": 5}, ["one\ntwo\nthree\nab", "nothing_left", "nothing_left"]),
    ],
)
def test_what_counts_as_repeated(tmp_path, parameters, left):
    tasks = [["one\ntwo\nthree\nab"], ["one\ntwo\nab\nfour", "one\nfive\n\nab"]]
    step = DedupPieces(DedupPieces.Parameters(**{"unit": "line", "min_characters": 3} | parameters))
    for task, texts in enumerate(tasks):
        step.begin(tmp_path, task)
        step.skip()
        for text in texts:
            step.sketch(document(text))
        step.finish()
    found = []
    for task, verdicts in step.solve(tmp_path, range(2)):
        by_place = {verdict.place: verdict for verdict in verdicts}
        for place, text in enumerate(tasks[task], start=1):
            verdict = by_place.get(place)
            outcome = step.carry_out(document(text), verdict.reason, verdict.notes) if verdict else None
            found.append((outcome.text or outcome.drop) if outcome else text)
    assert found == left
