"""Level 9: a world that a model writes is believed as far as a program sees, and what comes about in it is told."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_davinci.darwin import endpoint, world_driver, world_texts, worlds
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.simulate import Simulate
from megatron_davinci.darwin.trials import LIMITS
from tests.darwin import world_plants
from tests.darwin.making import made, recipe
from tests.darwin.model_server import passage
from tests.darwin.world_plants import KINDS, PLANTS, Case


class ByRules(Simulate):
    """The step's own judgement of a program, with nothing kept and no model asked."""

    async def ran(self, asked, run):
        return await asyncio.to_thread(run)

    def judged(self, case: Case) -> str:
        """Why a world is none; empty for one that is."""
        found = asyncio.run(self.believed(case.program, case.passage, Counter()))
        return found if isinstance(found, str) else ""


def by_rules(**given) -> ByRules:
    where = {"url": "http://127.0.0.1:1/v1", "model": "none"}
    return ByRules(Simulate.Parameters.model_validate({"endpoint": where, "judge": False, **given}))


def drawn(name: str, seed: int = 3) -> tuple[world_plants.Kind, random.Random]:
    draw = random.Random(f"{name} {seed}")
    return draw.choice(KINDS)(draw), draw


CAUGHT = {
    "law_invented": "law_not_in_the_passage", "law_says_nothing": "law_cannot_fail", "one_law": "too_few_laws",
    "law_asks_the_world": "law_asks_the_world", "laws_are_blind": "cannot_notice", "rule_is_broken": "law_broken",
    "chance": "differs", "order_of_a_set": "differs", "kept_aside": "differs or law_broken", "raises": "raises",
    "starts_alike": "starts_alike", "no_number": "no_state", "other_names": "other_names",
    "leaves_early": "world_early", "clock": "imports_other",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CAUGHT))
def test_a_world_with_one_thing_wrong_is_none_and_its_clean_twin_is_one(name):
    kind, draw = drawn(name)
    program = PLANTS[name](kind, draw)
    assert by_rules().judged(Case(name, kind.passage, program)) in CAUGHT[name].split(" or ")


@pytest.mark.parametrize("name", ["lamps", "orchard"])
def test_the_examples_worlds_are_believed(name):
    program = Path(f"examples/worlds/worlds/{name}.py").read_text()
    assert by_rules(documents="worlds").judged(Case("", worlds.docstring_of(program), program)) == ""


@pytest.mark.parametrize("kind", KINDS[::2], ids=lambda kind: kind.__name__)
def test_clean_worlds_arebelieved(kind):
    drawn = kind(random.Random(5))
    assert by_rules().judged(Case("", drawn.passage, drawn.program)) == ""


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_of_wrong_world_is_caught(seed):
    step = by_rules()
    for case in world_plants.cases(seed, len(PLANTS)):
        assert (step.judged(case) != "") == (case.kind != ""), (case.kind, case.program)


def acts(content: str, names: dict) -> str:
    """Who acts in a world, and knows how it goes: from its first start nearer to the aim, from others it talks."""
    text, mark = re.findall(r"<(passage\d*)>\n(.*?)\n</\1>", content, re.DOTALL)[-1][::-1]
    aim = re.search(r"Your aim: (.*)", content)[1]
    state = names["start"](0)
    if f"At first: {world_texts.state_text(state)}." not in text:
        return "I would rather not."
    for action in re.findall(r"^Done: ([^.]+)\.", text, re.MULTILINE):
        state, _ = names["step"](dict(state), action)
    ways = [(state, [])]
    for at, way in ways:
        if way and aim in world_texts.state_text(at):
            return f"<{mark}>{way[0]}</{mark}>"
        if len(way) < 6:
            ways += [(names["step"](dict(at), one)[0], [*way, one]) for one in names["actions"](dict(at))]
    raise AssertionError(f"{aim} cannot be reached")


def test_corpus_of_worlds_with_every_answer_as_the_world_gives_it(tmp_path, server, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)
    draw = random.Random(11)
    good, refused, false = (kind(draw) for kind in (world_plants.tank, world_plants.ferry, world_plants.shop))
    programs = {kind.passage: kind.program for kind in (good, refused)}
    programs[false.passage] = false.program.replace(*false.wrong)

    def model(content: str) -> str:
        text, _ = passage(content)
        if "is said to be this sentence" in content:  # the judge
            return "NO" if "travellers at most" in content else "YES"
        return (
            f"A world:\n```python\n{programs[text]}```\n" if text in programs else "There is no rule in it."
        )

    names: dict = {}
    exec(good.program, names)  # ours, and so trusted
    server.model = lambda content: acts(content, names) if "Your aim" in content else model(content)
    (tmp_path / "raw").mkdir()
    texts = {
        "good": good.passage,
        "refused": refused.passage,
        "false": false.passage,
        "bare": "Nothing. " * 9,
    }
    for name, text in texts.items():
        (tmp_path / "raw" / f"{name}.txt").write_text(text)
    sources = [{"name": "rules", "paths": ["raw/*.txt"], "licence": "MIT"}]
    given = {"endpoint": server.endpoint(timeout=5.0), "answers": str(tmp_path / "a.sqlite"), "tries": 1,
             "faults": 8, "starts": 2, "steps": 6, "questions": 3, "as_source": "worlds",
             "agent": "act_in_world"}  # fmt: skip
    steps = ["normalise_text", {"simulate": given}]
    corpus = made(recipe(tmp_path, sources=sources, steps=steps))
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert {key.split("/worlds/")[1]: number for key, number in counts.items() if "/worlds/" in key} == {
        "accepted": 1, "law_judged_wrong": 1, "law_broken": 1, "no_program": 1,
    }  # fmt: skip
    aims = {key.split("/aims/")[1]: number for key, number in counts.items() if "/aims/" in key}
    assert aims == {"accepted": 1, "no_action": 1}
    assert corpus.counts["input"] == 4 and corpus.counts["derived"] == 1 + 2 + 1 + 3
    records = {record["id"]: record for record in corpus.records()}
    world = next(record for name, record in records.items() if name.endswith("/world-0"))
    assert world["source"] == "worlds" and world["licence"] == "MIT" and world["darwin"]["level"] == 9
    assert good.program.strip() in world["text"]
    assert "- The pump only changes when someone touches its switch." in world["text"]
    asked = [record for name, record in records.items() if "/question-" in name]
    assert len(asked) == 3
    for record in asked:
        course = record["darwin"]["operations"][-1]["notes"]["course"]
        state = course["start"]
        for action in course["actions"]:
            state, _ = names["step"](dict(state), action)
        assert record["response"].endswith(f"\\boxed{{{world_texts.shown(state[course['asked']])}}}")
        assert record["text"] == record["prompt"] + record["response"] and world["text"] in record["prompt"]
    course = next(record["text"] for name, record in records.items() if name.endswith("/course-1"))
    done = re.findall(r"^Done: ([^.]+)\. .*\nNow: litres: (\d+)", course, re.MULTILINE)
    state = names["start"](1)
    for action, litres in done:
        state, _ = names["step"](dict(state), action)
        assert str(state["litres"]) == litres
    assert len(done) == 6
    (aim,) = (record for name, record in records.items() if name.endswith("/aim-0"))
    notes = aim["darwin"]["operations"][-1]["notes"]["course"]
    state = names["start"](notes["start"])
    for action in notes["actions"]:
        state, _ = names["step"](dict(state), action)
    assert notes["aim"] in world_texts.state_text(state)
    assert aim["text"].endswith(f"\n\nThat was the aim: {notes['aim']}.\n")
    # All of it again, and a document's life, from what is on record: nobody is asked and nothing is run.
    server.forget()
    monkeypatch.setattr(worlds, "run_python", None)
    again = made(recipe(tmp_path, "again", sources=sources, steps=steps))
    assert server.requests == [] and list(again.records()) == list(corpus.records())
    told = list(events(find([corpus], asked[0]["id"])))
    assert told[-1].after == asked[0]["text"] and [event.trouble for event in told if event.trouble] == []


def test_documents_that_are_worlds_need_no_model(tmp_path, server):
    lift = Path("examples/worlds/worlds/lift.py").read_text()
    texts = {
        "whole": lift,
        "silent": lift.partition('"""\n\n\n')[2],
        "broken": lift.replace('state["in the lift"] < 3', 'state["in the lift"] < 4'),
    }
    (tmp_path / "raw").mkdir()
    for name, text in texts.items():
        (tmp_path / "raw" / f"{name}.py").write_text(text)
    given = {"endpoint": server.endpoint(), "answers": str(tmp_path / "a.sqlite"), "documents": "worlds",
             "judge": False, "faults": 6, "starts": 3, "questions": 2, "keep_documents": False}  # fmt: skip
    sources = [{"name": "worlds", "paths": ["raw/*.py"], "licence": "MIT"}]
    server.forget()
    corpus = made(recipe(tmp_path, sources=sources, steps=[{"simulate": given}]))
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert server.requests == [] and {
        key: number for key, number in counts.items() if key.startswith("simulate/worlds/")
    } == {
        "simulate/worlds/accepted": 1, "simulate/worlds/law_broken": 1, "simulate/worlds/law_not_in_the_passage": 1,
    }  # fmt: skip
    assert {record["id"].partition(".py/")[2] for record in corpus.records()} == {
        "world-0", *(f"world-0/course-{n}" for n in range(3)), "world-0/question-0", "world-0/question-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, wrong",
    [
        (("def step(state, action)", "def step(state)"), "no_step"),
        (("def start(number)", "def begin(number)"), "no_start"),
        (("before, action, after", "before, after"), "no_law"),
        (("def actions(state):", "def actions(state, *more):"), "no_actions"),
        (("def actions(state):", "def actions(state:"), "no_python"),
        (("import", "import"), ""),
    ],
)
def test_what_is_wrong_with_a_world_by_its_syntax(change, wrong):
    kind, _ = drawn("syntax")
    found = worlds.world_of(kind.program.replace(*change), kind.passage, 10_000, 2)
    assert found == wrong if wrong else isinstance(found, worlds.World)
    assert worlds.world_of(kind.program, kind.passage, 100, 2) == "too_long"


def world(**functions) -> world_driver.World:
    """A world out of functions; by default a counter that goes up and down."""
    names = {
        "start": lambda number: {"n": number},
        "actions": lambda state: ["up", "down"],
        "step": lambda state, action: ({"n": state["n"] + (1 if action == "up" else -1)}, "It moves."),
        "law_one": lambda before, action, after: abs(after["n"] - before["n"]) == 1,
    }
    return world_driver.World(names | functions)


@pytest.mark.parametrize(
    "functions, trouble",
    [
        ({}, None),
        ({"start": lambda number: {}}, "no_state"),
        ({"start": lambda number: {"n": float("inf")}}, "no_state"),
        ({"start": lambda number: {"n": 10**400}}, "no_state"),
        ({"start": lambda number: {1: 1}}, "no_state"),
        ({"start": lambda number: 1 / 0}, "raises"),
        ({"actions": lambda state: "up"}, "no_actions"),
        ({"actions": lambda state: ["up", "up"]}, "no_actions"),
        ({"actions": lambda state: ["up\n"]}, "no_actions"),
        ({"actions": lambda state: {"up", "down"}}, "no_actions"),
        ({"step": lambda state, action: state}, "no_step"),
        ({"step": lambda state, action: ({"n": 1, "m": 2}, "It moves.")}, "other_names"),
        ({"step": lambda state, action: ({"n": state["n"] + 2}, "It moves.")}, "law_broken"),
        ({"step": lambda state, action: ({"n": state["n"] + 1}, " ")}, "says_nothing"),
        ({"law_two": lambda before, action, after: 1 / 0}, "law_broken"),
    ],
)
def test_what_no_world_may_do(functions, trouble):
    told = world(**functions).episode({"start": 0, "steps": 3})
    assert (told["trouble"] or [None])[0] == trouble


def test_a_world_gets_copies_and_its_other_ways_are_told():
    def step(state, action):
        state["n"] += 1 if action == "up" else -1
        return state, "It moves."

    told = world(step=step).episode({"start": 5, "actions": ["up", "up", "down"]})
    assert [state["n"] for state in told["states"]] == [5, 6, 7, 6]
    assert told["others"] == [[["down", {"n": 4}]], [["down", {"n": 5}]], [["up", {"n": 8}]]]
    assert told["possible"] == [["up", "down"]] * 4
    told = world().episode({"state": {"n": 2}, "actions": ["up", "fly"]})
    assert told["trouble"] == ["impossible", "fly"] and told["states"] == [{"n": 2}, {"n": 3}]


def test_aims_are_values_that_came_up_late_and_not_before():
    told = {
        "episodes": [
            {
                "states": [
                    {"n": 1, "on": False},
                    {"n": 2, "on": False},
                    {"n": 1, "on": True},
                    {"n": 2, "on": False},
                ]
            },
            {"states": [{"n": 0, "on": False}, {"n": 5, "on": True}]},
        ]
    }
    assert world_texts.drawn_aims(told, "a program", 9) == [world_texts.Aim(0, "on", True)]
    assert world_texts.drawn_aims(told, "a program", 9)[0].text == "on: yes"
    assert world_texts.drawn_aims({"episodes": told["episodes"][1:]}, "a program", 9) == []


def test_laws_that_cannot_fail():
    some = world(
        law_two=lambda before, action, after: True, law_three=lambda before, action, after: after["n"] < 999
    )
    some.episode({"start": 0, "steps": 4})
    assert some.empty_laws() == ["law_two", "law_three"]


def test_a_world_made_wrong_says_what_its_laws_notice():
    kind = world_plants.robot(random.Random(2))
    found = worlds.world_of(kind.program, kind.passage, 10_000, 2)
    plan = worlds.Plan.drawn(2, 8)
    course = worlds.course_of(json.loads(worlds.played(found.program, plan, LIMITS)))
    outcome = lambda text: worlds.fault_outcome(text, plan, course, LIMITS)  # noqa: E731
    assert outcome(kind.program) == "unseen"
    assert outcome(kind.program.replace('["charge"] - 1', '["charge"] - 2')) == "noticed"
    assert outcome(kind.program.replace("return new, ", "return ")) == "stops"
    assert (
        outcome(kind.program.replace('MOVES] if state["charge"] > 0', 'MOVES] if state["charge"] > 5'))
        == "passes"
    )
    assert all("def start" in fault and "def law_0" in fault for fault in worlds.faults_of(found, 5))
