"""Grades by a model that is asked: who stays by them, what is said of those without one, and what they train."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import endpoint
from tests.darwin.making import made, recipe
from tests.darwin.model_server import passage
from tests.darwin.test_selection import labelled


def grader(content: str) -> str:
    """A model to which prose is worth more than code, and that has nothing to say of some."""
    text, mark = passage(content)
    prose = sum(line.startswith((" ", "\t", "def ", "class ", "return")) for line in text.splitlines())
    grade = 1 if prose > 0.5 * len(text.splitlines()) else 4
    return f"<{mark}>{'good' if text.startswith('unclear') else grade}</{mark}>"


@pytest.fixture(autouse=True)
def fresh(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)
    server.forget()
    server.model, server.fault, server.delay, server.finish = grader, lambda: "", 0.0, "stop"


def rated(folder, server, out="corpus", count=60, **given):
    rows = [{"text": text, "true": label} for label, text in labelled(1)[:count]]
    rows.append({"text": "unclear " * 20, "true": "none"})
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "endpoint": server.endpoint(timeout=5.0),
        "answers": str(folder / "a.sqlite"),
        "characters": 500,
    } | given
    return made(recipe(folder, out, sources=[{"name": "a", "paths": ["x.jsonl"]}], steps=[{"rate": given}]))


def test_documents_are_graded_and_their_text_left(tmp_path, server):
    corpus = rated(tmp_path, server, least=3)
    kept, gone = (list(corpus.records(kind)) for kind in ("documents", "dropped"))
    assert len(kept) + len(gone) == 60 and min(len(kept), len(gone)) > 5
    texts = {text for _, text in labelled(1)[:60]}
    for record in [*kept, *gone]:
        operation = record["darwin"]["operations"][-1]
        assert record["text"] in texts and record["darwin"]["level"] == 3
        assert operation["notes"]["prompt"].startswith("rate_educational 1 (")
        assert str(int(operation["scores"]["quality"])) == record["labels"]["quality"]
    assert {record["labels"]["quality"] for record in kept} == {"4"}
    assert corpus.counts["dropped"] == {"rate/low_quality": len(gone)}
    # Asked twice for a grade, and none given: it is not lost in silence.
    assert corpus.counts["quarantined"] == {"rate/not_rated": 1} and len(server.requests) == 62
    assert all(len(passage(body["messages"][-1]["content"])[0]) <= 500 for body in server.requests)


def test_grades_train_a_classifier(tmp_path, server, capsys):
    corpus = rated(tmp_path, server, count=200, on_failure="keep")
    files = [str(path) for path in corpus.files()]
    labels = ["--label-field", "labels.quality", "--at-least", "3"]
    command = ["data", "train-classifier", *files, *labels, "--bits", "14", "--out", str(tmp_path / "made")]
    assert main(command) == 2
    assert "has no field 'labels.quality'" in capsys.readouterr().err, "the one that has no grade"
    corpus = rated(tmp_path, server, "graded", count=200)
    command[2 : 2 + len(files)] = [str(path) for path in corpus.files()]
    assert main(command) == 0
    described = json.loads((tmp_path / "made" / "classifier.json").read_text())
    assert described["labels"] == ["negative", "positive"]
    assert described["trained"]["held_out_auc"]["positive"] > 0.8
