"""Our AdamW inside Megatron-Core's optimizer: the same run as torch's, resumed to the bit, taken to other layouts."""

import json
import shutil

import pytest

from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_each, train_here

STEPS, HALF = 8, 4
OURS = {"optimizer": "davinci"}


def settings(root, name, steps=STEPS, precision="fp32", backends=OURS, moments="fp32", **parallel):
    return tiny_settings(
        root,
        run={"directory": str(root / name)},
        data={"sequence_length": 32, "validation": {}, "sources": sources(root)},
        train={"precision": precision, "stop_after_steps": steps},
        backends=backends,
        optimizer={"moments": moments, "clip_grad_norm": 0.3},  # so low that every step is clipped
        parallel={"device": "cpu", **parallel},
        checkpoint={"every_steps": None},
    )


def sources(root):
    return {name: {"path": str(root / "data" / name)} for name in ("a", "b")}


def numbers(root, name):
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [(one["step"], one["loss"], one["grad_norm"]) for one in map(json.loads, lines)]


def losses(root, name):
    return [loss for _, loss, _ in numbers(root, name)]


EIGHT = {"precision": "bf16", "moments": "fp8", "backends": {}}


def train_all(root, *runs, ranks=1):
    """Each on the same ranks."""
    run_ranks(ranks, train_each, [settings(root, name, **asked) for name, asked in runs])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of one rank. `eight` is whole, `resumed` and its copies stop in the middle."""
    root = tmp_path_factory.mktemp("optimizer")
    train_all(
        root,
        ("torch", {"backends": {"optimizer": "torch"}}),
        ("ours", {}),
        ("eight", EIGHT),
        ("resumed", {**EIGHT, "steps": HALF}),
    )
    for name in ("two-ranks", "tensor", "pipeline", "fp32"):
        shutil.copytree(root / "resumed", root / name)
    return root


def test_moments_in_fp32_make_the_run_that_torchs_adamw_makes(trained):
    assert min(norm for _, _, norm in numbers(trained, "torch")) > 0.3, "nothing was clipped"
    assert losses(trained, "ours") == pytest.approx(losses(trained, "torch"), rel=1e-6)


@pytest.mark.long
def test_so_they_do_on_replicas_and_under_bf16(trained):
    replicated, half = {"distributed_optimizer": False}, {"precision": "bf16"}
    theirs = {"backends": {"optimizer": "torch"}, **half}
    train_all(trained, ("replicated", replicated), ("torch-half", theirs), ("ours-half", half), ranks=2)
    assert losses(trained, "replicated") == pytest.approx(losses(trained, "torch"), rel=1e-6)
    # A weight that is rounded otherwise differs by a part in 256.
    assert losses(trained, "ours-half") == pytest.approx(losses(trained, "torch-half"), rel=1e-3)


def test_moments_in_8_bits_stay_near(trained):
    assert losses(trained, "eight") != losses(trained, "ours")
    assert losses(trained, "eight") == pytest.approx(losses(trained, "ours"), rel=1e-2)


def test_a_run_with_moments_in_8_bits_goes_on_to_the_bit(trained):
    train_all(trained, ("resumed", EIGHT))
    assert numbers(trained, "resumed") == numbers(trained, "eight")


@pytest.mark.parametrize(
    ("name", "ranks", "change"),
    [
        ("two-ranks", 2, {}),
        pytest.param("tensor", 2, {"tensor": 2}, marks=pytest.mark.long),
        pytest.param("pipeline", 2, {"pipeline": 2}, marks=pytest.mark.long),
        pytest.param("fp32", 1, {"moments": "fp32", "backends": OURS}, marks=pytest.mark.long),
    ],
)
def test_its_checkpoint_goes_on_with_other_groups(trained, name, ranks, change):
    run_ranks(ranks, train_here, settings(trained, name, **{**EIGHT, **change}))
    assert numbers(trained, name)[:HALF] == numbers(trained, "eight")[:HALF]
    assert losses(trained, name) == pytest.approx(losses(trained, "eight"), rel=5e-3)
