"""Context-parallel ranks have a part of every sequence each; together they compute what one rank computes."""

from __future__ import annotations

import json

import pytest

from tests.cases import is_long
from tests.distributed.test_layouts import deviation, evaluations, metrics
from tests.ranks import run_ranks
from tests.tiny import LENGTH, tiny_settings, train_here

# Without data parallelism: tests/distributed/test_layouts.py.
STAGES = (30, 20) if is_long() else (7, 3)  # steps
LAYOUTS = {"CP2xDP2": (4, {"context": 2}, "TP1 x PP1 x CP2 x DP2 = 4 ranks")}


def context_settings(root, directory, parallel, **changes):
    """Some steps of small batches, in two stages."""
    settings = tiny_settings(
        root,
        parallel={"device": "cpu", **parallel},
        run={"directory": str(directory), "seed": 7},
        evaluation={"sequences": 8},
        **changes,
    )
    sizes = [{"tokens": steps * 4 * LENGTH} for steps in STAGES]
    settings["curriculum"] = [
        stage | size | {"global_batch_size": 4}
        for stage, size in zip(settings["curriculum"], sizes, strict=True)
    ]
    return settings


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    run_ranks(1, train_here, context_settings(root, root / "run", {}))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_steps_equal_those_of_one_rank(name, one_rank, tmp_path):
    ranks, parallel, written = LAYOUTS[name]
    run_ranks(ranks, train_here, context_settings(one_rank, tmp_path / "run", parallel))
    found, expected = metrics(tmp_path / "run"), metrics(one_rank / "run")
    assert len(found) == len(expected) == sum(STAGES)
    assert deviation(found, expected, "loss") <= 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    (start,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert start["layout"] == written
    # Held-out windows are counted once, not once for each rank that has a part of them.
    for ours, theirs in zip(evaluations(tmp_path / "run"), evaluations(one_rank / "run"), strict=True):
        assert ours["heldout_tokens"] == theirs["heldout_tokens"] == {"a": 8 * LENGTH}
        assert ours["heldout_loss"]["a"] == pytest.approx(theirs["heldout_loss"]["a"], rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, {"context": 2}), (1, {}), id="CP2 to one rank"),
        pytest.param((2, {"tensor": 2}), (2, {"context": 2}), id="TP2 to CP2", marks=pytest.mark.long),
    ],
)
def test_resume_on_another_layout(before, after, one_rank, tmp_path):
    for (ranks, parallel), stop in ((before, 4), (after, 9)):
        settings = context_settings(
            one_rank,
            tmp_path / "run",
            parallel,
            train={"micro_batch_size": 2, "precision": "fp32", "threads": 1, "stop_after_steps": stop},
        )
        assert run_ranks(ranks, train_here, settings)[0] == stop
    found, expected = metrics(tmp_path / "run"), metrics(one_rank / "run")[:9]
    assert [step["consumed_samples"] for step in found] == [step["consumed_samples"] for step in expected]
    assert deviation(found, expected, "loss") <= 1e-5
