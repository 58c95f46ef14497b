"""A mixture that changes at work: from the next step on, on disk before it is used, and replayed by the journal."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_davinci.data import Journal, MixRecord
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run):
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"]) for m in metrics(run)]


def train_with_proposals(settings, proposals):
    """Train; after the evaluation of a step, propose what is listed for it. Returns what was said of each."""
    from megatron_davinci.train.loop import TrainingRun

    evaluate, said = TrainingRun._evaluate, []

    def evaluate_and_propose(self, plan, progress, records):
        evaluate(self, plan, progress, records)
        if plan.step in proposals:
            on_disk = len(Journal.open(self.directory.journal).mixes)
            record = self.order.propose(
                self.consumed_samples, proposals[plan.step], origin="a test", reason="to see"
            )
            said.append((plan.step, record and record.first_sample, on_disk))

    TrainingRun._evaluate = evaluate_and_propose
    try:
        train_here(settings)
    finally:
        TrainingRun._evaluate = evaluate
    return said


def settings_of(root, name, ahead=4, workers=0, **train):
    settings = tiny_settings(
        root, run={"directory": str(root / name)}, evaluation={"every_steps": 7, "sequences": 4}, train=train
    )
    settings["data"]["loader"] = {"prefetch_steps": ahead, "workers": workers}
    return settings


# Batches are of 4 until step 12, then of 8. The first stage ends with step 30: step 28 is evaluated when all of the
# second's first batches are read already.
PROPOSALS = {14: {"a": "0.1", "b": "0.9"}, 28: {"a": "1"}, 35: {"a": "1/3", "b": "2/3"}}


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    root = tmp_path_factory.mktemp("proposed")
    said = run_ranks(2, train_with_proposals, settings_of(root, "run", stop_after_steps=38), PROPOSALS)
    return root, said


def test_a_proposal_governs_from_the_next_step_and_what_was_read_ahead_is_dropped(proposed):
    root, (said, others) = proposed
    assert [(step, first) for step, first, _ in said] == [(14, 64), (28, 176), (35, 232)] and said == others
    assert [on_disk for *_, on_disk in said] == [1, 2, 4], "what is only read ahead is not decided"
    records = Journal.open(root / "run" / "journal.jsonl").mixes
    assert [(r.first_sample, r.stage, r.origin) for r in records] == [
        (0, "first", ""),
        (64, "first", "a test"),
        (176, "first", "a test"),
        (192, "second", ""),
        (232, "second", "a test"),
    ]
    assert [dict(r.weights) for r in records[1:]] == [
        PROPOSALS[14],
        PROPOSALS[28],
        {"a": "0.2", "b": "0.8"},
        PROPOSALS[35],
    ]
    assert records[1].reason == "to see"


def test_replaying_the_journal_is_the_same_run_and_asks_nobody(proposed):
    root, _ = proposed
    (root / "again").mkdir()
    shutil.copy(root / "run" / "journal.jsonl", root / "again")
    # Whoever proposes where the journal has decided is told so.
    said = run_ranks(
        2, train_with_proposals, settings_of(root, "again", 6, 1, stop_after_steps=38), {14: {"a": "1"}}
    )
    assert said[0] == [(14, None, 5)]
    assert numbers(root / "again") == numbers(root / "run")
    assert (root / "again" / "journal.jsonl").read_bytes() == (root / "run" / "journal.jsonl").read_bytes()


@pytest.mark.long
def test_a_proposal_at_the_end_of_a_stage_is_the_next_ones_beginning(tmp_path):
    settings = settings_of(tmp_path, "run", stop_after_steps=33)
    settings["evaluation"] = {"every_steps": 30, "sequences": 4}
    assert run_ranks(1, train_with_proposals, settings, {30: {"b": "1"}}) == [[(30, 192, 1)]]
    assert Journal.open(tmp_path / "run" / "journal.jsonl").mixes[1] == MixRecord(
        192, "second", {"b": "1"}, origin="a test", reason="to see"
    )
