"""Our AdamW inside Megatron-Core's optimizer: torch's steps, resumed to the bit, taken to other layouts."""

import json
import shutil

import pytest

from tests.config import small
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_each, train_here

OURS = {"optimizer": "davinci"}


def stepping(precision, backends, moments="fp32", **parallel):
    return small.settings(
        model={"num_layers": 2},
        parallel={"device": "cpu", **parallel},
        backends=backends,
        optimizer={"moments": moments, "clip_grad_norm": 0.3},  # so low that every step is clipped
        train={"precision": precision, "micro_batch_size": 2},
    )


EIGHT = stepping("bf16", {}, "fp8")


def muon(**parallel):
    settings = stepping("bf16", {}, **parallel)
    return {**settings, "optimizer": {"kind": "muon", "clip_grad_norm": 0.3}}


def take(stepper, config, *steps):
    """The loss and the gradient's norm of each step."""
    from tests.stepping import tokens_of

    found = []
    for step in steps:
        tokens = tokens_of(config, step)
        result = stepper.train(tokens, len(tokens) // config.train.micro_batch_size)
        found.append((result.loss, result.grad_norm))
    stepper.gather_weights()
    return found


def compared(cases):
    """Four steps of each."""
    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from tests.stepping import built, start

    _, platform = start(next(iter(cases.values())))
    taken = {}
    for name, settings in cases.items():
        config = validate(settings, "test")
        taken[name] = take(built(config, platform)[2], config, *range(4))
    distributed.stop()
    return taken


def goes_on(folder, settings=EIGHT, load_only=False):
    """Steps 2 and 3: of a run itself, from its checkpoint, from a snapshot in memory."""
    from types import SimpleNamespace

    import numpy as np
    import torch.distributed as dist

    from megatron_davinci.platform import distributed
    from megatron_davinci.train import checkpoint
    from megatron_davinci.train.new_files import NewFiles
    from megatron_davinci.train.snapshot import take as take_snapshot
    from megatron_davinci.train.snapshot_state import RankState
    from tests.stepping import built, start

    config, platform = start(settings)
    found = {}
    if not load_only:
        chunks, optimizer, stepper = built(config, platform)
        take(stepper, config, 0, 1)
        files, snapshot = NewFiles(folder.parent), take_snapshot(chunks, optimizer, folder)
        places = [None] * dist.get_world_size()
        dist.all_gather_object(places, snapshot.write(files))
        if dist.get_rank() == 0:
            snapshot.finish(files, places)
        dist.barrier()
        kept = RankState(stepper.wrapped, optimizer)
        region = np.zeros(kept.nbytes, np.uint8)
        kept.write(region, {})
        found["itself"] = take(stepper, config, 2, 3)
        kept.read(region)
        found["snapshot"] = take(stepper, config, 2, 3)
    chunks, optimizer, stepper = built(config, platform)
    checkpoint.load(SimpleNamespace(state=folder, folder=folder), chunks, optimizer)
    found["checkpoint"] = take(stepper, config, 2, 3)
    distributed.stop()
    return found


@pytest.mark.parametrize(
    ("precision", "rel"),
    [
        ("fp32", 1e-6),
        # A weight in bf16 that is rounded otherwise differs by a part in 256.
        pytest.param("bf16", 1e-3, marks=pytest.mark.long),
    ],
)
def test_moments_in_fp32_make_the_steps_that_torchs_adamw_makes(precision, rel):
    cases = {
        "torch": stepping(precision, {"optimizer": "torch"}),
        "ours": stepping(precision, OURS),
        "replicated": stepping(precision, OURS, distributed_optimizer=False),
        "eight": stepping(precision, OURS, "fp8"),
    }
    for taken in run_ranks(2, compared, cases):
        assert min(norm for _, norm in taken["torch"]) > 0.3, "nothing was clipped"
        for name in ("ours", "replicated"):
            for mine, theirs in zip(taken[name], taken["torch"], strict=True):
                assert mine == pytest.approx(theirs, rel=rel), name
        assert taken["eight"] != taken["ours"]
        for mine, theirs in zip(taken["eight"], taken["ours"], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-2)


def test_moments_in_8_bits_go_on_to_the_bit_and_on_another_layout_nearly(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    for found in run_ranks(2, goes_on, folder):
        assert found["itself"] == found["checkpoint"] == found["snapshot"]
    (alone,) = run_ranks(1, goes_on, folder, EIGHT, True)
    for mine, theirs in zip(alone["checkpoint"], found["itself"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize(
    "dealt", [True, pytest.param(False, marks=pytest.mark.long)], ids=["dealt", "on each rank"]
)
def test_muon_goes_on_to_the_bit_and_on_another_layout_nearly(dealt, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    for found in run_ranks(2, goes_on, folder, muon(distributed_optimizer=dealt)):
        assert found["itself"] == found["checkpoint"] == found["snapshot"]
    # The other way of keeping it, on one model's ranks and on as many as find nothing left for some of them.
    others = [
        (2, muon(tensor=2, distributed_optimizer=not dealt)),
        (4, muon(distributed_optimizer=not dealt)),
    ]
    for ranks, settings in others:
        for other in run_ranks(ranks, goes_on, folder, settings, True):
            for mine, theirs in zip(other["checkpoint"], found["itself"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-2)


STEPS, HALF = 16, 8


def settings(root, name, steps=STEPS, backends=None, moments="fp8", **parallel):
    return tiny_settings(
        root,
        run={"directory": str(root / name)},
        train={"precision": "bf16", "stop_after_steps": steps},
        backends=backends or {},
        optimizer={"moments": moments},
        parallel={"device": "cpu", **parallel},
        checkpoint={"every_steps": None},
    )


def numbers(root, name):
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [(one["step"], one["loss"], one["grad_norm"]) for one in map(json.loads, lines)]


@pytest.mark.long
def test_runs_go_on_with_the_same_groups_with_others_and_with_other_moments(tmp_path):
    run_ranks(2, train_each, [settings(tmp_path, "whole"), settings(tmp_path, "half", steps=HALF)])
    others = {
        "same": (2, {}),
        "one": (1, {}),
        "tensor": (2, {"tensor": 2}),
        "pipeline": (2, {"pipeline": 2}),
        "fp32": (2, {"moments": "fp32", "backends": OURS}),
    }
    for name, (ranks, change) in others.items():
        shutil.copytree(tmp_path / "half", tmp_path / name)
        run_ranks(ranks, train_here, settings(tmp_path, name, **change))
        assert numbers(tmp_path, name)[:HALF] == numbers(tmp_path, "whole")[:HALF]
        (_, losses, _), (_, expected, _) = (
            zip(*numbers(tmp_path, one), strict=True) for one in (name, "whole")
        )
        assert losses == pytest.approx(expected, rel=5e-3)
    assert numbers(tmp_path, "same") == numbers(tmp_path, "whole")
