"""Levels 6 and 8 with a real model behind our own server: its words are poor, and what is written holds."""

from __future__ import annotations

import json
import runpy

import pytest

from megatron_davinci.darwin.context_gates import CITATION
from megatron_davinci.darwin.dialogue_gates import Turn, dialogue_violations, turn_violations
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.pair_gates import quoted
from tests.darwin import tiny_model
from tests.darwin.making import made, recipe

pytestmark = pytest.mark.long  # the model is trained for half a minute


@pytest.fixture(scope="module")
def taught_url(tmp_path_factory):
    run = tiny_model.write_run(tmp_path_factory.mktemp("taught") / "model", every_kind=True)
    with tiny_model.served(run) as url:
        yield url


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, taught_url):
    folder = tmp_path_factory.mktemp("levels")
    tiny_model.prompt_files(folder)
    (folder / "raw").mkdir()
    texts = [" ".join(part.split()) for text in tiny_model.pages(12) for part in text.split("\n\n")]
    texts = [text for text in texts if 60 < len(text) < 110][:24]
    (folder / "raw" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asks = {"endpoint": {"url": taught_url, "model": "tiny", "max_tokens": 40, "timeout": 120.0, "concurrency": 4},
            "answers": "answers.sqlite"}  # fmt: skip
    steps = [
        {"relate": {"passages": 1, "size": 120}},
        {"contextualise": asks | {"prompt": "tiny_quote.yaml", "chunk": 120}},
        {"converse": asks | {"prompt": "tiny_judge.yaml", "agents": ["tiny_student.yaml", "tiny_teacher.yaml"],
                             "turns": 4, "least_turns": 2, "as_source": "talks"}},
    ]  # fmt: skip
    return made(recipe(folder, sources=[{"name": "help", "paths": ["raw/*.jsonl"]}], steps=steps))


def test_what_is_put_into_context_quotes_what_is_there(corpus):
    records = {record["id"]: record for record in corpus.records() if record["source"] == "help"}
    raised = [record for record in records.values() if record["darwin"]["level"] == 6]
    assert raised
    for record in raised:
        [cited] = record["related"]
        said, _, rest = record["text"].partition(f" [[{cited['id']}]]\n\n")
        assert rest and quoted(said, cited["text"]) and cited["id"] in records
        assert record["darwin"]["operations"][2]["notes"]["cites"] == {cited["id"]: 1}
        assert not CITATION.search(record["text"]), "marks are identifiers by now"
        [event] = [
            each for each in events(find([corpus], record["id"])) if each.entry["name"] == "contextualise"
        ]
        assert event.before == rest and event.after == record["text"] and not event.trouble


def test_dialogues_pass_every_gate_and_say_what_they_are_about(corpus):
    records = {record["id"]: record for record in corpus.records()}
    talks = [record for record in records.values() if record["source"] == "talks"]
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    judged = {key: count for key, count in counts.items() if key.startswith("converse/dialogues/")}
    assert sum(judged.values()) == len(records) - len(talks)
    assert judged.get("converse/dialogues/accepted", 0) == len(talks) > 0
    for record in talks:
        about = records[record["darwin"]["operations"][-1]["notes"]["of"]]["text"]
        turns = [Turn(**turn) for turn in record["turns"]]
        assert record["darwin"]["level"] == 8
        assert dialogue_violations(turns, about, ["Student", "Teacher"], 2) == []
        for number, turn in enumerate(turns):
            assert turn_violations(turn.text, about, turns[:number], ["Student", "Teacher"]) == []


def test_the_example_finds_that_all_of_it_holds(corpus):
    found = runpy.run_path("examples/quickstart_levels/run.py")["looked_at"](corpus)
    for level in ("level 6", "level 8"):
        assert found[level]["raised"] == found[level]["holding"] > 0, found[level]
    assert found["level 7"]["documents"] == found["level 7"]["raised"] == 0
