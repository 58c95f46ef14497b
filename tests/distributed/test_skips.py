"""Samples that the journal leaves out: their steps are not taken, and nothing else moves."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.data import Journal, SkipRecord
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run):
    return [(m["step"], m["consumed_samples"], m["loss"], m["learning_rate"]) for m in metrics(run)]


def begin_and_skip(root, directory, skip):
    """Five steps of a run, and a skip in its journal, as someone writes it who has seen what lies ahead."""
    settings = tiny_settings(root, run={"directory": str(directory)}, train={"stop_after_steps": 5})
    run_ranks(1, train_here, settings)
    Journal.open(directory / "journal.jsonl").append(skip)


def go_on(root, directory, ranks=1, stop=36, **data):
    run = {"directory": str(directory)}
    train = {"stop_after_steps": stop}
    run_ranks(ranks, train_here, tiny_settings(root, run=run, train=train, data=data))


def test_steps_of_skipped_samples_are_not_taken_and_no_other_step_moves(tmp_path):
    # Batches are of 4 until step 12: samples 29 to 36 touch steps 8, 9 and 10.
    begin_and_skip(tmp_path, tmp_path / "run", SkipRecord(29, 37, "a spike"))
    go_on(tmp_path, tmp_path / "run", stop=20)
    go_on(tmp_path, tmp_path / "whole", stop=20)
    found, whole = numbers(tmp_path / "run"), numbers(tmp_path / "whole")
    assert [step for step, *_ in found] == [step for step in range(1, 21) if step not in (8, 9, 10)]
    clock = {step: (consumed, rate) for step, consumed, _, rate in whole}
    assert all(clock[step] == (consumed, rate) for step, consumed, _, rate in found)
    assert found[:7] == whole[:7]
    assert found[7][2] != whole[10][2], "the model at step 11 has not seen what was left out"


@pytest.mark.long
def test_the_run_with_a_skip_is_the_same_however_it_is_cut_and_laid_out(tmp_path):
    # The skip covers the end of the first stage, so the second begins in it (step 31).
    skip = SkipRecord(176, 208, "damaged documents")
    begin_and_skip(tmp_path, tmp_path / "one", skip)
    go_on(tmp_path, tmp_path / "one")
    begin_and_skip(tmp_path, tmp_path / "two", skip)
    go_on(tmp_path, tmp_path / "two", stop=27)
    go_on(tmp_path, tmp_path / "two", stop=29, loader={"prefetch_steps": 4, "workers": 1})
    go_on(tmp_path, tmp_path / "two")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    steps = [step for step, *_ in numbers(tmp_path / "one")]
    assert steps[:28] == list(range(1, 29)) and steps[28:] == [33, 34, 35, 36]
    begin_and_skip(tmp_path, tmp_path / "wide", skip)
    go_on(tmp_path, tmp_path / "wide", ranks=2)
    for ours, theirs in zip(metrics(tmp_path / "wide"), metrics(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"]
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4 * theirs["loss"]
