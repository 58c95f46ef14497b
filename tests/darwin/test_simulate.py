"""Level 9: a world that a model writes is believed as far as a program sees, and what comes about in it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_davinci.darwin import endpoint, world_driver, world_rules, world_texts, worlds
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
    "law_asks_the_world": "law_asks_the_world", "laws_are_blind": "law_cannot_fail", "rule_is_broken": "law_broken",
    "chance": "draws_lots", "order_of_a_set": "differs", "kept_aside": "differs or law_broken", "raises": "raises",
    "starts_alike": "starts_alike", "no_number": "no_state", "other_names": "other_names",
    "leaves_early": "world_early", "clock": "imports_other",
}  # fmt: skip


LATE = (
    "chance",
    "clock",
    "law_asks_the_world",
    "law_invented",
    "leaves_early",
    "no_number",
    "one_law",
    "other_names",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LATE else []) for name in sorted(CAUGHT)]
)
def test_a_world_with_one_thing_wrong_is_none_and_its_clean_twin_is_one(name):
    kind, draw = drawn(name)
    program = PLANTS[name](kind, draw)
    assert by_rules().judged(Case(name, kind.passage, program)) in CAUGHT[name].split(" or ")


@pytest.mark.long
@pytest.mark.parametrize("name", ["lamps", "orchard"])
def test_the_examples_worlds_are_believed(name):
    program = Path(f"examples/worlds/worlds/{name}.py").read_text()
    assert by_rules(documents="worlds").judged(Case("", world_rules.docstring_of(program), program)) == ""


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
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


@pytest.mark.long
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
        (("def start", "open = len\n\n\ndef start"), ""),
        (("def start", "import math\nPI = math.pi\n\n\ndef start"), ""),
        (("def start", "from __future__ import annotations\n\n\ndef start"), ""),
        (("def law_2", "LAWS = [law_0, law_1]\n\n\ndef law_2"), ""),
        (("def start", "import os\n\n\ndef start"), "imports_other"),
        (("def start", "open('x')\n\n\ndef start"), "imports_other"),
        (("def start", "import json\njson.dumps = len\n\n\ndef start"), "reaches_out"),
        (("def start", "import random\nX = random._os\n\n\ndef start"), "reaches_out"),
        (("def start", "X = globals()\n\n\ndef start"), "reaches_out"),
        (("def start", "X = [].__class__\n\n\ndef start"), "reaches_out"),
        (("def law_2", "law_0 = len\n\n\ndef law_2"), "defined_twice"),
        (("def start", f"X = {'1 + ' * 250}1\n\n\ndef start"), "too_deep"),
        (("def start", f"X = 0x{'f' * 4000}\n\n\ndef start"), "too_large_a_number"),
        (("    new = dict(state)", "    new = dict(state, n=DICE.random())"), "draws_lots"),
    ],
)
def test_what_is_wrong_with_a_world_by_its_syntax(change, wrong):
    draw = random.Random(4)
    kind = world_plants.kettle(draw)
    if wrong == "draws_lots":
        kind = kind._replace(program="import random\nDICE = random.Random(1)\n" + kind.program)
    assert change[0] in kind.program
    found = world_rules.world_of(kind.program.replace(*change), kind.passage, 10_000, 2)
    assert found == wrong if wrong else isinstance(found, world_rules.World), found
    assert world_rules.world_of(kind.program, kind.passage, 100, 2) == "too_long"


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
        ({"start": lambda number: {"a b": 1, "a_b": 2}}, "names_alike"),
        ({"step": lambda state, action: ({"n": "two"}, "It moves.")}, "other_kinds"),
        ({"step": lambda state, action: ({"n": state["n"] + 1}, "It\x1b moves.")}, "says_nothing"),
        ({"step": lambda state, action: ({"n": state["n"] + 1}, "\ud800")}, "says_nothing"),
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
    def state(n, on=False, turns=0):
        return {"n": n, "on": on, "turns": turns}

    told = {
        "episodes": [
            {"states": [state(1), state(2), state(1, True), state(2, False, 9)],
             "others": [[["b", state(1)]], [["b", state(1)]], [["b", state(3, False, 9)]]]},
            {"states": [state(0), state(5, True)], "others": [[["b", state(0)]]]},
        ]
    }  # fmt: skip
    assert world_texts.drawn_aims(told, "a program", 9) == [world_texts.Aim(0, "on", True)]
    assert world_texts.drawn_aims(told, "a program", 9)[0].text == "on: yes"
    assert world_texts.drawn_aims({"episodes": told["episodes"][1:]}, "a program", 9) == []


def test_laws_are_two_that_differ_and_quote_through_markdown():
    kind = world_plants.tank(random.Random(3))
    start, said = "def law_1(before", "The pump only changes when someone touches its switch."
    assert (
        world_rules.world_of(kind.program, kind.passage.replace("only", "**only**"), 9999, 2)
        .laws[1]
        .quotation
        == said
    )
    twice = kind.program.replace(said, kind.program.split('"""')[1])
    assert world_rules.world_of(twice[: twice.index("def law_2")], kind.passage, 9999, 2) == "too_few_laws"
    head, law = kind.program[: kind.program.index("def law_0")], kind.program[kind.program.index(start) :]
    again = (
        law[: law.index("\n\ndef law_2")]
        .replace("law_1", "law_9")
        .replace(said, "Old pipes were replaced by copper ones.")
    )
    assert world_rules.world_of(f"{kind.program}\n\n{again}", kind.passage, 9999, 2) == "laws_alike"
    helped = f"MOST = 9\n\n\ndef _most(x):\n    return x <= MOST\n{head}" + law.replace(
        "return (", "return _most(1) and ("
    )
    found = world_rules.world_of(helped, kind.passage, 9999, 1)
    assert "MOST = 9" in found.laws[0].source and "def _most" in found.laws[0].source, (
        "a judge sees what it uses"
    )


def test_what_says_the_end_is_looked_at():
    asked = {"episodes": [{"start": 0, "steps": 1}], "again": [], "explore": None}
    one = {
        "states": [1, 2],
        "actions": ["a"],
        "seen": ["b"],
        "possible": [[], []],
        "others": [[]],
        "trouble": None,
    }
    whole = {"episodes": [one], "again": [], "explored": None, "empty_laws": []}
    assert worlds._is_whole(whole, asked)
    broken = [{}, [], None, whole | {"episodes": []}, whole | {"episodes": [{}]}, whole | {"empty_laws": [1]}]
    broken += [whole | {"episodes": [one | {"seen": []}]}, whole | {"explored": {}}, whole | {"again": [1]}]
    assert not any(worlds._is_whole(told, asked) for told in broken)


def test_the_version_is_raised_with_the_driver():
    text = Path(world_driver.__file__).read_bytes()
    known = {1: "c9ca135777753446"}
    assert hashlib.sha256(text).hexdigest()[:16] == known[worlds.VERSION], "raise VERSION, or say what it was"


def test_numbers_are_shown_as_they_are():
    assert [world_texts.shown(value) for value in (129959.58, 1234567.89, -0.0, 0.1 + 0.2, 7, True, "")] == [
        "129959.58", "1234567.89", "0", "0.3", "7", "yes", "(empty)",
    ]  # fmt: skip


def test_nobody_is_asked_what_a_course_has_shown():
    told = {"episodes": [{"states": [{"n": 0}, {"n": 1}, {"n": 2}], "actions": ["up", "up"]}]}
    known = world_texts.stretches(told, 2)
    assert (
        world_texts.stretch({"n": 0}, ["up", "up"]) in known
        and world_texts.stretch({"n": 1}, ["up"]) in known
    )
    assert world_texts.stretch({"n": 1}, ["up", "up"]) not in known


def test_laws_that_cannot_fail():
    some = world(
        law_two=lambda before, action, after: True, law_three=lambda before, action, after: after["n"] < 999
    )
    some.episode({"start": 0, "steps": 4})
    assert some.empty_laws() == ["law_two", "law_three"]


def test_a_world_made_wrong_says_what_its_laws_notice():
    kind = world_plants.robot(random.Random(2))
    found = world_rules.world_of(kind.program, kind.passage, 10_000, 2)
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
    assert all("def start" in fault and "def law_0" in fault for fault in world_rules.faults_of(found, 5))
