"""The launcher hands signals on, waits for the ranks, and ends with a code that tells what to do next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.examples.cluster import outside
from tests.tiny import tiny_settings


def start(module, *arguments, behind=False):
    """A command; `behind`: as a shell script starts one with `&`, with a terminal's signals ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=outside(),
        preexec_fn=ignore if behind else None,
    )


def ignore():
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def numbers(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines]


def wait_for_step(run, step, process, seconds=120):
    deadline = time.monotonic() + seconds
    while len(numbers(run)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(launcher):
    children = psutil.Process(launcher.pid).children()
    found = [child for child in children if "megatron_davinci.train" in " ".join(child.cmdline())]
    return sorted(found, key=lambda rank: int(rank.environ()["RANK"]))


def end(process):
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
    process.communicate()


@pytest.fixture
def config(tmp_path):
    settings = tiny_settings(tmp_path, checkpoint={"every_steps": None})
    settings["logging"] |= {"progress": "lines", "every_steps": 10}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


def test_a_signal_to_the_launcher_is_a_checkpoint_and_code_75(config):
    run = config.parent / "run"
    launcher = start("megatron_davinci.cli.main", "train", str(config), "--ranks", "2")
    try:
        wait_for_step(run, 5, launcher)
        launcher.send_signal(signal.SIGTERM)
        said, _ = launcher.communicate(timeout=60)
    finally:
        end(launcher)
    last = numbers(run)[-1][0]
    assert launcher.returncode == 75, said
    assert "stopped: SIGTERM was heard by rank" in said and f"step {last} is saved." in said
    assert said.count("stopped:") == 1 and "Traceback" not in said and "error:" not in said
    assert (run / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()


@pytest.mark.long
def test_ranks_end_with_a_launcher_that_is_killed(config):
    run = config.parent / "run"
    launcher = start("megatron_davinci.cli.main", "train", str(config), "--ranks", "2", behind=True)
    try:
        wait_for_step(run, 5, launcher)
        ranks = ranks_of(launcher)
        launcher.kill()
        gone, left = psutil.wait_procs(ranks, timeout=20)
    finally:
        end(launcher)
    assert len(gone) == 2 and left == []
    said = [json.loads(path.read_text()) for path in (run / "ranks").glob("rank-*.json")]
    assert any("the launcher that started this rank has died" in json.dumps(one) for one in said), said


AGENTS = ("megatron_davinci.train.agent", "torch.distributed.run")


@pytest.mark.long
@pytest.mark.parametrize("agent", AGENTS)
def test_max_restarts_starts_a_killed_rank_again_and_finishes_the_run(agent, config):
    run, whole = config.parent / "run", config.parent / "whole"
    words = ("--standalone", "--nproc-per-node", "2", "-m", "megatron_davinci.train", str(config))
    undisturbed = start("megatron_davinci.train.agent", *words, f"run.directory={whole}")
    assert undisturbed.wait(120) == 0
    launcher = start(agent, "--max-restarts", "1", *words, "checkpoint.every_steps=4")
    try:
        wait_for_step(run, 10, launcher)
        ranks_of(launcher)[1].kill()
        said, _ = launcher.communicate(timeout=120)
    finally:
        end(launcher)
    assert launcher.returncode == 0, said
    assert numbers(run) == numbers(whole)


@pytest.mark.long
@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_torchrun_that_is_asked_to_end_leaves_a_checkpoint(agent, number, config):
    run = config.parent / "run"
    words = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "megatron_davinci.train")
    launcher = start(agent, *words, str(config))
    try:
        wait_for_step(run, 5, launcher)
        # torchrun itself does not hear SIGUSR1, which ends it: there the ranks are told.
        ranks = ranks_of(launcher)
        if agent == AGENTS[1] and number == signal.SIGUSR1:
            os.kill(ranks[0].pid, number)
            time.sleep(3)
            launcher.terminate()
        else:
            launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=90)
    finally:
        end(launcher)
    assert launcher.returncode == (75 if agent == AGENTS[0] else 1), said
    assert list((run / "checkpoints").glob("step-*")), said
    assert all(not rank.is_running() for rank in ranks)
