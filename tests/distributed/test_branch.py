"""A branch is another run from a checkpoint on: it shares the past, and leaves the run that it left as it was."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.config import validate
from megatron_davinci.data import Journal
from megatron_davinci.errors import CheckpointError, ConfigError, DataError
from megatron_davinci.train.branch import branch
from megatron_davinci.train.edits import EditFile, Point
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def settings_of(root, name, **train):
    return tiny_settings(
        root,
        run={"directory": str(root / name)},
        checkpoint={"every_steps": 8, "keep": 9},
        train=train,
        logging={"token_digest": True},
    )


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["token_digest"], m["loss"]) for m in lines]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run of 36 steps, whose second stage began with step 31, with an edit that took effect and one to come."""
    root = tmp_path_factory.mktemp("left")
    (root / "run").mkdir()
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(sample=64), {"a": "0.5", "b": "0.5"}, "once")
    edits.add(Point(sample=300), {"a": "1"}, "later")
    run_ranks(1, train_here, settings_of(root, "run", stop_after_steps=36))
    return root


def config_of(root, name, **changes):
    settings = settings_of(root, name)
    first, second = settings["curriculum"]
    settings["curriculum"] = [{**first, **changes.get("first", {})}, {**second, **changes.get("second", {})}]
    return settings, validate(settings, where="test")


def test_a_branch_goes_another_way_from_a_step_on(left):
    before = {path: path.read_bytes() for path in (left / "run").glob("*.*")}
    settings, config = config_of(
        left, "other", first={"mixture": {"a": 0.1, "b": 0.9}}, second={"mixture": {"b": 1}}
    )
    assert branch(config, f"{left / 'run'}@24") == f"Branched from {left / 'run'} at step 24 (144 samples)."
    assert branch(config, f"{left / 'run'}@24") is None, "the same command goes on"
    settings["train"]["stop_after_steps"] = 34
    run_ranks(1, train_here, settings)
    records = Journal.open(left / "other" / "journal.jsonl").mixes
    assert [(r.first_sample, r.stage, r.origin, dict(r.weights)) for r in records] == [
        (0, "first", "", {"a": "0.75", "b": "0.25"}),
        (64, "first", "edit-1", {"a": "0.5", "b": "0.5"}),
        (144, "first", "configuration", {"a": "0.1", "b": "0.9"}),
        (192, "second", "", {"b": "1"}),
    ]
    found, whole = metrics(left / "other"), metrics(left / "run")
    assert [step for step, *_ in found] == list(range(1, 35))
    assert found[:24] == whole[:24] and found[24][1] != whole[24][1]
    assert {path: path.read_bytes() for path in before} == before
    said = json.loads((left / "other" / "manifest.json").read_text())
    assert said["branched_from"]["step"] == 24 and said["starts"][0]["step"] == 24
    assert "which this run left" in EditFile(left / "other" / "edits.jsonl").read().withdrawn["edit-2"]


def test_a_branch_that_changes_nothing_is_the_same_run(left):
    settings, config = config_of(left, "same")
    branch(config, f"{left / 'run'}@16")
    settings["train"]["stop_after_steps"] = 30
    run_ranks(1, train_here, settings)
    assert metrics(left / "same") == metrics(left / "run")[:30]


@pytest.mark.long
def test_a_branch_has_snapshots_of_its_own(left):
    settings, config = config_of(left, "kept")
    branch(config, f"{left / 'run'}@24")
    settings |= {"snapshots": {"every_steps": 1, "keep_alive_seconds": 0}}
    settings["train"]["stop_after_steps"] = 26
    run_ranks(1, train_here, settings, parents=True)
    assert metrics(left / "kept") == metrics(left / "run")[:26]
    created = json.loads((left / "kept" / "manifest.json").read_text())["created"]
    run_ranks(
        1, train_here, {**settings, "train": {**settings["train"], "stop_after_steps": 27}}, parents=True
    )
    assert json.loads((left / "kept" / "manifest.json").read_text())["created"] == created


def test_a_branch_goes_where_its_place_is_a_link_to(left):
    (left / "disk").mkdir()
    (left / "linked").symlink_to(left / "disk")
    _, config = config_of(left, "linked")
    assert branch(config, f"{left / 'run'}@24") is not None
    assert (left / "linked").is_symlink() and (left / "disk" / "journal.jsonl").is_file()
    assert branch(config, f"{left / 'run'}@24") is None, "it is there"


def test_what_cannot_be_a_branch_leaves_nothing(left):
    _, config = config_of(left, "none")
    with pytest.raises(CheckpointError, match="those of the steps 8, 16, 24, 32, 36"):
        branch(config, f"{left / 'run'}@20")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        branch(config, str(left / "nowhere"))
    _, rewritten = config_of(left, "none", first={"global_batch_size": 8})
    with pytest.raises(DataError, match="its past is sealed"):
        branch(rewritten, f"{left / 'run'}@24")
    assert sorted(path.name for path in left.iterdir() if "none" in path.name) == []
    (left / "file").write_text("")
    _, taken = config_of(left, "file")
    with pytest.raises(ConfigError, match="which is a file"):
        branch(taken, f"{left / 'run'}@24")
    _, taken = config_of(left, "run")
    with pytest.raises(ConfigError, match="run directory of its own"):
        branch(taken, f"{left / 'run'}@24")
