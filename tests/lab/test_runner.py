"""The runner keeps nothing that a kill could lose, and trains nothing twice."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from megatron_davinci.lab.arms import runs_of
from megatron_davinci.lab.design import load_design
from megatron_davinci.lab.outcomes import FAILED, folder_of, outcome_of
from megatron_davinci.lab.runner import carry_out, unique
from tests.examples.cluster import outside
from tests.tiny import tiny_settings

RATE = "curriculum.0.learning_rate.peak"
pytestmark = pytest.mark.long


def design_in(folder, **changes):
    settings = tiny_settings(folder, evaluation={"every_steps": 10, "sequences": 8})
    settings["curriculum"] = settings["curriculum"][:1]
    settings["checkpoint"] = {"every_steps": 6}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    design = {
        "question": "Does half the rate lose anything?",
        "base": "base.yaml",
        "varies": [RATE],
        "arms": {"control": {}, "half": {"set": {RATE: 5e-3}}},
        "seeds": [1, 2],
        "metrics": [{"name": "heldout_loss.mean", "margin": 0.05}],
        **changes,
    }
    path = folder / "design.yaml"
    path.write_text(yaml.safe_dump(design, sort_keys=False))
    return path


def lab(path, out):
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_davinci.cli.main", "lab", "run", str(path), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=outside(),
    )


def starts(root, runs):
    found = {}
    for run in runs:
        path = folder_of(root, run) / "manifest.json"
        found[run.identity] = len(json.loads(path.read_text())["starts"]) if path.exists() else 0
    return found


def test_a_runner_that_is_killed_ten_times(tmp_path):
    path, chance = design_in(tmp_path), random.Random(5)
    runs = unique(runs_of(load_design(path)))
    whole = lab(path, tmp_path / "whole")
    assert whole.wait(600) == 0, whole.stdout.read()
    assert starts(tmp_path / "whole", runs) == {run.identity: 1 for run in runs}
    out, at_the_end = tmp_path / "killed", {}
    for _ in range(10):
        runner = lab(path, out)
        time.sleep(chance.uniform(0.5, 8))
        runner.send_signal(signal.SIGKILL)
        runner.communicate()
        counted = starts(out, runs)
        for run in runs:
            if outcome_of(out, run).state == "done":
                at_the_end.setdefault(run.identity, counted[run.identity])
    last = lab(path, out)
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0, said
    assert all(starts(out, runs)[identity] == number for identity, number in at_the_end.items())
    verdicts = [
        json.loads((root / "designs" / "design" / "verdict.json").read_text())
        for root in (out, tmp_path / "whole")
    ]
    assert verdicts[0] == verdicts[1] and verdicts[0]["comparisons"][0]["verdict"] != "refused"
    # Asked again, it has nothing left to do.
    before = starts(out, runs)
    again = lab(path, out)
    assert again.wait(60) == 0 and starts(out, runs) == before


def test_a_run_that_fails_stops_no_other_and_is_started_again_when_asked(tmp_path):
    path = design_in(tmp_path)
    runs = runs_of(load_design(path))
    broken = tmp_path / "data" / "a" / "manifest.json"
    whole = broken.read_text()
    carry_out(tmp_path / "lab", runs[:1], parallel=1)
    broken.write_text("{")
    found = carry_out(tmp_path / "lab", runs[:2], parallel=2)
    assert [one.state for one in found] == ["done", "failed"]
    assert "manifest" in found[1].why and (folder_of(tmp_path / "lab", runs[1]) / FAILED).exists()
    broken.write_text(whole)
    assert carry_out(tmp_path / "lab", runs[:2], parallel=2)[1].state == "failed"
    assert carry_out(tmp_path / "lab", runs[:2], parallel=2, retry=True)[1].state == "done"
