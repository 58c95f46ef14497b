"""Level 7: checks that a model writes are kept if they run, hold, and fail on the program made wrong."""

from __future__ import annotations

import ast
import json
import re

import pytest

from megatron_davinci.darwin import endpoint
from megatron_davinci.darwin.calls import calls_of, checks_of, functions
from megatron_davinci.darwin.checked import fault_of, unfit
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.mutants import mutants
from megatron_davinci.platform import trial
from tests.darwin.making import made, recipe
from tests.darwin.model_server import passage

CLAMP = (
    "def clamp(x, low, high):\n    if x < low:\n        return low\n    return high if x > high else x\n\n\n"
    "def scale(x):\n    return 3 * x + 1\n"
)
PROGRAMS = {
    "good": CLAMP,
    "vacuous": CLAMP.replace("scale", "grow"),
    "false": CLAMP.replace("scale", "shift"),
    "redefining": CLAMP.replace("scale", "move"),
    "hostile": CLAMP.replace("scale", "push"),
    "broken": "import a_module_that_is_nowhere\n\n\ndef f(x):\n    return x + 1\n",
    "prose": "This is no program at all, only words.\n",
}
GOOD = "assert clamp(5, 0, 3) == 3\nassert clamp(-1, 0, 3) == 0\nassert clamp(2, 0, 3) == 2"
CHECKS = {
    "scale": GOOD + "\nassert scale(2) == 7\nassert scale(0) == 1",
    "grow": "assert callable(clamp)\nassert clamp is not grow",
    "shift": "assert clamp(1, 0, 3) == 2",
    "move": "def clamp(x, low, high): return 0\nassert clamp(1, 0, 3) == 0",
    "push": "import os\nassert clamp(1, 0, 3) == 1\nos._exit(0)",
}


def test_checks_are_kept_if_they_hold_and_can_fail(tmp_path, server, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)

    def model(content: str) -> str:
        program, _ = passage(content)
        name = next(name for name in CHECKS if f"def {name}" in program)
        return f"Here they are.\n```python\n{CHECKS[name]}\n```\n"

    server.model = model
    (tmp_path / "raw").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "raw" / f"{name}.py").write_text(text)
    sources = [{"name": "code", "paths": ["raw/*.py"], "licence": "MIT"}]
    given = {
        "endpoint": server.endpoint(timeout=5.0),
        "answers": str(tmp_path / "a.sqlite"),
        "tries": 1,
        "faults": 2,
    }
    steps = ["normalise_text", {"write_checks": given}]
    corpus = made(recipe(tmp_path, sources=sources, steps=steps))
    assert corpus.counts["input"] == corpus.counts["output"] == len(PROGRAMS), "nothing is lost"
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert {key.split("/checks/")[1]: number for key, number in counts.items() if "/checks/" in key} == {
        "accepted": 1, "cannot_fail": 1, "checks_wrong": 1, "redefine_the_program": 1, "checks_early": 1,
        "program_error": 1, "no_python": 1,
    }  # fmt: skip
    records = {record["id"].rsplit("/", 1)[1]: record for record in corpus.records()}
    good = records["good.py"]
    assert good["text"] == CLAMP.rstrip() + "\n\n\n# Checks\n" + CHECKS["scale"] + "\n"
    entry = good["darwin"]["operations"][-1]
    assert good["darwin"]["level"] == 7 and entry["model"] == "tiny-1"
    assert (entry["notes"]["checks"], entry["notes"]["faults"]) == (5, 2) and entry["notes"]["noticed"] >= 0.5
    for name in PROGRAMS.keys() - {"good"}:
        assert records[f"{name}.py"]["text"].strip() == PROGRAMS[name].strip()
        assert records[f"{name}.py"]["darwin"]["level"] == 1
    # All of it again, and a document's life, from what is on record: nobody is asked and nothing is run.
    server.forget()
    monkeypatch.setattr(trial, "run_python", None)
    again = made(recipe(tmp_path, "again", sources=sources, steps=steps))
    assert server.requests == [] and [one["text"] for one in again.records()] == [
        one["text"] for one in corpus.records()
    ]
    told = list(events(find([corpus], good["id"])))
    assert told[-1].after == good["text"] and [event.trouble for event in told if event.trouble] == []


def test_faults_are_one_difference_each_and_always_the_same():
    found = mutants(CLAMP, 50)
    assert found == mutants(CLAMP, 50) and len(found) == len(set(found)) > 8
    whole = ast.unparse(ast.parse(CLAMP))
    for text in found:
        lines = [
            pair for pair in zip(whole.splitlines(), text.splitlines(), strict=True) if pair[0] != pair[1]
        ]
        assert len(lines) == 1, text
    assert len(mutants(CLAMP, 3)) == 3 and mutants("x = 1 + 2\n", 5) == [], "only what is inside functions"
    assert mutants('def f():\n    "words"\n', 5) == []


@pytest.mark.parametrize(
    "checks, wrong",
    [
        ("assert clamp(1, 0, 2) == 1", ""),
        ("clamp(1, 0, 2)", "assert_nothing"),
        ("assert 1 + 1 == 2", "of_something_else"),
        ("clamp = max\nassert clamp(1, 2) == 2", "redefine_the_program"),
        ("from x import y as clamp\nassert clamp(1, 2) == 2", "redefine_the_program"),
        ("assert clamp(", "no_python"),
    ],
)
def test_what_is_wrong_with_checks_by_their_syntax(checks, wrong):
    assert fault_of(checks, CLAMP) == wrong


def test_what_is_no_program():
    assert unfit("x = 1", 100) == "defines_nothing" and unfit("x" * 101, 100) == "too_long"
    assert unfit("(" * 5000, 10_000) == "no_python" and unfit(CLAMP, 1000) == ""


CALLED = """import random


def scale(x, y=2):
    return [x * y, x > y]


def noise(x):
    return random.random() + x


def half(x):
    return 1 / x


def box(x):
    return object()


def named(*, x):
    return x
"""
CHOSEN = {"scale": "scale(3)\nscale(-1, 5)", "noise": "noise(1)", "half": "half(0)\nhalf(4)", "box": "box(1)"}


def test_a_model_chooses_calls_and_the_program_says_what_they_give(tmp_path, server, monkeypatch):
    def model(content: str) -> str:
        source, mark = passage(content)
        name = next(name for name in CHOSEN if f"def {name}(" in source)
        asked.append(name)
        if name == "half" and asked.count("half") == 1:
            return "what is no call"
        return f"<{mark}>\n{CHOSEN[name]}\n</{mark}>"

    asked: list[str] = []
    server.model = model
    server.forget()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.py").write_text(CALLED)
    (tmp_path / "raw" / "b.py").write_text("class Only:\n    pass\n")
    given = {"endpoint": server.endpoint(timeout=5.0, structured="vllm"), "answers": str(tmp_path / "a.sqlite"),
             "prompt": "calls_python", "tries": 2, "faults": 1}  # fmt: skip
    sources = [{"name": "code", "paths": ["raw/*.py"], "licence": "MIT"}]
    corpus = made(recipe(tmp_path, sources=sources, steps=[{"write_checks": given}]))
    first, second = corpus.records()
    checks = "assert scale(3) == [6, True]\nassert scale(-1, 5) == [-5, False]\nassert half(4) == 0.25\n"
    assert first["text"] == CALLED.rstrip() + "\n\n\n# Checks\n" + checks and first["darwin"]["level"] == 7
    assert second["darwin"]["level"] == 0
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert {key.split("/checks/")[1]: number for key, number in counts.items() if "/checks/" in key} == {
        "accepted": 1, "call_differs": 2, "call_raised": 1, "call_no_literal": 2, "no_function_to_call": 1,
        "no_tags": 1, "cannot_fail": 1,
    }  # fmt: skip
    assert first["darwin"]["operations"][-1]["notes"]["try"] == 1, "checks of both tries add up"
    forms = {body["structured_outputs"]["regex"] for body in server.requests}
    assert len(forms) == 4 and all(any(re.search(rf"{name}\\\(", form) for form in forms) for name in CHOSEN)
    server.forget()
    monkeypatch.setattr(trial, "run_python", None)
    [event] = [each for each in events(find([corpus], first["id"])) if each.entry["name"] == "write_checks"]
    assert event.after == first["text"] and not event.trouble and not server.requests


def test_calls_are_of_the_function_with_plain_values():
    assert calls_of("# first\nf(1, [2, 'a'])\nf(x=-3.5)\nf(1, [2,'a'])", "f") == [
        "f(1, [2, 'a'])",
        "f(x=-3.5)",
    ]
    for answer in ("f(1) + 1", "g(1)", "f(open('x'))", "f(*[1])", "f(**{})", "f(1", "import os"):
        assert calls_of(f"f(2)\n{answer}", "f") == [], answer
    found = functions(CALLED + "\n\ndef scale(x): return x\n\nasync def wait(x): return x\n", 10_000)
    assert [(each.name, each.least, len(each.kinds)) for each in found] == [
        ("scale", 1, 1), ("noise", 1, 1), ("half", 1, 1), ("box", 1, 1)
    ]  # fmt: skip
    assert functions(CALLED, 20) == []
    assert checks_of([["f(1)", "value", "None"], ["f(2)", "raised", "ValueError"]]) == {
        "f(1)": "assert f(1) is None\n"
    }
