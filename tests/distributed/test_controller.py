"""The controller at work: what it decides is in the journal, and is the same after a kill and in a replay."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction

import pytest

from megatron_davinci.config import validate
from megatron_davinci.data import Curriculum, Journal
from megatron_davinci.train.planned import open_sources
from tests.ranks import run_ranks
from tests.tiny import LENGTH, tiny_settings, train_here


def settings_of(root, name, mode="apply", **train):
    made = tiny_settings(
        root,
        run={"directory": str(root / name)},
        evaluation={"every_steps": 3, "sequences": 4},
        train=train,
        checkpoint={"every_steps": 6},
        controller={
            "mode": mode,
            "policy": "loss_weighted",
            "loss_weighted": {"reference": {"a": 0.5, "b": 3.0}},
            "floors": {"a": 0.1},
            "ceilings": {"a": 0.85},
            "maximum_change": 0.05,
        },
    )
    made["curriculum"][0] |= {
        "tokens": 10 * 8 * LENGTH,
        "global_batch_size": [{"size": 4, "steps": 6}, {"size": 8}],
    }
    made["curriculum"][1]["tokens"] = 8 * 8 * LENGTH
    made["data"]["validation"] = {name: str(root / "data" / name) for name in ("a", "b")}
    made["data"]["loader"] = {"prefetch_steps": 4}
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(run):
    return [(m["step"], m["consumed_samples"], m["loss"]) for m in lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    root = tmp_path_factory.mktemp("controller")
    run_ranks(2, train_here, settings_of(root, "run"))
    return root


def test_what_is_applied_is_in_the_journal_and_within_bounds(applied):
    run = applied / "run"
    proposals = lines(run / "proposals.jsonl")
    rates = {m["step"]: m["learning_rate"] for m in lines(run / "metrics.jsonl")}
    assert all(e["learning_rate"] == rates[e["step"]] for e in lines(run / "evals.jsonl"))
    mixes = [m for m in Journal.open(run / "journal.jsonl").mixes if m.origin == "controller"]
    moving = [p for p in proposals if p["weights"]]
    assert len(mixes) >= 3 and [m.first_sample for m in mixes] == [p["consumed_samples"] for p in moving]
    assert [dict(m.weights) for m in mixes] == [p["weights"] for p in moving]
    assert all(m.reason.startswith("loss_weighted: loss above the reference") for m in mixes)
    for p in proposals:
        assert 0.1 <= float(p["mixture"]["a"]) <= 0.85
        assert abs(float(p["mixture"]["a"]) - float(p["present"]["a"])) <= 0.05 + 1e-12
    stages = [m for m in Journal.open(run / "journal.jsonl").mixes if m.origin == ""]
    assert [m.stage for m in stages] == ["first", "second"], "a stage begins with the mixture that it says"


def test_a_kill_before_the_journal_had_it_makes_the_same_decision_again(applied):
    root, run = applied, applied / "run"
    # The checkpoint of step 12 was saved after its evaluation; what that decided is not in the journal yet.
    run_ranks(2, train_here, settings_of(root, "killed", stop_after_steps=12))
    killed = root / "killed"
    before = len(Journal.open(killed / "journal.jsonl").mixes)
    assert lines(killed / "proposals.jsonl")[-1]["step"] == 12
    kept = (killed / "proposals.jsonl").read_text().splitlines(keepends=True)
    (killed / "proposals.jsonl").write_text("".join(kept[:-1]))  # the kill came before that, too
    run_ranks(2, train_here, settings_of(root, "killed"))
    assert len(Journal.open(killed / "journal.jsonl").mixes) > before
    for name in ("journal.jsonl", "proposals.jsonl"):
        assert (killed / name).read_bytes() == (run / name).read_bytes()
    assert numbers(killed) == numbers(run)


@pytest.mark.long
def test_a_replay_of_the_journal_needs_no_evaluation(applied):
    root, run = applied, applied / "run"
    (root / "replay").mkdir()
    shutil.copy(run / "journal.jsonl", root / "replay")
    made = settings_of(root, "replay")
    del made["controller"], made["evaluation"], made["data"]["validation"]
    run_ranks(2, train_here, made)
    assert numbers(root / "replay") == numbers(run)
    assert (root / "replay" / "journal.jsonl").read_bytes() == (run / "journal.jsonl").read_bytes()


def test_advice_is_written_and_changes_nothing(applied, tmp_path):
    shutil.copytree(applied / "data", tmp_path / "data")
    run_ranks(1, train_here, settings_of(tmp_path, "run", mode="advise", stop_after_steps=8))
    assert [p["step"] for p in lines(tmp_path / "run" / "proposals.jsonl")] == [3, 6]
    assert len(Journal.open(tmp_path / "run" / "journal.jsonl").mixes) == 1


@pytest.mark.long
def test_a_decision_keeps_the_caps_on_repetition_so_that_the_run_may_go_on(applied, tmp_path):
    shutil.copytree(applied / "data", tmp_path / "data")
    settings = settings_of(tmp_path, "run", stop_after_steps=12)
    settings["controller"]["loss_weighted"] = {"reference": {"a": 9.0, "b": 0.5}}
    windows = open_sources(validate(settings, where="test"))["b"].num_windows
    # As planned b gives 20 of the stage's 80 samples, and 28 if its share rises by 0.05 at each evaluation.
    settings["curriculum"][0]["max_epochs"] = {"b": 26 / windows + 1e-9}
    run_ranks(1, train_here, settings)
    del settings["train"]["stop_after_steps"]
    run_ranks(1, train_here, settings)
    mixes = Journal.open(tmp_path / "run" / "journal.jsonl").mixes
    given = Curriculum({"a": 10**6, "b": windows}, 7, mixes).consumed(80)["b"]
    assert 20 < given <= 26
    first = [Fraction(mix.weights["b"]) for mix in mixes if mix.stage == "first"]
    assert Fraction(1, 4) < first[1] < Fraction(3, 10), "as far as the cap allows"


@pytest.mark.long
def test_what_the_journal_has_decided_is_what_is_said_of_it(applied, tmp_path):
    shutil.copytree(applied / "data", tmp_path / "data")
    settings, run = settings_of(tmp_path, "run", stop_after_steps=12), tmp_path / "run"
    settings["controller"]["maximum_change"] = 0.02
    run_ranks(1, train_here, settings)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    before = lines(run / "proposals.jsonl")
    settings["controller"]["loss_weighted"] = {"reference": {"a": 9.0, "b": 0.5}}  # the other way
    run_ranks(1, train_here, settings)
    after = lines(run / "proposals.jsonl")
    mixes = {mix.first_sample: dict(mix.weights) for mix in Journal.open(run / "journal.jsonl").mixes}
    assert [p["step"] for p in after] == [3, 6, 9, 12]
    assert [p["weights"] for p in after[:3]] == [p["weights"] for p in before[:3]]
    assert all(p["weights"] == mixes[p["consumed_samples"]] for p in after[:3])
    assert after[2]["mixture"] == before[2]["mixture"] == {"a": "0.81", "b": "0.19"}
    assert "which is replayed" in after[2]["reason"]
    assert float(after[3]["mixture"]["b"]) > float(after[3]["present"]["b"]), (
        "here nothing was decided before"
    )


def test_a_step_that_was_not_evaluated_decides_nothing(applied, tmp_path):
    shutil.copytree(applied / "data", tmp_path / "data")
    settings = settings_of(tmp_path, "run", stop_after_steps=6)
    settings["evaluation"] = {"every_steps": 5, "sequences": 4}
    run_ranks(1, train_here, settings)
    run_ranks(1, train_here, settings_of(tmp_path, "run", stop_after_steps=9))
    assert [p["step"] for p in lines(tmp_path / "run" / "proposals.jsonl")] == [5, 9]


def train_with_nan(settings):
    """Train; the evaluation after step 6 measures NaN."""
    from megatron_davinci.errors import DataError
    from megatron_davinci.evaluate.heldout import HeldOutEvaluator

    evaluate, calls = HeldOutEvaluator.evaluate, []

    def broken(self, loss):
        calls.append(1)
        found = evaluate(self, loss)
        return found._replace(loss={**found.loss, "b": float("nan")}) if len(calls) == 2 else found

    HeldOutEvaluator.evaluate = broken
    try:
        train_here(settings)
    except DataError as error:
        return error.render()
    finally:
        HeldOutEvaluator.evaluate = evaluate
    return None


def test_a_nan_evaluation_ends_the_run_on_every_rank_and_nothing_follows_from_it(applied, tmp_path):
    shutil.copytree(applied / "data", tmp_path / "data")
    said = run_ranks(2, train_with_nan, settings_of(tmp_path, "run"))
    assert said[0] == said[1] and "held-out loss of b is not a number" in said[0]
    run = tmp_path / "run"
    assert [p["step"] for p in lines(run / "proposals.jsonl")] == [3]
    assert len(Journal.open(run / "journal.jsonl").mixes) == 2
    assert len(lines(run / "metrics.jsonl")) == 6


def error_of(settings):
    from megatron_davinci.train import controller

    def with_a_bug(policy, situation):
        raise KeyError("a")

    controller.decide = with_a_bug
    try:
        train_here(settings)
    except Exception as error:
        return type(error).__name__


def test_an_error_of_a_policy_that_nobody_foresaw_ends_every_rank(applied):
    assert run_ranks(2, error_of, settings_of(applied, "with-a-bug")) == ["KeyError", "LostPeer"]
