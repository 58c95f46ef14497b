"""Level 8: turns that are grounded, a judge that can say no, and dialogues that know what they are about."""

from __future__ import annotations

import json
from itertools import count

import pytest
from pydantic import ValidationError

from megatron_davinci.cli.main import main
from megatron_davinci.darwin.converse import Converse
from megatron_davinci.darwin.dialogue_gates import Turn, dialogue_violations, turn_violations
from megatron_davinci.darwin.lineage import events, find
from tests.darwin.making import made, recipe

SPEAKERS = ["Student", "Teacher"]
TEXT = (
    "Copper melts at 1085 °C. Ada Novak measured it in 1902 with a furnace of her own design. "
    "Her result was not accepted, because the furnace lost heat through its door. The relation $Q = mc$ gives it."
)
TURNS = [
    Turn("Student", "At which temperature does copper melt?"),
    Turn("Teacher", "At 1085 °C, as Novak measured with a furnace of her own design."),
    Turn("Student", "Why did people doubt her result?"),
    Turn("Teacher", "Because heat was lost through the door, and $Q = mc$ says how much."),
]


def test_a_grounded_dialogue_passes():
    for number, turn in enumerate(TURNS):
        assert turn_violations(turn.text, TEXT, TURNS[:number], SPEAKERS) == []
    assert dialogue_violations(TURNS, TEXT, SPEAKERS, 4) == []


@pytest.mark.parametrize(
    "said,name",
    [
        (" ", "empty"), ("It melts at 1200 °C.", "ungrounded_number"), ("It melts at 1085 K.", "changed_unit"),
        ("Because Professor Castellan said so.", "ungrounded_name"), ("It took 5 minutes.", "ungrounded_number"),
        ("As $E = mc^2$ says, heat is lost.", "ungrounded_formula"), ("Yes.\nStudent: And why?", "speaks_for_others"),
        ("**Teacher:** Because of heat.", "speaks_for_others"), ("So, " * 600, "too_long"),
        ("At which temperature does copper melt?", "repeats_a_turn"),
        ("The text says that heat is lost.", "speaks_of_the_task"),
        ("Heat " + "is lost again and again through the same old door " * 9, "repetition"),
        ("Her result was accepted, because the furnace lost heat through its door.", "contradicts"),
    ],
)  # fmt: skip
def test_each_violation_of_a_turn_is_named(said, name):
    assert name in turn_violations(said, TEXT, TURNS[:2], SPEAKERS)


def test_each_violation_of_a_dialogue_is_named():
    assert dialogue_violations(TURNS[:3], TEXT, SPEAKERS, 4) == ["too_few_turns"]
    assert "turns_do_not_alternate" in dialogue_violations([*TURNS[:1], *TURNS], TEXT, SPEAKERS, 4)
    tea = [Turn(SPEAKERS[n % 2], "Would you like some tea with milk?") for n in range(4)]
    assert "about_something_else" in dialogue_violations(tea, TEXT, SPEAKERS, 4)


def conversing(folder, server, out="corpus", **step):
    (folder / "raw").mkdir(exist_ok=True)
    (folder / "raw" / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    given = {"endpoint": server.endpoint(timeout=5.0), "answers": f"{out}.sqlite", "turns": 4} | step
    sources = [{"name": "metals", "paths": ["raw/*.jsonl"], "licence": "CC0-1.0"}]
    return recipe(folder, out, sources=sources, steps=[{"converse": given}])


def agents(verdict="YES", said=lambda number: TURNS[number].text):
    def model(content):
        if "Answer with one word" in content:
            return verdict
        number = sum(turn.text in content.partition("So far:")[2] for turn in TURNS)
        return f"(thinking) <turn>{said(number)}</turn>"

    return model


def test_a_dialogue_is_a_document_that_says_what_it_is_about(tmp_path, server):
    server.model = agents()
    corpus = made(conversing(tmp_path, server, as_source="talks"))
    document, dialogue = sorted(corpus.records(), key=lambda record: len(record["id"]))
    assert document["text"] == TEXT and document["darwin"]["level"] == 0
    assert dialogue["id"] == f"{document['id']}/dialogue-0" and dialogue["source"] == "talks"
    assert dialogue["text"] == "\n\n".join(f"{turn.speaker}: {turn.text}" for turn in TURNS)
    assert dialogue["turns"] == [turn._asdict() for turn in TURNS] and dialogue["darwin"]["level"] == 8
    notes = dialogue["darwin"]["operations"][-1]["notes"]
    assert notes["of"] == document["id"] and [name.split()[0] for name in notes["agents"]] == [
        "dialogue_student",
        "dialogue_teacher",
    ]
    assert corpus.counts["input"] == 1 and corpus.counts["derived"] == 1 and corpus.counts["output"] == 2
    told = list(events(find([corpus], dialogue["id"])))
    assert told[-1].after == dialogue["text"] and not told[-1].trouble
    assert main(["data", "report", str(corpus.folder)]) == 0
    page = (corpus.folder / "report.html").read_text()
    assert "converse: dialogues by what came of them" in page and "L8 converse" in page
    asked = [json.dumps(request["messages"]) for request in server.requests]
    assert len(asked) == 5 and "You, Teacher," in asked[1] and "Student: At which" in asked[1]


def test_turns_are_said_again_and_a_dialogue_that_gets_nowhere_is_not_written(tmp_path, server):
    tries = count()
    server.model = agents(said=lambda number: "In 2024 it was." if next(tries) == 1 else TURNS[number].text)
    corpus = made(conversing(tmp_path, server))
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert (
        counts["converse/unused answers/ungrounded_number"] == 1
        and counts["converse/dialogues/accepted"] == 1
    )
    for name, model in (
        ("judged_bad", agents("NO")),
        ("too_few_turns", agents(said=lambda n: "In 2024." if n else "Q?")),
    ):
        server.model = model
        corpus = made(conversing(tmp_path, server, name, keep_documents=False))
        counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
        assert counts[f"converse/dialogues/{name}"] == 1 and corpus.counts["dropped"] == {
            "converse/no_dialogue": 1
        }


def test_agents_and_names_must_fit():
    endpoint = {"url": "http://127.0.0.1/v1", "model": "m"}
    for wrong in ({"speakers": ["A", "A"]}, {"speakers": ["A", "B", "C"]}, {"turns": 2, "least_turns": 4}):
        with pytest.raises(ValidationError, match="should be"):
            Converse.Parameters(endpoint=endpoint, **wrong)


def test_planted_violations_are_caught_and_clean_twins_pass():
    from megatron_davinci.darwin.complete import completion_violations
    from megatron_davinci.darwin.context_gates import context_violations
    from tests.darwin.higher_plants import completed_cases, context_cases, talk_cases

    def of_talk(talk):
        turns = talk.turns
        found = dialogue_violations(turns, talk.document, SPEAKERS, 4)
        return found + [
            v
            for n, t in enumerate(turns)
            for v in turn_violations(t.text, talk.document, turns[:n], SPEAKERS)
        ]

    judged = {
        "completion": [(c.kind, completion_violations(c.source, c.answer)) for c in completed_cases(1, 6)],
        "context": [(c.kind, context_violations(c.source, c.answer, c.related)) for c in context_cases(1, 4)],
        "dialogues": [(talk.kind, of_talk(talk)) for talk in talk_cases(1, 4)],
    }
    for name, cases in judged.items():
        missed = [kind for kind, found in cases if kind and not found]
        alarmed = [found for kind, found in cases if not kind and found]
        assert len(missed) <= 0.05 * len(cases) and len(alarmed) <= 1, (name, missed, alarmed)
