"""Rejection sampling: what the verifier takes, and what becomes of questions, answers and counts."""

from __future__ import annotations

import json
from itertools import count

import pytest

from megatron_davinci.darwin import endpoint, formulas
from megatron_davinci.darwin.formulas import NoFormula
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.verify import equal, final_answer, program_of
from megatron_davinci.errors import ConfigError
from megatron_davinci.platform import trial
from tests.darwin.answer_plants import answer_cases
from tests.darwin.making import made, recipe


@pytest.fixture(autouse=True)
def fresh(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)
    server.forget()
    server.fault, server.finish = lambda: "", "stop"


def sampling(folder, server, out="corpus", records=(), **step):
    (folder / "raw").mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "raw" / "a.jsonl").write_text(lines + "\n")
    given = {
        "endpoint": server.endpoint(timeout=5.0, temperature=0.7, concurrency=1),
        "answers": str(folder / "answers.sqlite"),
        **step,
    }
    sources = [{"name": "maths", "paths": ["raw/*.jsonl"], "licence": "CC-BY-4.0"}]
    return recipe(folder, out, sources=sources, steps=["normalise_text", {"sample_answers": given}])


def counted(corpus) -> dict[str, int]:
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    return {key.split("/answers/")[1]: number for key, number in counts.items() if "/answers/" in key}


QUESTIONS = [
    {"text": "What is 6 times 7?", "answer": 42},
    {"text": "And 5 minus 9?", "answer": "-4"},
    {"text": "Why?"},
]


def test_right_answers_are_kept_and_the_rest_is_counted_by_reason(tmp_path, server):
    said = [
        "It is \\boxed{42}.",
        "It is \\boxed{41}.",
        "I do not know.",
        "So \\boxed{42.0}, as 6 times 7 is 42.",
    ]
    server.model = lambda content: said[server.requests[-1]["seed"] % 4]
    corpus = made(sampling(tmp_path, server, records=QUESTIONS, most_kept=2))
    assert corpus.counts == {
        "input": 3, "derived": 2, "output": 2, "quarantined": {"sample_answers/no_reference": 1},
        "dropped": {"sample_answers/no_right_answer": 1, "sample_answers/turned_into_answers": 1},
    }  # fmt: skip
    assert counted(corpus) == {"accepted": 2, "wrong_answer": 4, "no_final_answer": 2, "no_reference": 1}
    one, other = corpus.records()
    assert one["prompt"] == "Question: What is 6 times 7?\n\nAnswer: " and one["response"] == said[0]
    assert (one["id"], other["id"]) == ("maths/raw/a.jsonl#0/answer-0", "maths/raw/a.jsonl#0/answer-3")
    entry = one["darwin"]["operations"][-1]
    assert one["darwin"]["level"] == 5 and entry["model"] == "tiny-1"
    assert {name: entry["notes"][name] for name in ("tried", "right", "verified", "try")} == {
        "tried": 4, "right": 2, "verified": "answer", "try": 0,
    }  # fmt: skip
    asked = len(server.requests)
    again = made(sampling(tmp_path, server, "again", records=QUESTIONS, most_kept=2))
    assert len(server.requests) == asked == 8 and again.records() and counted(again) == counted(corpus)
    assert [event.trouble for event in events(find([corpus], one["id"])) if event.trouble] == []


def test_programs_are_run_once_in_the_sandbox_and_what_came_of_them_is_kept(tmp_path, server, monkeypatch):
    right = "Add them.\n```python\ndef f(a, b):\n    return a + b\n```\n"
    said = [
        right,
        right.replace("+", "-"),
        "No program.",
        "```python\nimport os\nos._exit(0)\n```",
        right,
        right + "Done.",
    ]
    server.model = lambda content: said[server.requests[-1]["seed"]]
    records = [{"text": "Write f, which adds.", "tests": ["assert f(1, 2) == 3", "assert f(-1, 1) == 0"]}]
    step = {"verify": "code", "reference": "tests", "prompt": "answer_code", "tries": 6}
    run = trial.run_python
    programs = count()
    monkeypatch.setattr(trial, "run_python", lambda *given, **more: (next(programs), run(*given, **more))[1])
    corpus = made(sampling(tmp_path, server, records=records, **step))
    assert counted(corpus) == {
        "accepted": 1, "program_wrong": 1, "no_program": 1, "program_early": 1, "repeated": 1,
        "right_and_not_needed": 1,
    }  # fmt: skip
    [record] = corpus.records()
    assert record["response"] == right.strip()
    ran = next(programs)
    assert ran >= 3
    made(sampling(tmp_path, server, "again", records=records, **step))
    assert next(programs) == ran + 1, "what came of a program is on record"
    monkeypatch.setattr(trial, "run_python", None)
    assert [event.trouble for event in events(find([corpus], record["id"])) if event.trouble] == []


def test_samples_must_differ(tmp_path, server):
    with pytest.raises(ConfigError, match="would be the same"):
        made(sampling(tmp_path, server, records=QUESTIONS, endpoint=server.endpoint(temperature=0)))


def test_the_verifier_takes_what_is_right_in_any_form_and_nothing_that_looks_alike():
    judged = [(case, equal(final_answer(case.said) or "", case.reference)) for case in answer_cases(5, 12)]
    assert [(case.kind, case.said, case.reference) for case, found in judged if found != case.right] == []


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^9}}", "(" * 300 + "1", "-" * 500 + "1", "1/0", "\\frac{1}", "x" * 3000, "", "999!", "\\sum x"],
)
def test_what_has_no_value_is_no_number(text):
    with pytest.raises(NoFormula):
        formulas.number(text)
    assert not equal(text, "1")


@pytest.mark.parametrize("reference", ["3.14", "\\pi", "\\pi x", "0.125%"])
def test_an_answer_beyond_all_floats_is_judged_like_any_other(reference):
    assert not equal("2^{5000}", reference) and not equal(reference, "499!")
    assert equal("2^{5000}", "4^{2500}")


def test_what_an_answer_ends_with():
    assert final_answer("first \\boxed{1}, then \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert final_answer("\\boxed{\\{1\\}} ") == "\\{1\\}" and final_answer("\\boxed{1") is None
    assert final_answer("The answer is: 7.") == "7" and final_answer("I do not know") is None
    assert final_answer("\\boxed{\\text{no answer}}") == "\\text{no answer}" and final_answer("#### 7") == "7"
    assert final_answer("So \\boxed{5}. This is the final answer.") == "5"
    assert final_answer("\\boxed{5}, and I hope that this answer helps.") == "5"
    assert final_answer("\\boxed{5} was wrong. The answer is 6.") == final_answer("\\boxed{5}\n#### 6") == "6"
    assert program_of("```python\na\n```\nor\n```py\nb\n```") == "b\n" and program_of("`a`") is None
