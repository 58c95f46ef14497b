"""Steps that must not be applied are not, are named, and are passed over alike by a run that died meanwhile."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.data import Journal
from megatron_davinci.errors import Unhealthy
from tests.distributed.planted import planted
from tests.ranks import RankFailed, run_ranks
from tests.tiny import LENGTH, tiny_settings, train_here

# Batches are of 4 until step 12: step 6 has samples 20 to 23, of which the second data-parallel rank has 22 and 23.
STEP_SIX = (20, 24)
LAYOUTS = {
    "DP2": {},
    "DP2, replicated": {"distributed_optimizer": False},
    "DP2, overlap": {"overlap_gradient_reduce": True, "overlap_parameter_gather": True},
    "TP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}
layouts = pytest.mark.parametrize(
    "parallel",
    [pytest.param(v, id=k, marks=[] if k == "DP2" else pytest.mark.long) for k, v in LAYOUTS.items()],
)


def lines(run, name="metrics"):
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(run):
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"]) for m in lines(run)]


def skips(run):
    return [(skip.from_sample, skip.to_sample) for skip in Journal.open(run / "journal.jsonl").skips]


def settings_of(root, run, parallel=None, stop=20, **health):
    settings = tiny_settings(
        root,
        run={"directory": str(run), "seed": 7},
        parallel={"device": "cpu", "timeout_seconds": 60, **(parallel or {})},
        checkpoint={"every_steps": 4, "keep": 3},
        evaluation={"every_steps": 6, "sequences": 8},
        train={"stop_after_steps": stop},
    )
    return {**settings, "health": health}


NEVER = {"every_steps": None, "sequences": 8}  # but at the end of a stage
SPIKES = {"window": 16, "least": 8}


def die(settings, **plant):
    """A run whose first rank dies."""
    with pytest.raises((RankFailed, Exception)):
        run_ranks(2, planted, settings, plant)


@layouts
def test_a_poisoned_sample_is_passed_over_and_named_also_by_a_run_that_dies_over_it(parallel, tmp_path):
    plant = {"poison": [22]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(2, planted, settings_of(tmp_path, whole, parallel, stop=13), plant)
    assert [line["step"] for line in lines(whole)] == [step for step in range(1, 14) if step != 6]
    assert skips(whole) == [STEP_SIX]
    (event,) = lines(whole, "health")
    assert (event["step"], event["samples"], event["kind"]) == (6, [20, 23], "not finite")
    assert (event["found"], event["action"]) == ("loss nan", "passed over")
    named = [rank for rank in event["ranks"] if 22 in rank.get("samples", ())]
    expected = {1} if parallel.get("tensor", parallel.get("pipeline")) is None else {0, 1}
    assert {rank["rank"] for rank in named} <= expected and named
    assert any(rank.get("module") == "embedding" for rank in event["ranks"])
    assert all(rank["samples"] == [22] for rank in named if rank["rank"] == 1)

    settings = settings_of(tmp_path, killed, parallel, stop=13)
    if parallel:
        die(settings, **plant, die="before")
        assert skips(killed) == []
    die(settings, **plant, die="after")
    assert skips(killed) == [STEP_SIX]
    if parallel:
        die(settings, **plant, die=8)
    run_ranks(2, planted, settings, plant)
    assert numbers(killed) == numbers(whole)
    assert [(e["step"], e["heldout_loss"]) for e in lines(killed, "evals")] == [
        (e["step"], e["heldout_loss"]) for e in lines(whole, "evals")
    ]


@pytest.mark.long
def test_a_stage_whose_last_step_is_passed_over_is_evaluated_at_the_one_before(tmp_path):
    plant = {"poison": [22]}  # step 6, with which the first stage ends
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def ending(run):
        settings = {**settings_of(tmp_path, run, stop=7), "evaluation": NEVER}
        settings["curriculum"][0]["tokens"] = 24 * LENGTH
        return settings

    run_ranks(2, planted, ending(whole), plant)
    assert skips(whole) == [STEP_SIX] and [e["step"] for e in lines(whole, "evals")] == [5]
    settings = ending(killed)
    die(settings, **plant, die="after")
    assert lines(killed, "evals") == []
    run_ranks(2, planted, settings, plant)
    assert [(e["step"], e["heldout_loss"]) for e in lines(killed, "evals")] == [
        (e["step"], e["heldout_loss"]) for e in lines(whole, "evals")
    ]


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "parallel",
    [pytest.param({}, marks=pytest.mark.long), {"distributed_optimizer": False}],
    ids=["sharded", "replicated"],
)
def test_a_rank_that_miscomputes_once_changes_nothing(parallel, value, tmp_path):
    run_ranks(2, train_here, settings_of(tmp_path, tmp_path / "whole", parallel, stop=9))
    flipped = settings_of(tmp_path, tmp_path / "flipped", parallel, stop=9)
    run_ranks(2, planted, flipped, {"flip": (1, 5, value)})
    assert numbers(tmp_path / "flipped") == numbers(tmp_path / "whole")
    assert skips(tmp_path / "flipped") == []
    (event,) = lines(tmp_path / "flipped", "health")
    assert (event["step"], event["action"]) == (5, "taken again")
    assert event["found"].startswith("gradient norm")
    assert [rank["rank"] for rank in event["ranks"]] == [1]
    assert event["ranks"][0]["gradients"]


def test_with_the_policy_stop_the_run_ends_before_the_update_and_says_what_where(tmp_path):
    settings = settings_of(tmp_path, tmp_path / "run", not_finite="stop")
    with pytest.raises(Unhealthy) as error:
        run_ranks(2, planted, settings, {"poison": [22, 23]})
    said = str(error.value)
    assert "its loss or gradient is not finite" in said
    assert "step 6, stage first, samples 20 to 23" in said
    assert "rank 1 (" in said and "samples 22, 23 of source" in said and "output of embedding" in said
    assert error.value.code == 3
    assert len(lines(tmp_path / "run")) == 5 and skips(tmp_path / "run") == []


def test_a_run_that_passes_over_too_much_ends_with_a_report(tmp_path):
    run = tmp_path / "run"
    settings = settings_of(tmp_path, run, give_up_after=2, give_up_within_steps=6)
    # Steps 3 and 9 are 6 steps apart: only the fourth, at step 11, is the third within 6 steps.
    with pytest.raises(Unhealthy) as error:
        run_ranks(1, planted, settings, {"poison": [8, 32, 36, 40]})
    said = str(error.value)
    assert "2 within 6 steps, and now one more" in said
    assert "step 11, " in said and "step 9, not finite: loss nan" in said and "step 10, " in said
    assert "step 3," not in said
    assert skips(run) == [(8, 12), (32, 36), (36, 40)]
    assert [event["action"] for event in lines(run, "health")][-1] == "stopped"


def test_weights_that_are_damaged_are_taken_from_the_newest_good_checkpoint(tmp_path):
    run_ranks(2, train_here, settings_of(tmp_path, tmp_path / "whole", stop=9))
    run_ranks(2, planted, settings_of(tmp_path, tmp_path / "run", stop=9), {"weight": (1, 7)})
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    (event,) = lines(tmp_path / "run", "health")
    assert event["action"] == "rolled back"
    assert any("embedding" in name for rank in event["ranks"] for name in rank.get("weights", ()))
    assert {rank["rank"] for rank in event["ranks"] if rank.get("weights")} == {1}


# Step 16 has samples 80 to 87: noise, where the model has learnt that tokens rise in small steps.
NOISE = {"noise": range(80, 88)}


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_spike_is_passed_over_alike_by_a_run_that_dies_over_it(policy, tmp_path):
    spikes = {**SPIKES, "policy": policy, "deviations": 6, "least": 8}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = settings_of(tmp_path, whole, stop=24, spikes=spikes)
    settings["curriculum"][0]["global_batch_size"] = 4
    run_ranks(2, planted, settings, NOISE)
    first = {"skip": 80, "rollback": 76}[policy]
    left_out = {21, 22} if policy == "skip" else {20, 21, 22}
    assert skips(whole)[0][0] == first
    assert [line["step"] for line in lines(whole)] == [step for step in range(1, 25) if step not in left_out]
    assert {event["kind"] for event in lines(whole, "health")} == {"spike"}
    assert "deviations above" in lines(whole, "health")[0]["found"]

    settings = {**settings, "run": {"directory": str(killed), "seed": 7}}
    die(settings, **NOISE, die="after")
    assert len(skips(killed)) == 1
    if policy == "skip":
        die(settings, **NOISE, die=4)
    run_ranks(2, planted, settings, NOISE)
    assert numbers(killed) == numbers(whole)
    assert skips(killed) == skips(whole)


def test_a_spike_is_reported_and_applied_by_default(tmp_path):
    settings = settings_of(tmp_path, tmp_path / "run", stop=23, spikes={**SPIKES, "deviations": 6})
    settings["curriculum"][0]["global_batch_size"] = 4
    run_ranks(1, planted, settings, NOISE)
    assert len(lines(tmp_path / "run")) == 23 and skips(tmp_path / "run") == []
    event = lines(tmp_path / "run", "health")[0]
    assert (event["step"], event["action"]) == (21, "applied")
