"""What a recipe will cost, before and while it runs: calls as they will be, tokens, time, price; how far it is."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_davinci.cli import data_run
from megatron_davinci.cli.data_progress import duration, line
from megatron_davinci.cli.main import main
from megatron_davinci.darwin import provenance, watching
from megatron_davinci.darwin.asking import Asking
from megatron_davinci.darwin.cost import Rates, estimate
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.trials import Trying
from megatron_davinci.darwin.watching import Asked, Note, Progress
from tests.darwin.making import made, prose, recipe
from tests.darwin.model_server import passage


def asking(folder, server, **endpoint):
    raw = folder / "raw"
    raw.mkdir()
    texts = [text for text in prose()[30:42] if len(text) > 800]
    (raw / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "short"]))
    given = {"endpoint": server.endpoint(timeout=5.0, **endpoint), "answers": str(folder / "answers.sqlite")}
    steps = [{"length": {"min_characters": 100}}, {"refine": given | {"chunk": 600}},
             {"write_pairs": given | {"chunk": 2000, "judge": True}}]  # fmt: skip
    return recipe(folder, sources=[{"name": "help", "paths": ["raw/*.jsonl"]}], steps=steps)


def test_an_estimate_is_what_is_asked_and_what_is_on_disk_is_not_paid_for(tmp_path, server, capsys):
    server.model = lambda content: (
        "NO QA" if "BEGIN QA" in content else "<{1}>{0}</{1}>".format(*passage(content))
    )
    loaded = asking(tmp_path, server, input_price=2.0, output_price=10.0, requests_per_minute=30_000)
    before = estimate(loaded, 100)
    refine, pairs = before.steps
    texts = len(prose()[30:42])
    assert before.dropped == {"length/too_few_characters": 1} and refine.documents == pairs.documents <= texts
    assert refine.hours == pytest.approx(refine.calls / 30_000 / 60)
    assert refine.price == pytest.approx((2 * refine.prompt_tokens + 10 * refine.answer_tokens) / 1e6)
    assert refine.known == pairs.known == refine.measured == 0 and refine.most_calls == 2 * refine.calls
    words = ["data", "plan", str(loaded.path), "--documents"]
    assert main([*words, "6", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert "supposition for refine, write_pairs" in said and "Told from 6 of about" in said
    rough = json.loads((tmp_path / "plan.json").read_text())["steps"][0]
    assert rough["calls"] == pytest.approx(refine.calls, rel=0.5), "a part stands for the whole"
    made(loaded)
    first = [each for each in server.requests if each["seed"] == 0]
    asked = Counter("pairs" if "BEGIN QA" in each["messages"][-1]["content"] else "refine" for each in first)
    assert asked["refine"] == refine.calls
    passages = asked["pairs"]
    assert pairs.calls == pytest.approx(passages * (1 + 2 * 3)), "a passage, and two judges of three pairs"
    characters = sum(
        len(message["content"])
        for each in first
        if "BEGIN QA" not in each["messages"][-1]["content"]
        for message in each["messages"]
    )
    assert refine.prompt_tokens == pytest.approx(characters / 4)
    after = estimate(loaded, 100, rates=Rates(0.0, 0.0, 100.0))
    assert after.steps[0].calls == 0 and after.steps[0].known == refine.calls and after.steps[0].measured == 1
    assert main([*words, "0"]) == 2


def test_progress_says_pace_time_left_and_what_was_not_used():
    asked = Asked(300, 100, 60_000, {"added_number": 7, "too_long": 2}, {"rate_limited": 5})
    said = line(Progress(1, 2, "acquire, refine", 1, 4, 0.43, 60.0, 8000.0, asked))
    assert said == (
        "pass 1 of 2 43%, 1 of 4 tasks done: acquire, refine; 400 answers (25% from disk) · 300 a minute, "
        "1,000 tokens/s · about 2 h 13 min left · not used: added_number 7, too_long 2 · asked again: rate_limited 5"
    )
    assert line(Progress(2, 2, "exact_dedup", 4, 4, 1.0, 3.0, None, None)) == "pass 2 of 2 done: exact_dedup"
    assert [duration(seconds) for seconds in (5, 600, 7260, 4e5)] == [
        "5 s",
        "10 min",
        "2 h 1 min",
        "4.6 days",
    ]


def test_workers_write_down_what_they_ask_and_it_adds_up(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watching, "_WRITE_SECONDS", 0.0)
    server.model = lambda content: "no tags" if "Answer with the cleaned" in content else "NO QA"
    server.delay = 0.01
    loaded = asking(tmp_path, server)
    seen: list[Progress] = []
    with data_run.shown("job", every=0.0) as say:
        made(loaded, progress=lambda progress: (seen.append(progress), say(progress)))
    server.delay = 0.0
    last = seen[-1]
    assert (
        last.done == last.tasks
        and last.share == 1
        and last.asked.answered
        == len({json.dumps(each["messages"]) + str(each["seed"]) for each in server.requests})
    )
    assert any(0 < progress.share < 1 for progress in seen) and any(progress.left for progress in seen)
    assert last.asked.unused["no_tags"] > 10 and last.asked.tokens > 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 2 and "not used: no_tags" in said[-1] and said[-1].startswith("job: pass 1 of 1 done")


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    note = Note(tmp_path / "file" / "00000-00.json")
    note.add({"answered": 1})
    assert note.counts["answered"] == 1


def test_every_step_that_asks_can_be_planned(tmp_path, server):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in prose()[30:33])
    )
    given = {"endpoint": server.endpoint()}
    steps = ["relate", {"contextualise": given}, {"converse": given | {"turns": 4, "passage": 100_000}}]
    plan = estimate(recipe(tmp_path, sources=[{"name": "help", "paths": ["raw/*.jsonl"]}], steps=steps), 3)
    context, dialogues = plan.steps
    assert plan.passed_over == ["relate"] and dialogues.calls == 3 * (4 + 1)
    assert context.calls >= 3 and context.prompt_tokens > 3 * 2400 / 4, (
        "the passages that may be found are counted"
    )


PROGRAM = "def double(number: int) -> int:\n    return 2 * number\n"


@pytest.mark.parametrize(
    "step,given,text",
    [
        ("refine", {}, prose()[30]), ("refine", {"prompt": "edit_lines"}, prose()[30]),
        ("write_pairs", {}, prose()[30]), ("rate", {}, prose()[30]), ("converse", {}, prose()[30]),
        ("simulate", {}, prose()[30]),
        ("converse", {"agents": ["choose_question", "choose_quotation"]}, prose()[30]),
        ("write_checks", {}, PROGRAM), ("write_checks", {"prompt": "calls_python"}, PROGRAM),
    ],
)  # fmt: skip
def test_questions_are_planned_as_they_are_asked(tmp_path, monkeypatch, step, given, text):
    """Also the form of the answer, without which an answer on disk is another question's."""
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "tiny", "structured": "vllm"}
    settings = {"endpoint": endpoint, "answers": str(tmp_path / "answers.sqlite"), **given}
    loaded = recipe(tmp_path, steps=[{step: settings}])
    [step] = loaded.recipe.make_steps(loaded.base)
    document, asked = provenance.begin(text, "a", "help", None, {}), []

    async def answer(self, messages, attempt, spent, form=None):
        asked.append((messages, form))
        raise Trouble("refused")

    async def passed(self, program, tests):
        return "passed"

    monkeypatch.setattr(Asking, "answer", answer)
    monkeypatch.setattr(Trying, "outcome", passed)
    planned = [(each.messages, each.form) for each in step.expected(document) if not each.supposed]
    step.open()
    step.apply(document)
    step.close()
    assert planned and all(each in asked and each[1] for each in planned)
