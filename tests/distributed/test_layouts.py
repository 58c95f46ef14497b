"""Every layout computes the run that one rank computes."""

import itertools
import json

import pytest

from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here

LAYOUTS = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "DP2, optimizer not sharded": (2, {"distributed_optimizer": False}),
    "DP2, overlapped reduction": (2, {"overlap_gradient_reduce": True}),
}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    settings = tiny_settings(root)
    assert run_ranks(1, train_here, settings) == [50]
    return root, metrics(root / "run")


def relative(a, b):
    return max(abs(x["loss"] - y["loss"]) / y["loss"] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_fifty_steps_equal_those_of_one_rank(name, one_rank, tmp_path):
    root, expected = one_rank
    ranks, parallel = LAYOUTS[name]
    settings = tiny_settings(
        root, parallel={"device": "cpu", **parallel}, run={"directory": str(tmp_path / "run")}
    )
    run_ranks(ranks, train_here, settings)
    found = metrics(tmp_path / "run")
    assert len(found) == 50
    assert relative(found, expected) <= 1e-4
    norms = [
        abs(x["grad_norm"] - y["grad_norm"]) / y["grad_norm"] for x, y in zip(found, expected, strict=True)
    ]
    assert max(norms) <= 1e-3
    heldout = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (root / "run" / "evals.jsonl").read_text().splitlines()]
    for ours, theirs in zip(heldout, reference, strict=True):
        assert ours["heldout_tokens"] == theirs["heldout_tokens"]
        assert ours["heldout_loss"]["a"] == pytest.approx(theirs["heldout_loss"]["a"], rel=1e-4)


def test_the_comparison_can_fail(one_rank, tmp_path):
    # Another seed is another run: the tolerance above is no blank cheque.
    root, expected = one_rank
    settings = tiny_settings(root, run={"directory": str(tmp_path / "run"), "seed": 8})
    run_ranks(1, train_here, settings)
    assert relative(metrics(tmp_path / "run"), expected) > 1e-2


def test_a_model_learns_and_its_stages_change_batch_and_rate(one_rank):
    _, steps = one_rank
    assert steps[0]["loss"] == pytest.approx(5.55, abs=0.1)  # ln(256)
    assert steps[-1]["loss"] < 3.0
    assert [s["global_batch_size"] for s in steps] == [4] * 12 + [8] * 38
    assert [s["stage"] for s in steps] == ["first"] * 30 + ["second"] * 20
    assert [s["step"] for s in steps] == list(range(1, 51))
    rates = [s["learning_rate"] for s in steps]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[29] == 1e-2 and rates[30] == 5e-3
    assert rates[49] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))


def test_bf16_follows_fp32_and_keeps_fp32_main_weights(one_rank, tmp_path):
    root, expected = one_rank
    settings = tiny_settings(
        root, run={"directory": str(tmp_path / "run")}, train={"micro_batch_size": 2, "precision": "bf16"}
    )
    run_ranks(2, train_here, settings)
    found = metrics(tmp_path / "run")
    assert 1e-6 < relative(found, expected) < 0.1
