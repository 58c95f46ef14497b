"""`davinci train` starts ranks that train, goes on where it stopped, and fails as its ranks fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.screen import Screen, davinci, davinci_on_a_rank
from tests.tiny import tiny_settings


def launched(*arguments: object, timeout: float = 150) -> Screen:
    """The command in a process of its own, as a shell starts it: no launcher around it."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_davinci.cli.main", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )
    return Screen(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    settings = tiny_settings(root, train={"stop_after_steps": 3})
    settings["logging"] = {"tensorboard": False, "progress": "lines", "every_steps": 1}
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_it_trains_then_has_nothing_left_to_do_then_converts(config, tmp_path, monkeypatch):
    run = config.parent / "run"
    with monkeypatch.context() as changed:
        changed.setenv("TMPDIR", str(tmp_path))
        first = launched(config)
    assert first.code == 0, first.err
    assert [
        path.name for path in tmp_path.iterdir() if path.name.startswith(("torchelastic", "davinci"))
    ] == []
    assert "Done: step 3" in first.out
    assert "Warning" not in first.err and "Traceback" not in first.err
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000003"]

    again = davinci_on_a_rank("train", config)
    assert again.code == 0, again.err
    assert "Nothing is left to do: step 3 of 3 is done." in again.out
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == metrics

    changes = ("model.num_layers=4", "model.qkv_bias=false", "optimizer.kind=muon")
    other = davinci_on_a_rank("train", config, *changes, "parallel.distributed_optimizer=false").refusal()
    assert "The checkpoint is of another model." in other
    assert "model.num_layers: 2 in the checkpoint, 4 in this run" in other
    assert "model.qkv_bias: True in the checkpoint, False in this run" in other
    assert "optimizer.kind: adamw in the checkpoint, muon in this run" in other

    converted = davinci("convert", "to-hf", run)
    assert (converted.code, converted.out.strip()) == (0, str(run / "hf" / "step-00000003"))
    assert json.loads((run / "hf" / "step-00000003" / "config.json").read_text())["model_type"] == "qwen2"
    assert "is there already" in davinci("convert", "to-hf", f"{run}@3").refusal()


@pytest.mark.long
def test_what_a_rank_refuses_the_command_refuses(config):
    screen = launched(config, "data.sources.a.path=nowhere", "run.directory=elsewhere", "--ranks", 2)
    text = screen.refusal()
    assert text.count("Source a is not there.") == 1, "said once, though both ranks met it"
    assert not Path("elsewhere").exists()
