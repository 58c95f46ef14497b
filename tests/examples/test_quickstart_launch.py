"""The quickstart starts its ranks by the launcher that there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from megatron_davinci.config import load_config
from megatron_davinci.errors import DavinciError
from megatron_davinci.train import launch

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_asks_the_launcher_for_what_it_takes_and_stops_when_a_rank_does(quickstart, monkeypatch, tmp_path):
    path, overrides = str(FOLDER / "config.yaml"), [f"run.directory={tmp_path}"]
    config = load_config(path, overrides)
    # With the launcher's own signature.
    started = create_autospec(launch.launch, return_value=0)
    monkeypatch.setattr(launch, "launch", started)
    quickstart.train(config, path, overrides, 2)
    assert started.call_args.args[:3] == (path, overrides, 2)
    assert started.call_args.args[3] == launch.Watched(tmp_path, config.health.grace_seconds)
    started.return_value = 75
    with pytest.raises(DavinciError, match="exit code 75"):
        quickstart.train(config, path, overrides, 2)
