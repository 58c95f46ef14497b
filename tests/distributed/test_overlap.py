"""Overlapped communication and several optimizer instances change when and where, and no number."""

from __future__ import annotations

import pytest

from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

GRADIENTS = {"overlap_gradient_reduce": True}
BOTH = {**GRADIENTS, "overlap_parameter_gather": True}


def whole(precision="fp32", layers=2, **parallel):
    return small.settings(
        model={"num_layers": layers},
        parallel={"device": "cpu", **parallel},
        train={"precision": precision, "micro_batch_size": 1},
    )


@pytest.mark.parametrize(
    ("ranks", "layout", "precision"),
    [
        pytest.param(2, {}, "fp32", marks=pytest.mark.long),
        (2, {}, "bf16"),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2}, "fp32", marks=pytest.mark.long),
        pytest.param(4, {"tensor": 2, "sequence": True}, "fp32", marks=pytest.mark.long),
    ],
)
def test_overlap_is_equal_to_the_bit(ranks, layout, precision):
    settings = {
        name: whole(precision, layers=4, **layout, **overlap)
        for name, overlap in {"none": {}, "gradients": GRADIENTS, "both": BOTH}.items()
    }
    for taken in run_ranks(ranks, take_all, settings):
        assert taken["gradients"] == taken["none"]
        assert taken["both"] == taken["none"]


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [
        pytest.param({}, {}, marks=pytest.mark.long),
        pytest.param({}, BOTH, marks=pytest.mark.long),
        ({"pipeline": 2, "virtual_pipeline": 2}, BOTH),
        pytest.param({"pipeline": 2}, GRADIENTS, marks=pytest.mark.long),
    ],
)
def test_two_optimizer_instances_take_the_steps_of_one(layout, overlap):
    one = run_ranks(4, take_all, {"a": whole(layers=4, **layout, **overlap)})
    two = run_ranks(4, take_all, {"a": whole(layers=4, optimizer_instances=2, **layout, **overlap)})
    for mine, theirs in zip(two, one, strict=True):
        assert mine["a"].losses == pytest.approx(theirs["a"].losses, rel=1e-6)
        assert mine["a"].norms == pytest.approx(theirs["a"].norms, rel=1e-5)
    parts = len({taken["a"].weights for taken in one})
    assert len({taken["a"].weights for taken in two}) == parts, "all replicas have the same weights"


def held(settings):
    from tests.stepping import built, start

    config, platform = start(settings)
    _, optimizer, _ = built(config, platform)
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])


@pytest.mark.long
def test_each_of_two_instances_has_the_whole_state_among_its_ranks():
    one, two = (run_ranks(4, held, whole(optimizer_instances=n)) for n in (1, 2))
    assert sum(two) == pytest.approx(2 * sum(one), rel=0.05)


def evaluated(settings):
    """The loss of held-out samples right after an update, whose weights nobody has gathered yet."""
    from tests.stepping import built, start, tokens_of

    config, platform = start(settings)
    _, _, stepper = built(config, platform)
    tokens = tokens_of(config, 0)
    stepper.train(tokens, len(tokens))
    return stepper.loss(tokens_of(config, 1), len(tokens), 1)


def test_an_evaluation_sees_the_weights_of_the_last_update():
    late, soon = (run_ranks(2, evaluated, whole(**overlap)) for overlap in (BOTH, {}))
    assert late == soon


@pytest.mark.long
def test_a_checkpoint_has_the_weights_of_the_last_update(tmp_path):
    from tests.distributed.test_layouts import metrics
    from tests.tiny import tiny_settings, train_here

    def settings(directory, stop, **parallel):
        return tiny_settings(
            tmp_path,
            parallel={"device": "cpu", **parallel},
            run={"directory": str(tmp_path / directory), "seed": 7},
            train={"micro_batch_size": 1, "precision": "fp32", "threads": 1, "stop_after_steps": stop},
        )

    run_ranks(4, train_here, settings("whole", 8))
    run_ranks(4, train_here, settings("parts", 4, optimizer_instances=2, **BOTH))
    run_ranks(2, train_here, settings("parts", 8))
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
