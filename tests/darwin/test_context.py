"""Level 6: passages that are found, additions that are cited and backed, and everything else refused by name."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin.context_gates import (
    context_violations,
    sentence_counts,
    sentences_of,
    with_quotations,
)
from megatron_davinci.darwin.lineage import events, find
from tests.darwin.making import made, recipe
from tests.darwin.model_server import passage

TIDES = (
    "The tide rises twice a day in most harbours. Pilots wait for it before they bring large ships in. "
    "At the quay of Brest the water stands 7 m higher at its peak."
)
MOON = (
    "The gravity of the Moon pulls the water of the ocean toward it, and so causes the tide in every harbour. "
    * 2
)
TRADE = (
    "Pilots are sailors who guide large ships through narrow harbours. Each harbour trains its own pilots."
)
SHIPS = "A ship of 300 m needs deep water. Large ships draw 16 m, and harbours dredge channels for ships."
GOOD = (
    "The tide rises twice a day in most harbours. The gravity of the Moon causes the tide [[1]]. Pilots wait for it "
    "before they bring large ships in. Pilots are “sailors who guide large ships” [[2]]. "
    "At the quay of Brest the water stands 7 m higher at its peak."
)
RELATED = [MOON, TRADE]


def test_what_is_cited_and_backed_passes():
    assert context_violations(TIDES, GOOD, RELATED) == [] == context_violations(TIDES, TIDES, RELATED)


@pytest.mark.parametrize(
    "old,new,name",
    [
        (" [[1]]", "", "uncited_fact"), (" [[1]]", " [[2]]", "fact_not_in_citation"),
        ("[[1]]", "[[3]]", "unknown_citation"), ("[[1]]", "[[0]]", "unknown_citation"),
        ("[[1]]", "[[x]]", "unknown_citation"), ("sailors who guide", "captains who steer", "misquoted"),
        ("[[1]]", "within 6 hours [[1]]", "fact_not_in_citation"), ("7 m", "7 km", "changed_unit"),
        ("causes the tide", "feeds hungry polar elephants", "citation_does_not_say_it"),
        ("At the quay of Brest the water stands 7 m higher at its peak.", "", "dropped_number"),
        (GOOD, TIDES.replace("twice a day", "twice a day, as everyone knows,"), "cites_nothing"),
        ("At the quay", "Saint Malo is larger. At the quay", "uncited_fact"),
    ],
)  # fmt: skip
def test_each_violation_is_named(old, new, name):
    assert old in GOOD and name in context_violations(TIDES, GOOD.replace(old, new), RELATED)


def test_a_text_with_marks_of_its_own_is_left_alone():
    assert context_violations("See [[2]] there.", "See [[2]] there. And more [[1]].", RELATED) == [
        "marks_in_the_text"
    ]


@pytest.mark.parametrize(
    "program,found",
    [
        ("quote(2, 1)", "Pilots are sailors who guide large ships through narrow harbours. [[2]]\n\n" + TIDES),
        ("nothing()", TIDES), ("quote(3, 1)", None), ("quote(1, 9)", None), ("quote(1)", None), ("", None),
        ("nothing()\nquote(1, 1)", None), ("import os", None), ("quote(2, 2)\n" * 7, None), ("quote(True, 1)", None),
    ],
)  # fmt: skip
def test_sentences_that_a_program_names_are_copied(program, found):
    assert with_quotations(TIDES, program, RELATED) == found
    if found is not None:
        assert context_violations(TIDES, found, RELATED) == []


def test_headings_are_not_offered_for_quotation():
    passages = [
        "Examples\n========\n\nThe gravity of the moon raises tides twice a day.",
        "See also",
        "ocean.tides.gravity",
    ]
    assert sentence_counts(passages) == [1, 0, 0]
    assert "gravity" in sentences_of(passages) and "Examples" not in sentences_of(passages)


def corpus_of(folder, server, out="corpus", **step):
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    texts = {
        "tides": TIDES,
        "moon": MOON,
        "trade": TRADE,
        "ships": SHIPS,
        "wheat": "Wheat grows in summer. " * 8,
    }
    for name, text in texts.items():
        (raw / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    given = {"endpoint": server.endpoint(timeout=5.0), "answers": f"{out}.sqlite", "tries": 1} | step
    steps = [{"relate": {"passages": 3}}, {"contextualise": given}]
    sources = [{"name": "sea", "paths": ["raw/*.jsonl"], "licence": "CC0-1.0"}]
    return made(recipe(folder, out, sources=sources, steps=steps, limits={"task_bytes": 600}), workers=1)


def test_documents_get_passages_of_others_and_say_what_they_cite(tmp_path, server):
    def model(content):
        text, mark = passage(content)
        numbers = [n for n in (1, 2, 3) if f"[[{n}]] The gravity of the Moon" in content]
        if text != TIDES or not numbers:
            return f"<{mark}>{text}</{mark}>"
        cited = text.replace(
            "harbours. P", f"harbours. The gravity of the Moon causes the tide [[{numbers[0]}]]. P"
        )
        return f"<{mark}>{cited}</{mark}>"

    server.model = model
    corpus = corpus_of(tmp_path, server)
    records = {record["id"].split("/")[-1].split(".")[0]: record for record in corpus.records()}
    assert len(records) == 5
    tides = records["tides"]
    moon = records["moon"]["id"]
    assert f"causes the tide [[{moon}]]." in tides["text"] and tides["darwin"]["level"] == 6
    assert moon in [each["id"] for each in tides["related"]] and len(tides["related"]) == 3
    assert tides["id"] not in [each["id"] for each in tides["related"]]
    entry = tides["darwin"]["operations"][-1]
    assert entry["notes"]["cites"] == {moon: 1} and entry["notes"]["chunks"] == {"put_into_context": 1}
    assert records["moon"]["text"] == MOON and records["moon"]["darwin"]["level"] == 2, "nothing was added"
    assert not records["wheat"].get("related") and records["wheat"]["darwin"]["level"] == 2
    assert main(["data", "report", str(corpus.folder)]) == 0
    assert "L6 contextualise" in (corpus.folder / "report.html").read_text()
    told = list(events(find([corpus], tides["id"])))
    assert told[-1].after == tides["text"] and told[-1].before == TIDES and not told[-1].trouble


def test_what_breaks_a_gate_leaves_the_document_as_it_was(tmp_path, server):
    server.model = lambda content: "<{1}>{0} Captain Nemo saw 4711 squids.</{1}>".format(*passage(content))
    corpus = corpus_of(tmp_path, server)
    assert {record["text"] for record in corpus.records()} >= {TIDES, MOON, TRADE}
    assert {record["darwin"]["level"] for record in corpus.records()} == {2}
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert counts["contextualise/unused answers/cites_nothing"] >= 3
    assert counts["contextualise/documents/nothing related"] >= 1
