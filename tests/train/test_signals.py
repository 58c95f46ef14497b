"""A run that is asked to end saves, says so by its exit code, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.ranks import run_ranks, start_ranks
from tests.tiny import tiny_settings, train_here

PHASES = ("index", "step", "evaluation", "save")


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"]) for m in lines]


def evaluations(run):
    path = run / "evals.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(e["step"], e["heldout_loss"]) for e in map(json.loads, lines)]


def steps_saved(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def a_rank(config, phase, marker, seconds):
    """What `python -m megatron_davinci.train` does, once everything is imported; it dawdles in a phase of step 6."""
    from megatron_davinci.cli.train import main
    from megatron_davinci.evaluate.heldout import HeldOutEvaluator
    from megatron_davinci.train import checkpoint, loop
    from megatron_davinci.train.signals import WATCH
    from megatron_davinci.train.step import Stepper

    places = {
        "index": (loop, "verified_sources", 1),
        "step": (Stepper, "train", 6),
        "evaluation": (HeldOutEvaluator, "evaluate", 1),
        "save": (checkpoint.checkpoint_files, "begin", 1),
    }
    owner, name, at = places[phase]
    original, calls = getattr(owner, name), []

    def dawdling(*args, **keywords):
        calls.append(1)
        if len(calls) == at:
            marker.touch()
            time.sleep(seconds)
        return original(*args, **keywords)

    setattr(owner, name, dawdling)
    sys.argv = ["train", str(config)]
    # A shell has jobs in the background ignore it, and what is ignored from outside stays so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    WATCH.install()
    main()


def settings_of(root, run, **changes):
    return tiny_settings(
        root,
        run={"directory": str(run), "seed": 7},
        checkpoint={"every_steps": 6},
        evaluation={"every_steps": 6, "sequences": 8},
        train={"stop_after_steps": 9},
        **changes,
    )


def begin(tmp_path, settings, phase, seconds=1.5):
    """Two ranks that are in the phase now."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    started = start_ranks(2, a_rank, tmp_path / "config.yaml", phase, tmp_path / "marker", seconds)
    wait_for(tmp_path / "marker")
    return [process for process, _ in started]


def codes(ranks):
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run_ranks(2, train_here, settings_of(root, root / "run"))
    return root


@pytest.mark.parametrize(
    "phase", [p if p == "save" else pytest.param(p, marks=pytest.mark.long) for p in PHASES]
)
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_and_the_run_goes_on_bitwise(phase, whole, tmp_path):
    settings = settings_of(whole, tmp_path / "run")
    ranks = begin(tmp_path, settings, phase)
    # By turns the rank that writes the record and the other one, Slurm's signals and a terminal's.
    rank, number = {
        "index": (1, signal.SIGTERM),
        "step": (1, signal.SIGUSR1),
        "evaluation": (0, signal.SIGINT),
        "save": (0, signal.SIGTERM),
    }[phase]
    os.kill(ranks[rank].pid, number)
    ended = codes(ranks)
    if phase == "index":
        # Nothing was there to save: it leaves at once, and the other one has lost it.
        assert ended[1] == 75 and ended[0] != 0
        assert steps_saved(tmp_path / "run") == []
    else:
        assert ended == [75, 75]
        assert steps_saved(tmp_path / "run") == [6]
    assert run_ranks(2, train_here, settings) == [9, 9]
    assert numbers(tmp_path / "run") == numbers(whole / "run")
    assert evaluations(tmp_path / "run") == evaluations(whole / "run")


def test_a_second_signal_ends_a_rank_at_once(whole, tmp_path):
    ranks = begin(tmp_path, settings_of(whole, tmp_path / "run"), "step", seconds=60)
    began = time.monotonic()
    os.kill(ranks[0].pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(ranks[0].pid, signal.SIGTERM)  # the same request, from a launcher and from whoever told it
    time.sleep(1.2)
    assert ranks[0].is_alive()
    os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(30)
    assert ranks[0].exitcode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30, "it did not wait for the step"
    ranks[1].kill()
    assert steps_saved(tmp_path / "run") == []


def test_a_boundary_that_does_not_come_in_time_is_not_waited_for(whole, tmp_path):
    settings = settings_of(whole, tmp_path / "run", health={"grace_seconds": 1})
    ranks = begin(tmp_path, settings, "step", seconds=60)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    ranks[1].join(30)
    assert ranks[1].exitcode == 128 + signal.SIGUSR1
    ranks[0].kill()


def test_a_signal_while_it_is_imported_ends_a_rank_with_the_code_for_another_start(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "megatron_davinci.train", "nowhere.yaml"],
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "pydantic" not in said:
        said = process.stderr.readline()
        assert said, "it ended by itself"
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "stopped: SIGTERM before the first step; nothing was lost." in rest
