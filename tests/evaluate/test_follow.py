"""Following a run: each checkpoint once, those that come later too, and an end when the run has ended."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_davinci.cli import eval_follow
from megatron_davinci.cli.eval import append
from megatron_davinci.cli.eval_plan import given_in
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.answers import digest_of_checkpoint
from megatron_davinci.evaluate.results import read_records

NOTHING_BESIDE = {"overrides": [], "texts": [], "include_path": []}
NOTHING_BESIDE |= dict.fromkeys(("tokenizer", "data", "knowledge", "samples"))


class Run:
    """A run directory in which a checkpoint appears at each wait, until there is no more to come."""

    def __init__(self, folder: Path, later: list[int]) -> None:
        self.folder, self.later, self.asked = folder, later, []
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        self.waits = 0
        self.wrong: set[int] = set()
        self.problems: dict[int, dict] = {}

    def save(self, step: int) -> None:
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"step": step}))

    def evaluate(self, words: list[str]) -> int:
        step = int(words[0].rpartition("@")[2])
        self.asked.append(step)
        (self.folder / "evals").mkdir(exist_ok=True)
        with open(self.folder / "evals/results.jsonl", "a") as file:
            record = {"step": step, "task": "a", "suite": None, "limit": None, "shots": 0, "metrics": {}}
            file.write(json.dumps(record | self.problems.pop(step, {})) + "\n")
        return 2 if step in self.wrong else 0

    def wait(self, seconds: float) -> None:
        self.waits += 1
        if self.later:
            self.save(self.later.pop(0))

    def follow(self, **other) -> int:
        asked = {
            "tasks": "a",
            "suite": None,
            "limit": None,
            "shots": None,
            "both_ways": False,
            "formats": False,
            "again": False,
        }
        arguments = argparse.Namespace(run=str(self.folder), out=None, **NOTHING_BESIDE | asked | other)
        return eval_follow.follow_run(arguments, ["--tasks", "a"], evaluate=self.evaluate, wait=self.wait)


def test_every_checkpoint_is_evaluated_once_and_those_on_record_are_left_out(tmp_path):
    run = Run(tmp_path / "run", [30, 40])
    run.save(20)
    run.save(10)
    assert run.follow() == 0
    assert run.asked == [10, 20, 30, 40]
    assert run.follow() == 0
    assert run.asked[4:] == []


def test_what_had_no_result_or_other_examples_is_asked_again(tmp_path):
    run = Run(tmp_path / "run", [20])
    run.save(10)
    run.wrong, run.problems = {20}, {20: {"problem": "its data is not here"}}
    assert run.follow() == 2, "one of them had a task without a result"
    run.wrong = set()
    assert run.follow() == 0 and run.asked == [10, 20, 20]
    assert run.follow(shots=0) == 0 and run.asked[3:] == []
    run.problems = {step: {"shots": 5, "given": {"shots": 5}} for step in (10, 20)}
    assert run.follow(shots=5) == 0 and run.asked[3:] == [10, 20]


def test_other_texts_and_what_is_asked_anew_are_not_on_record(tmp_path):
    run = Run(tmp_path / "run", [])
    run.save(10)
    assert run.follow() == 0 and run.follow() == 0 and run.asked == [10]
    assert run.follow(again=True) == 0 and run.asked == [10, 10]
    run.problems = {10: {"given": {"texts": ["t=t.jsonl"]}}}
    assert run.follow(texts=["t=t.jsonl"]) == 0 and run.asked == [10, 10, 10]
    assert run.follow(texts=["t=t.jsonl"]) == 0 and run.follow() == 0 and run.asked == [10, 10, 10]


@pytest.mark.parametrize(
    ("lines", "there"),
    [
        ([{"task": "PIQA"}, {"means": {}}], True),
        ([{"task": "PIQA"}], False),  # it was stopped before its end
        ([{"task": "PIQA", "problem": "its data is not here"}, {"means": {}}], False),
        ([{"task": "PIQA", "problem": "its data is not here"}, {"means": {}}, {"task": "PIQA"}], True),
    ],
)
def test_a_suite_is_on_record_when_it_came_to_its_end_and_all_of_it_has_a_result(lines, there, tmp_path):
    about = {"step": 10, "suite": "davinci19", "limit": None}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(about | line) + "\n" for line in lines))
    said = {"tasks": None, "suite": "davinci19", "limit": None, "shots": None}
    asked = argparse.Namespace(**NOTHING_BESIDE | said, both_ways=False, formats=False)
    assert eval_follow.on_record(tmp_path, asked, {10: "abc"}) == ({10} if there else set())


def test_a_step_that_the_run_took_again_is_another_checkpoint(tmp_path):
    run = Run(tmp_path / "run", [])
    run.save(10)
    run.save(20)
    manifest = run.folder / "checkpoints/step-00000020/manifest.json"

    def digest() -> str:
        return str(digest_of_checkpoint(json.loads(manifest.read_text())))

    before = digest()
    run.problems = {20: {"identity": {"checkpoint": before}}}

    def wait(seconds: float) -> None:
        if digest() == before:  # once it was asked
            manifest.write_text(json.dumps({"step": 20, "again": True}))
            run.problems = {20: {"identity": {"checkpoint": digest()}}}

    run.wait = wait
    assert run.follow() == 0 and run.asked == [10, 20, 20]
    assert run.follow() == 0 and run.asked[3:] == []
    manifest.write_text(json.dumps({"step": 20, "again": "and again"}))
    assert run.follow() == 0 and run.asked[3:] == [20]


def test_what_was_computed_or_said_otherwise_is_asked_again(tmp_path):
    run = Run(tmp_path / "run", [])
    run.save(10)
    assert run.follow() == 0 and run.asked == [10]
    run.problems = {10: {"given": {"overrides": ["train.precision=fp32"]}}}
    assert run.follow(overrides=["train.precision=fp32"]) == 0 and run.asked == [10, 10]
    assert run.follow(overrides=["train.precision=fp32"]) == 0 and run.asked == [10, 10]


def test_a_suite_without_made_up_knowledge_has_not_asked_for_it(tmp_path):
    about = {"step": 10, "suite": "local", "limit": None}
    ended = about | {"task": "geometry", "metrics": {"rank_me,none": 3.0}}
    (tmp_path / "results.jsonl").write_text(json.dumps(ended) + "\n")
    said = {"tasks": None, "suite": "local", "limit": None, "shots": None}
    asked = NOTHING_BESIDE | said | {"both_ways": False, "formats": False}
    assert eval_follow.on_record(tmp_path, argparse.Namespace(**asked), {10: "abc"}) == {10}
    knowing = argparse.Namespace(**asked | {"knowledge": tmp_path})
    assert eval_follow.on_record(tmp_path, knowing, {10: "abc"}) == set()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(ended | {"given": given_in(knowing)}) + "\n")
    assert eval_follow.on_record(tmp_path, knowing, {10: "abc"}) == {10}


def test_a_result_is_none_of_a_line_that_was_never_ended(tmp_path):
    append(tmp_path, {"step": 1})
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"step": 2, "ta')
    append(tmp_path, {"step": 3})
    append(tmp_path, {"step": 4})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 3, 4]


def test_it_stays_while_a_trainer_is_at_work(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", [])
    lives = iter([True] * 20 + [False] * 20)
    monkeypatch.setattr(eval_follow, "_at_work", lambda folder: next(lives))
    assert run.follow() == 0
    assert run.waits >= 20


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run to follow"):
        eval_follow.follow_run(argparse.Namespace(run=str(tmp_path)), [])
