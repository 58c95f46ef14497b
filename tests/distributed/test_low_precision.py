"""Runs with delayed scaling: stopped, resumed and cut in another way, with the histories of their scales."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_davinci.errors import CheckpointError
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_each, train_here

LOW = {"recipe": "delayed", "backend": "emulate", "amax_history": 3, "watch_every_steps": 1}


def settings(root, name, stop, parallel=None, **low):
    return tiny_settings(
        root,
        run={"directory": str(root / name), "seed": 7},
        parallel={"device": "cpu", "timeout_seconds": 60, **(parallel or {})},
        train={"precision": "fp32", "micro_batch_size": 2, "threads": 1, "stop_after_steps": stop,
               "low_precision": {**LOW, **low}},
        evaluation={"sequences": 4},
    )  # fmt: skip


def lines(root, name):
    kept = ("step", "loss", "grad_norm", "low_precision")
    return [
        {key: line[key] for key in kept}
        for line in map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines())
    ]


def test_a_run_goes_on_with_its_scales_also_on_other_ranks(tmp_path):
    root = tmp_path
    run_ranks(1, train_each, [settings(root, "whole", 7), settings(root, "parts", 4)])
    shutil.copytree(root / "parts", root / "cut")
    run_ranks(1, train_here, settings(root, "parts", 7))
    whole, parts = lines(root, "whole"), lines(root, "parts")
    assert whole == parts and len(whole) == 7
    # Cut in two from step 4 on. The scale of step 5 is of steps 2 to 4, which are on record.
    run_ranks(2, train_here, settings(root, "cut", 7, {"tensor": 2, "sequence": True}))
    cut = lines(root, "cut")
    assert cut[:4] == whole[:4]
    for where, operands in whole[4]["low_precision"].items():
        for operand, one in operands.items():
            assert cut[4]["low_precision"][where][operand]["scale"] == one["scale"]
            top = 57344 if operand == "gradient" else 448
            largest = max(line["low_precision"][where][operand]["amax"] for line in whole[1:4])
            assert one["scale"] == pytest.approx(top / largest, rel=1e-6)
    assert [line["loss"] for line in cut[4:]] == pytest.approx([line["loss"] for line in whole[4:]], rel=2e-3)
    with pytest.raises(CheckpointError, match="trained by another recipe") as caught:
        run_ranks(1, train_here, settings(root, "parts", 8, amax_history=2))
    assert "amax_history: 3 in the checkpoint, 2 in this run" in str(caught.value)
    plain = settings(root, "parts", 8)
    plain["train"]["low_precision"] = {}
    with pytest.raises(CheckpointError, match="recipe: 'delayed' in the checkpoint, 'none' in this run"):
        run_ranks(1, train_here, plain)


@pytest.mark.long
def test_a_pipeline_stage_whose_layers_are_all_kept_goes_on_too(tmp_path):
    """It has no scales to take over, where the other stage has."""
    low = {"keep_first_layers": 1}
    whole, parts = (
        [settings(tmp_path, name, stop, {"pipeline": 2}, **low) for stop in stops]
        for name, stops in (("whole", [3]), ("parts", [2, 3]))
    )
    run_ranks(2, train_each, [*whole, *parts])
    assert lines(tmp_path, "whole") == lines(tmp_path, "parts")
