"""Four stages, a batch ramp and three changes of the mixture: killed anywhere, on any layout, it is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from megatron_davinci.config import validate
from megatron_davinci.data import Batches, Journal
from megatron_davinci.data.token_digest import token_digest
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.forecast import Forecast
from tests.cli.screen import davinci
from tests.ranks import run_ranks, start_ranks
from tests.tiny import LENGTH, tiny_settings, train_here, write_source

STEPS, PAUSE, LIVE = 48, 15, 22
RATE = {"peak": 1e-3}


def settings_of(root, name, edited=True, **train):
    """A run of 48 steps. `edited`: its configuration after step 15, of other mixtures, batches and a new source."""
    for seed, source in enumerate(("a", "b", "c")):
        if not (root / "data" / source).exists():
            write_source(root / "data" / source, source, seed)
    settings = tiny_settings(root, run={"directory": str(root / name)}, train=train)
    settings["data"] = {
        "sequence_length": LENGTH,
        "sources": {one: {"path": str(root / "data" / one)} for one in ("abc" if edited else "ab")},
        "loader": {"prefetch_steps": 3},
    }
    settings["checkpoint"] = {"every_steps": 5}
    settings["logging"] = {**settings["logging"], "token_digest": True}
    ramp = [{"size": 4, "steps": 10}, {"size": 8}]
    if edited:
        ramp[1:] = [{"size": 8, "steps": 8}, {"size": 16}]
    stages = [  # name, samples, batches, mixture before and after the edit
        ("1-1", 40 + 64 + 32, ramp, {"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.25, "c": 0.25}),
        ("1-2", 160, 16, {"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}),
        ("2-1", 160, 16, {"a": 0.25, "b": 0.75}, {"a": 0.25, "b": 0.75}),
        ("2-2", 128, 16, {"b": 1}, {"b": 0.5, "c": 0.5}),
    ]
    settings["curriculum"] = [
        {"name": stage, "tokens": samples * LENGTH, "mixture": after if edited else before,
         "global_batch_size": batches, "learning_rate": RATE}
        for stage, samples, batches, before, after in stages
    ]  # fmt: skip
    return settings


def train_slowly(settings):
    """As a model of some size: somebody has time to ask for an edit at step 23, and for a kill to come between."""
    from megatron_davinci.train.loop import TrainingRun

    step = TrainingRun._step

    def slow(self, *args):
        time.sleep(0.02)
        deadline = time.monotonic() + 60
        while self.step == LIVE and len(self.directory.edits.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return step(self, *args)

    TrainingRun._step = slow
    return train_here(settings)


def steps_on_record(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len(lines)


def edit(run, *words):
    screen = davinci("curriculum", "edit", run, *words)
    assert screen.code == 0, screen.err
    return screen.out


def until(started, run, step):
    """Wait for a step to be on record; whether it came before the run ended."""
    deadline = time.monotonic() + 120
    while steps_on_record(run) < step:
        assert time.monotonic() < deadline, "the run never came that far"
        if not all(process.is_alive() for process, _ in started):
            return False
        time.sleep(0.005)
    return True


def kill(started):
    for process, connection in started:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        connection.close()


def begin(root, name):
    """The first 15 steps, and a change that is planned for the third stage."""
    run_ranks(1, train_here, settings_of(root, name, edited=False, stop_after_steps=PAUSE))
    edit(root / name, "--stage", "2-1", "--mixture", "a=0.6,b=0.4", "--reason", "less of b for a while")


def starts(run):
    return len(json.loads((run / "manifest.json").read_text())["starts"])


def edit_live(run, *where):
    edit(run, *where, "--mixture", "b=0.9,c=0.1", "--reason", "a has stopped to improve")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["consumed_samples"], m["token_digest"]) for m in lines]


# The undisturbed run alone takes most of a minute.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run, with an edit `--next` while it is at work."""
    root = tmp_path_factory.mktemp("edits")
    begin(root, "run")
    started = start_ranks(1, train_slowly, settings_of(root, "run"))
    try:
        assert until(started, root / "run", LIVE)
        edit_live(root / "run", "--next")
        assert started[0][1].poll(120) and started[0][1].recv() == ("value", STEPS)
    finally:
        kill(started)
    return root


def test_three_changes_each_where_it_belongs(undisturbed):
    config = validate(settings_of(undisturbed, "run"), where="test")
    records = Journal.open(undisturbed / "run" / "journal.jsonl").mixes
    assert [(r.stage, r.origin) for r in records] == [
        ("1-1", ""), ("1-1", "configuration"), ("1-2", ""), ("1-2", "edit-2"), ("2-1", "edit-1"), ("2-2", ""),
    ]  # fmt: skip
    schedule = Schedule(config.curriculum, LENGTH)
    steps = [schedule.at(record.first_sample).step for record in records]
    assert steps[:3] == [1, PAUSE + 1, 21] and steps[4:] == [31, 41]
    assert steps[3] == LIVE + 2, "asked for during the step before"
    assert records[3].reason == "a has stopped to improve" and dict(records[3].weights) == {
        "b": "0.9",
        "c": "0.1",
    }


def test_the_digest_of_each_step_is_that_of_its_samples(undisturbed):
    forecast = Forecast.read(validate(settings_of(undisturbed, "run"), where="test"))
    batches = Batches(forecast.curriculum, forecast.sources)
    found = metrics(undisturbed / "run")
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    begins = 0
    for _, consumed, digest in found:
        numbers = np.arange(begins, consumed)
        assert digest == token_digest(numbers[::-1], batches.read(numbers[::-1]).tokens)
        begins = consumed
    # No window comes twice before all others of its source came.
    located = [forecast.curriculum.locate(n) for n in range(begins)]
    assert len({(one.source, one.epoch, one.window) for one in located}) == len(located)


def disturbed(root, name, kills, other_layouts, seed):
    """The same run, killed at random points and resumed, some times on another number of ranks."""
    run, chance = root / name, random.Random(seed)
    live = Journal.open(root / "run" / "journal.jsonl").mixes[3].first_sample
    schedule = Schedule(validate(settings_of(root, "run"), where="test").curriculum, LENGTH)
    begin(root, name)
    asked, points = False, []
    for number in range(kills + 1):
        ranks = 2 if number in other_layouts else 1
        begun = starts(run)
        started = start_ranks(ranks, train_slowly, settings_of(root, name))
        try:
            if number == kills:
                assert asked and started[0][1].poll(120) and started[0][1].recv() == ("value", STEPS)
                assert all(connection.poll(60) for _, connection in started[1:])
                break
            while starts(run) == begun:  # it has dropped the steps that it takes again
                assert started[0][0].is_alive()
                time.sleep(0.005)
            if number == 1:
                assert until(started, run, PAUSE + 2)
                edit_live(run, "--at-step", schedule.at(live).step)
                asked = True
            # Now and then before the first step, else up to some steps beyond where it is.
            most = PAUSE + 1 if number == 0 else STEPS - 1
            assert until(started, run, min(most, steps_on_record(run) + chance.randint(0, 7)))
            time.sleep(chance.random() * 0.05)
        finally:
            kill(started)
        points.append(steps_on_record(run))
    assert (run / "journal.jsonl").read_bytes() == (root / "run" / "journal.jsonl").read_bytes()
    assert metrics(run) == metrics(root / "run")
    return points


def test_killed_and_resumed_it_is_the_same_run(undisturbed):
    disturbed(undisturbed, "killed", kills=3, other_layouts={2}, seed=1)


def test_killed_at_twenty_points_it_is_the_same_run(undisturbed):
    points = disturbed(undisturbed, "killed twenty times", kills=20, other_layouts={7, 13}, seed=6)
    print(f"killed after steps {points}")
    assert len(points) == 20
