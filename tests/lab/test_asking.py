"""Finished runs are asked a design's tasks once; what they scored is a metric like others."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_davinci.cli import lab_screen
from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.data.tokenize import tokenize_jsonl
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.answers import digest_of_checkpoint
from megatron_davinci.lab import asking, outcomes
from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.design import Evaluate, load_design
from megatron_davinci.lab.outcomes import folder_of, outcome_of
from megatron_davinci.lab.verdict import judge
from tests.evaluate.models import sentence
from tests.lab.test_design import written
from tests.lab.test_runner import design_in
from tests.lab.test_verdict import judged, outcomes_of

METRIC = "task.cloze_a_generation.exact_match,first"
ASKED = {
    "overrides": {"data.tokenizer": "tokenizer"},
    "evaluate": {"suite": "local"},
    "metrics": [{"name": METRIC, "better": "higher", "margin": 0.05}],
}


def done(root, run, without=0):
    """A run that has come to its end, as far as its directory says; or that lacks its last steps."""
    folder, steps = folder_of(root, run), outcome_of(root, run).steps - without
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    line = {
        "step": steps,
        "consumed_samples": 8 * steps,
        "consumed_tokens": 9,
        "loss": 3.0,
        "seconds": 1.0,
        "heldout_loss": {"a": 3.0, "b": 3.0},
    }
    for name in ("metrics.jsonl", "evals.jsonl"):
        (folder / name).write_text(json.dumps(line) + "\n")
    return folder, steps


def result(folder, step, score, **other):
    task, _, metric = METRIC.removeprefix("task.").partition(".")
    record = {
        "step": step,
        "task": task,
        "metrics": {metric: score},
        "suite": "local",
        "limit": None,
        "items": 120,
    }
    kept(folder, record | other)


def kept(folder, record):
    (folder / "evals").mkdir(exist_ok=True)
    with open(folder / "evals" / "results.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def test_runs_that_are_done_are_asked_once_and_their_scores_decide(tmp_path, monkeypatch):
    design = load_design(written(tmp_path, **ASKED))
    runs, lab = runs_of(design), tmp_path / "lab"
    for run in runs[:-1]:
        done(lab, run)
    commands = []

    def davinci_eval(command, **_):
        commands.append(command)
        run = next(one for one in runs if one.identity in command[4])
        folder, steps = folder_of(lab, run), outcome_of(lab, run).steps
        result(folder, steps - 1, 0.9)  # another checkpoint's
        if run is not runs[1]:
            result(folder, steps, 0.1)
            result(folder, steps, 0.5 if run.arm.name == "half" else 0.3)  # asked again: the last holds
        return subprocess.CompletedProcess(command, 2 if run is runs[1] else 0)

    monkeypatch.setattr(asking.subprocess, "run", davinci_eval)
    said = {}
    asking.ask(design, lab, runs, parallel=1, say=lambda run, problem: said.update({run.label: problem}))
    assert len(commands) == 5 and commands[0][3] == "eval" and commands[0][-2:] == ["--suite", "local"]
    wrong = said.pop(runs[1].label)
    assert METRIC in wrong and "ended with 2" in wrong and f"{runs[1].identity}.eval.log" in wrong
    assert set(said.values()) == {""}
    verdict = judge(design, arms_of(design), runs, [outcome_of(lab, run, design.evaluate) for run in runs])
    [one] = verdict.deciding
    assert one.found.mean == pytest.approx(0.2) and one.word == "refused" and "seed 1, 3" in one.why
    asking.ask(design, lab, runs, parallel=1)
    assert len(commands) == 6  # only the one that had no score


def test_a_run_whose_journal_passes_over_its_last_steps_is_done(tmp_path):
    design = load_design(written(tmp_path, **ASKED))
    run, lab = runs_of(design)[0], tmp_path / "lab"
    folder, last = done(lab, run, without=2)
    result(folder, last, 0.3)
    journal = Journal.open(folder / "journal.jsonl")
    journal.append(MixRecord(0, "all", {"a": "1"}))
    journal.append(SkipRecord(8 * last, 8 * last + 8, "a spike"))
    assert outcome_of(lab, run).state == "begun"  # one is left
    journal.append(SkipRecord(8 * last + 8, 8 * last + 16, "a spike"))
    found = outcome_of(lab, run, design.evaluate)
    assert (found.state, found.step, found.metric("heldout_loss.mean")) == ("done", found.steps - 2, 3.0)
    assert found.metric(METRIC) == 0.3


OTHERWISE = {
    "limit": {"limit": 4},
    "suite": {"suite": None},
    "texts": {"given": {"texts": ["a=mine.jsonl"]}},
    "examples": {"given": {"shots": 5}},
    "checkpoint": {"identity": {"checkpoint": "of a run that was trained before"}},
}


@pytest.mark.parametrize("other", OTHERWISE.values(), ids=OTHERWISE)
def test_what_was_asked_in_another_way_is_no_score_of_the_design(other, tmp_path):
    design = load_design(written(tmp_path, **ASKED))
    run, lab = runs_of(design)[0], tmp_path / "lab"
    folder, steps = done(lab, run)
    (folder / f"checkpoints/step-{steps:08d}/manifest.json").write_text("{}")
    result(folder, steps, 0.9, **other)
    assert asking.missing(design, lab, run) == [METRIC]
    result(folder, steps, 0.3, identity={"checkpoint": digest_of_checkpoint({})})
    result(folder, steps, 0.9, **other)  # by hand, afterwards
    assert outcome_of(lab, run, design.evaluate).metric(METRIC) == 0.3
    assert asking.missing(design, lab, run) == []


def test_lines_that_are_of_no_task_are_passed_over(tmp_path):
    design = load_design(written(tmp_path, **ASKED))
    run, lab = runs_of(design)[0], tmp_path / "lab"
    folder, steps = done(lab, run)
    result(folder, steps, 0.3)
    kept(folder, {"step": steps, "suite": "local", "means": {"General": {}}})
    kept(folder, {"step": steps, "suite": "contamination", "texts": {}})
    with open(folder / "evals" / "results.jsonl", "a") as file:
        file.write('{"step": 4, "ta')
    assert outcome_of(lab, run, design.evaluate).metric(METRIC) == 0.3


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"items": 117}, "117 items and 120"),
        ({"shots": 3}, "3 examples and 0 before each"),
        ({"asked": "aa"}, "items of other texts"),
    ],
)
def test_a_pair_that_was_not_asked_the_same_is_not_compared(other, said, tmp_path):
    design = load_design(written(tmp_path, **ASKED))
    runs, lab = runs_of(design), tmp_path / "lab"
    for run in runs:
        folder, steps = done(lab, run)
        unlike = other if run.label == "half, seed 2" else {}
        result(folder, steps, 0.5, **{"shots": 0, "asked": "bb", **unlike})
    found = [outcome_of(lab, run, design.evaluate) for run in runs]
    [one] = judge(design, arms_of(design), runs, found).deciding
    assert one.word == "refused" and f"seed 2 were not asked the same for {METRIC}: {said}" in one.why
    assert sorted(one.found.each) == [1, 3]


def test_a_design_without_a_metric_of_a_task_asks_all_the_same(tmp_path):
    named = {"tasks": ["mmlu"], "both_ways": True, "limit": 4}
    held_out = ASKED | {"metrics": [{"name": "heldout_loss.mean", "margin": 0.01}]}
    suite, tasks = (
        load_design(written(tmp_path / name, **held_out | {"evaluate": evaluate}))
        for name, evaluate in {"suite": {"suite": "local"}, "tasks": named}.items()
    )
    run, lab = runs_of(suite)[0], tmp_path / "lab"
    folder, steps = done(lab, run)
    assert asking.missing(suite, lab, run) == ["local"]
    assert asking.missing(tasks, lab, run) == ["mmlu", "mmlu_generation"]
    result(folder, steps, 0.5)
    assert asking.missing(suite, lab, run) == ["local"], "it has not come to its end"
    result(folder, steps, 0.5, task="geometry")
    assert asking.missing(suite, lab, run) == []
    for other in ({"task": "mmlu"}, {"task": "mmlu_generation", "problem": "its data is not here"}):
        result(folder, steps, 0.5, suite=None, limit=4, **other)
    assert asking.missing(tasks, lab, run) == ["mmlu_generation"]


@pytest.mark.parametrize("metric", ["heldout_loss.mean", METRIC])
def test_what_had_the_same_problem_twice_is_not_asked_by_every_run_of_the_lab(metric, tmp_path, monkeypatch):
    metrics = [{"name": metric, "better": "higher" if metric == METRIC else "lower", "margin": 0.05}]
    design = load_design(written(tmp_path, **ASKED | {"metrics": metrics}))
    run, lab = runs_of(design)[0], tmp_path / "lab"
    folder, steps = done(lab, run)
    problems = iter(["no sandbox: a", "no sandbox: b", "no sandbox: b", "no sandbox: b", None])
    asked, told = [], []

    def davinci_eval(command, **_):
        asked.append(command)
        problem = next(problems)
        result(folder, steps, 0.5, **({"problem": problem, "metrics": {}} if problem else {}))
        result(folder, steps, 0.5, task="geometry")
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(asking.subprocess, "run", davinci_eval)

    def times(again):
        asking.ask(design, lab, [run], parallel=1, again=again, say=lambda run, problem: told.append(problem))
        return len(asked)

    assert [times(False) for _ in range(4)] == [1, 2, 3, 3]
    assert told[2].startswith("no score of") and "not again: the same problem twice in cloze" in told[3]
    assert [times(True) for _ in range(3)] == [4, 5, 5]
    assert told[4].startswith("no score of") and told[5:] == [""]


def test_who_was_not_asked_has_no_verdict(tmp_path):
    *_, verdict = judged(tmp_path, {}, **ASKED)
    [one] = verdict.deciding
    assert one.word == "refused" and "have not been asked" in one.why


def test_what_davinci_eval_is_told(tmp_path):
    told = asking.command_of(
        Evaluate(tasks=["mmlu", "arc_easy"], both_ways=True, limit=5, data=tmp_path / "sets"),
        tmp_path / "run",
    )
    assert told[:3] == [sys.executable, "-m", "megatron_davinci.cli.main"]
    assert told[3:] == ["eval", str(tmp_path / "run"), "--tasks", "mmlu,arc_easy", "--data", str(tmp_path / "sets"),
                        "--limit", "5", "--both-ways"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": None}, "no `evaluate`"),
        ({"evaluate": {"limit": 3}}, "either `suite` or `tasks`"),
        ({"evaluate": {"suite": "local", "tasks": ["a"]}}, "either `suite` or `tasks`"),
        ({"metrics": [{"name": METRIC, "margin": 0.05}]}, "better is missing"),
        ({"metrics": [{"name": "task.acc", "better": "higher", "margin": 0.05}]}, "task.NAME.METRIC"),
        ({"stop": {"behind": 0.1}}, "should be measured on the way"),
    ],
)
def test_designs_that_ask_what_cannot_be_known_are_refused(changes, said, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_design(written(tmp_path, **{**ASKED, **changes}))
    assert said in str(refused.value)


def test_the_table_of_all_arms(tmp_path):
    design = load_design(written(tmp_path))
    found = outcomes_of(runs_of(design), {("half", ""): 0.5}, failed={("half", 2)})
    control, half = lab_screen.arm_rows(found, "heldout_loss.mean")
    assert (
        control[:4] == ["control", "3 of 3", "0", "100%"]
        and control[4].startswith("3.2")
        and control[5] == ""
    )
    assert half[:2] == ["half", "2 of 3"] and half[5] == "1 failed" and "±" in half[4]
    nothing = [outcomes.Outcome(one.run, "to do", 0, 20) for one in found]
    assert lab_screen.arm_rows(nothing, "heldout_loss.mean")[0][1:] == ["0 of 3", "0", "0%", "–", ""]


def test_tasks_are_not_asked_of_arms_without_a_tokenizer(tmp_path):
    path = design_in(tmp_path)
    settings = yaml.safe_load(path.read_text()) | {"evaluate": {"suite": "local"}}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(ConfigError, match=r"data.tokenizer(.|\n)*nothing, in arm control"):
        arms_of(load_design(path))


def in_words(folder):
    """The base of `design_in` on sources of real words, with their tokenizer."""
    generator = np.random.default_rng(0)
    texts = folder / "texts.jsonl"
    lines = [json.dumps({"text": sentence(generator, 60)}) + "\n" for _ in range(300)]
    texts.write_text("".join(lines))
    train_bpe([texts], 320, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    base = yaml.safe_load((folder / "base.yaml").read_text())
    for name, source in base["data"]["sources"].items():
        source["path"] = str(folder / f"{name}.words")
        tokenize_jsonl([texts], tokenizer, Path(source["path"]), name, name)
    base["data"]["tokenizer"] = str(folder / "tokenizer")
    base["data"]["validation"] = {"a": str(folder / "a.words")}
    base["model"]["vocab_size"] = tokenizer.vocab_size
    (folder / "base.yaml").write_text(yaml.safe_dump(base))


@pytest.mark.long
@pytest.mark.needs("lm_eval")
def test_a_real_run_is_asked_by_davinci_eval(tmp_path):
    path = design_in(tmp_path, seeds=[1, 2])
    in_words(tmp_path)
    settings = yaml.safe_load(path.read_text())
    names = ("arithmetic_generation.exact_match,first", "arithmetic_likelihood.acc,none")
    settings |= {
        "evaluate": {"suite": "local", "limit": 4},
        "metrics": [{"name": f"task.{name}", "better": "higher", "margin": 0.1} for name in names],
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "megatron_davinci.cli.main",
        "lab",
        "run",
        str(path),
        "--out",
        str(tmp_path / "lab"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    verdict = json.loads((tmp_path / "lab" / "designs" / "design" / "verdict.json").read_text())
    assert [one["verdict"] != "refused" for one in verdict["comparisons"]] == [True, True], (
        said.stdout + said.stderr
    )
