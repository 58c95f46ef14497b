"""A rank that stands still is named, whatever it does, and the run ends; what only takes long is left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest
import yaml

from megatron_davinci.config.health import HangConfig
from megatron_davinci.train.phases import PhaseTimers
from megatron_davinci.train.watchdog import Watchdog, who_is_behind
from tests.ranks import start_ranks
from tests.tiny import tiny_settings

HANG = {"times_longest_step": 3, "least_seconds": 1.0, "unknown_seconds": 60}


def standing(count, waits):
    return {"count": count, "waits_for_others": waits}


@pytest.mark.parametrize(
    ("found", "behind"),
    [
        ({0: standing(5, True), 1: standing(4, False)}, [2]),
        ({0: standing(5, True), 1: standing(4, True), 2: standing(5, True)}, [1]),
        ({0: standing(5, True), 1: standing(5, False), 2: standing(5, True)}, [1]),
        ({0: standing(5, True), 1: standing(4, True), 2: standing(4, False)}, [2]),
        ({0: standing(5, True), 1: standing(5, True), 2: standing(5, True)}, []),
        ({}, [0, 1, 2]),
    ],
    ids=["silent and behind", "behind", "works", "works and behind", "all wait", "all silent"],
)
def test_who_is_behind(found, behind):
    assert who_is_behind(found, 3) == behind


def test_the_limit_is_that_of_what_is_known(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dog = Watchdog(tmp_path, HangConfig(least_seconds=2, unknown_seconds=100), 0, 1, PhaseTimers(None))
    for step in range(1, 7):
        dog.beat("step", step)
        assert dog.limit == 100, "too few steps are known"
        now[0] += 30 if step == 1 else 0.5  # the first compiles
    dog.beat("step", 7)
    assert dog.limit == 5.0
    dog.beat("evaluation", 7)
    assert dog.limit == 100


def a_rank(config, plant, marker):
    """A rank that stands still at step 9, or takes its time where that is allowed."""
    from megatron_davinci.cli.train import main
    from megatron_davinci.evaluate.heldout import HeldOutEvaluator
    from megatron_davinci.train.signals import WATCH
    from megatron_davinci.train.step import Stepper

    rank, steps = int(os.environ["RANK"]), []
    train, evaluate = Stepper.train, HeldOutEvaluator.evaluate

    def stand_still():
        marker.touch()
        if plant == "sleeps":
            time.sleep(600)
        elif plant == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif plant == "holds the interpreter":
            re.match("(a+)+b", "a" * 60)

    def planted(self, *args, **keywords):
        steps.append(1)
        if len(steps) == 9 and rank == 1:
            stand_still()
        if plant == "is slow" and len(steps) in (1, 12) and rank == 1:
            time.sleep(2.5)
        return train(self, *args, **keywords)

    def slow(self, *args):
        time.sleep(2.5 if plant == "is slow" else 0)
        return evaluate(self, *args)

    Stepper.train, HeldOutEvaluator.evaluate = planted, slow
    sys.argv = ["train", str(config)]
    WATCH.install()
    main()


def run_with(tmp_path, plant):
    settings = tiny_settings(
        tmp_path,
        health={"hang": HANG},
        evaluation={"every_steps": 10, "sequences": 8},
        train={"stop_after_steps": 14},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    started = start_ranks(2, a_rank, tmp_path / "config.yaml", plant, tmp_path / "marker")
    for rank, connection in started:
        rank.connection = connection  # a rank that cannot send what it returns ends with code 1
    return [rank for rank, _ in started]


@pytest.mark.parametrize(
    "plant",
    ["sleeps", *(pytest.param(n, marks=pytest.mark.long) for n in ("is stopped", "holds the interpreter"))],
)
def test_a_rank_that_stands_still_ends_the_run_by_name(plant, tmp_path):
    ranks = run_with(tmp_path, plant)
    deadline = time.monotonic() + 120
    while not (tmp_path / "marker").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[0].join(60)
    assert ranks[0].exitcode == 4
    left = tmp_path / "run" / "ranks"
    alarm = json.loads((left / "hang.json").read_text())
    assert alarm["behind"] == [1] and alarm["step"] == 9
    said = alarm["said"]
    assert said.startswith("A rank stands still, and the others wait for it.\n  where:    step 9")
    if plant == "sleeps":
        ranks[1].join(30)
        assert ranks[1].exitcode == 4
        assert f"process {ranks[1].pid}" in said and "in stand_still" in said
        assert "in stand_still" in json.loads((left / "rank-00001.hang.json").read_text())["stacks"]
    else:
        assert ranks[1].is_alive()
        assert (
            "cannot run Python" in said
            if plant.startswith("holds")
            else "gives no sign: it is stopped" in said
        )
        assert f"process {ranks[1].pid}" in said
        ranks[1].kill()
    if plant.startswith("holds"):
        assert "stand_still" in (left / "rank-00001.stacks.txt").read_text()
    assert "train" in json.loads((left / "rank-00000.hang.json").read_text())["stacks"]
    assert json.loads((left / "rank-00000.json").read_text())["ended"]["code"] == 4


def test_what_takes_long_and_goes_on_is_no_hang(tmp_path):
    # The first step, an evaluation, and a step that is late but comes.
    ranks = run_with(tmp_path, "is slow")
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    left = tmp_path / "run" / "ranks"
    # Stacks may be there, written when the step was late; nobody has been said to stand still.
    assert not [path.name for path in left.iterdir() if "hang" in path.name]
    assert json.loads((left / "rank-00001.json").read_text())["ended"]["code"] == 0
