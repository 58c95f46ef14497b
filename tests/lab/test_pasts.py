"""Arms that share a past are trained up to where they part once; runs are stopped early only by the design's rule."""

import json
import math
import signal
import subprocess
import sys

import pytest
import yaml

from benchmarks.lab_calibration import base
from megatron_davinci.errors import ConfigError
from megatron_davinci.lab import runner
from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.control import check, tokens_of
from megatron_davinci.lab.design import Metric, Stop, load_design
from megatron_davinci.lab.outcomes import Outcome, folder_of, outcome_of
from megatron_davinci.lab.pasts import origin_of, past_of, pasts_of
from megatron_davinci.lab.runner import Trainer, carry_out
from megatron_davinci.lab.stopping import diverged, hopeless, watcher
from tests.lab.test_design import RATE, written
from tests.tiny import tiny_settings

LATER = "curriculum.1.learning_rate.peak"


def two_stages(folder, **changes):
    path = written(
        folder,
        **{
            "varies": [LATER],
            "arms": {"control": {}, "half": {"set": {LATER: 1.5e-3}}, "third": {"set": {LATER: 1e-3}}},
            "branch": {"after": "all"},
            **changes,
        },
    )
    settings = base()
    settings["curriculum"].append({**settings["curriculum"][0], "name": "end"})
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    design = load_design(path)
    return design, arms_of(design)


def test_a_past_is_trained_once_for_each_seed(tmp_path):
    design, arms = two_stages(tmp_path)
    runs = runs_of(design, arms)
    assert check(design, arms) == []
    pasts = pasts_of(design, runs)
    assert len(runs) == 9 and [one.seed for one in pasts] == [1, 2, 3]
    assert [stage.name for stage in pasts[0].arm.config.curriculum] == ["all"]
    # Nine halves and three shared ones, instead of nine wholes.
    assert tokens_of(design, runs) == 12 * 40960
    assert origin_of(design, tmp_path, runs[0]) == str(folder_of(tmp_path, past_of(design, runs[0])))
    # What is trained is the same, so that runs are shared with designs that do not branch.
    plain, _ = two_stages(tmp_path / "plain", branch=None)
    assert [one.identity for one in runs_of(plain)] == [one.identity for one in runs]
    assert pasts_of(plain, runs) == [] and tokens_of(plain, runs) == 18 * 40960


def test_arms_that_share_no_past_are_refused(tmp_path):
    arms = {"control": {}, "early": {"set": {RATE: 1e-3}}}
    design, found = two_stages(tmp_path, arms=arms, varies=[RATE])
    [one] = check(design, found)
    assert one.kind == "past" and "early differs from control before it branches: " + RATE in one.what
    design, found = two_stages(tmp_path, branch={"after": "nowhere"})
    with pytest.raises(ConfigError, match="branch after a stage") as refused:
        check(design, found)
    assert "nowhere" in str(refused.value) and "one of all" in str(refused.value)
    for branch, said in (
        ({"after": "all", "run": "a@1"}, "either `after`"),
        ({"run": "runs/base"}, "name a step"),
        ({"run": "runs/base@10"}, "checkpoint of each seed"),
    ):
        with pytest.raises(ConfigError) as refused:
            two_stages(tmp_path, branch=branch)
        assert said in str(refused.value)


def test_a_checkpoint_that_is_there_is_part_of_what_a_run_computes(tmp_path):
    design, arms = two_stages(tmp_path, branch={"run": "base-{seed}@10"})
    runs = runs_of(design, arms)
    assert runs[0].origin == str(tmp_path / "base-1@10") == origin_of(design, tmp_path, runs[0])
    before = [one.identity for one in runs]
    folder = tmp_path / "base-1" / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    after = [one.identity for one in runs_of(design, arms)]
    assert [a != b for a, b in zip(before, after)] == [run.seed == 1 for run in runs]


def outcome(run, values, losses=(), steps=100):
    lines = [
        {"step": step, "consumed_tokens": 1000 * step, "heldout_loss": {"a": value}}
        for step, value in values.items()
    ]
    return Outcome(run, "begun", max(values, default=0), steps, "", lines, list(losses))


def test_what_diverged_and_what_is_hopeless(tmp_path):
    fell = [4 - 0.02 * step for step in range(60)]
    assert diverged(fell, 0.5) == "" and diverged([], 0.5) == ""
    assert "nan at step 61" in diverged([*fell, math.nan], 0.5)
    assert "diverged: at step 80 the training loss of 20 steps is 1.99" in diverged([*fell, *[5.0] * 20], 0.5)
    assert diverged([*fell, *[5.0] * 2], 0.5) == ""  # a spike is none
    metric, rule = Metric(name="heldout_loss.mean", margin=0.1), Stop(behind=0.3, after=0.5)
    control = outcome(None, {25: 3.0, 50: 2.5, 75: 2.0})
    assert hopeless(outcome(None, {25: 4.0}), control, metric, rule) == ""  # too early
    assert hopeless(outcome(None, {25: 4.0, 50: 2.7}), control, metric, rule) == ""
    assert hopeless(outcome(None, {100: 9.0}), control, metric, rule) == ""  # the control is not there yet
    said = hopeless(outcome(None, {25: 3.0, 50: 2.9}), control, metric, rule)
    assert "at step 50 of 100" in said and "0.400 behind" in said
    higher = Metric(name="heldout_loss.mean", margin=0.1, better="higher")
    assert hopeless(outcome(None, {50: 2.9}), control, higher, rule) == ""
    lost = outcome(None, {25: 3.0, 50: float("nan")})
    assert hopeless(outcome(None, {25: 3.0, 50: 2.9}), lost, metric, rule) == "", (
        "the control is what diverged"
    )
    assert "nan behind" in hopeless(lost, control, metric, rule)


def test_only_the_control_of_its_seed_is_waited_for_and_stopped_runs_may_go_on(tmp_path):
    design, arms = two_stages(tmp_path, stop={"behind": 0.1})
    runs = runs_of(design, arms)
    control = {(run.arm.size, run.seed): run for run in runs if run.arm.name == "control"}
    ask = watcher(tmp_path, design.stop, design.metrics[0], control)
    steps = 2 * 40960 // 32 // 8
    for run, value in ((runs[0], 2.0), (runs[1], 2.5)):
        folder = folder_of(tmp_path, run)
        folder.mkdir(parents=True)
        line = {"step": steps - 1, "consumed_tokens": 9, "heldout_loss": {"a": value}}
        (folder / "evals.jsonl").write_text(json.dumps(line) + "\n")
    assert ask(runs[0]) == "" and "0.500 behind" in ask(runs[1]) and ask(runs[3]) == ""
    (folder_of(tmp_path, runs[1]) / "stopped.json").write_text('{"why": "hopeless: it was"}')
    assert outcome_of(tmp_path, runs[1]).state == "stopped"
    assert "stopped" in Trainer(tmp_path).starts and "stopped" not in Trainer(tmp_path, watch=ask).starts


def test_a_run_at_work_is_asked_to_stop(tmp_path, monkeypatch):
    design, _ = two_stages(tmp_path, stop={"diverged": 1.0})
    [run, *_] = runs_of(design)
    looks = iter(["", "", "diverged: it did"])
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)
    trainer = Trainer(tmp_path, watch=lambda one: next(looks) if one is run else "")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert trainer._wait(process, run) == (-signal.SIGTERM, "diverged: it did")


def test_nothing_is_started_once_the_lab_is_to_end(tmp_path, monkeypatch):
    design, arms = two_stages(tmp_path)
    runs, seen = runs_of(design, arms), []

    class Interrupted:
        def __init__(self, trainer):
            seen.append(trainer)

        def train(self, run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path / "lab", runs, parallel=2, design=design, executor=Interrupted)
    [trainer] = seen
    monkeypatch.setattr(Trainer, "_start", lambda self, run, lock: seen.append(run))
    trainer.train(runs[0])
    # Another lab has the run: whoever waits for it gives up.
    monkeypatch.setattr(runner, "try_lock", lambda path: None)
    trainer.train(runs[1])
    assert seen == [trainer]


@pytest.mark.parametrize(("begun", "then"), [(True, "to do"), (False, "failed")])
def test_arms_of_a_past_that_was_interrupted_are_no_failures(tmp_path, monkeypatch, begun, then):
    design, arms = two_stages(tmp_path)
    [run, *_] = runs_of(design, arms)
    past = past_of(design, run)

    def ended(self, one, lock):
        assert one.identity == past.identity
        if begun:
            folder_of(tmp_path, one).mkdir(parents=True)
            line = {"step": 1, "loss": 4.0, "seconds": 1.0, "consumed_samples": 8}
            (folder_of(tmp_path, one) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        else:
            self._failed(one, 1, "no memory")

    monkeypatch.setattr(Trainer, "_start", ended)
    Trainer(tmp_path, design=design).train(run)
    assert outcome_of(tmp_path, past).state == ("begun" if begun else "failed")
    found = outcome_of(tmp_path, run)
    assert found.state == then and ("no memory" in found.why) == (not begun)


def branching(folder, **changes):
    settings = tiny_settings(folder, evaluation={"every_steps": 5, "sequences": 8})
    settings["checkpoint"] = {"every_steps": None}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    first = settings["curriculum"][0]["name"]
    design = {
        "question": "?",
        "base": "base.yaml",
        "varies": [LATER],
        "arms": {"control": {}, "wild": {"set": {LATER: 0.5}}},
        "seeds": [1, 2],
        "metrics": [{"name": "heldout_loss.mean", "margin": 0.05}],
        **changes,
    }
    path = folder / "design.yaml"
    path.write_text(yaml.safe_dump(design, sort_keys=False))
    return load_design(path), first


@pytest.mark.long
def test_a_branched_run_is_the_whole_one_and_a_hopeless_one_is_stopped(tmp_path, monkeypatch):
    plain, first = branching(tmp_path)
    runs = runs_of(plain)
    whole = carry_out(tmp_path / "whole", runs, parallel=2)
    design, _ = branching(tmp_path, branch={"after": first})
    branched = carry_out(tmp_path / "lab", runs, parallel=2, design=design)
    assert [one.state for one in branched] == ["done"] * 4
    for ours, theirs in zip(branched, whole, strict=True):
        assert ours.losses == theirs.losses
        assert [line["heldout_loss"] for line in ours.evaluations][-1] == theirs.evaluations[-1][
            "heldout_loss"
        ]
    for run in runs:
        manifest = json.loads((folder_of(tmp_path / "lab", run) / "manifest.json").read_text())
        assert manifest["branched_from"]["run"].endswith(past_of(design, run).identity)
    design, _ = branching(tmp_path, branch={"after": first}, stop={"behind": 0.01, "after": 0.1})
    again = carry_out(tmp_path / "lab", runs, parallel=2, design=design)
    assert [one.state for one in again] == ["done"] * 4  # what is done is not stopped
    # A longer stage, in which the wild arm leaves its control behind while it is at work.
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)
    longer = {"curriculum.1.tokens": "200k"}
    design, _ = branching(
        tmp_path, branch={"after": first}, stop={"behind": 0.01, "after": 0.3}, overrides=longer
    )
    runs = runs_of(design)
    carry_out(tmp_path / "lab", [one for one in runs if one.arm.name == "control"], parallel=2, design=design)
    found = carry_out(tmp_path / "lab", runs, parallel=2, design=design)
    assert [one.state for one in found] == ["done", "stopped"] * 2
    assert all(one.step < one.steps and "hopeless" in one.why for one in found[1::2])
