"""Megatron-Core builds its optimizer around ours, sharded or not, and no norm or bias is decayed."""

from __future__ import annotations

import pytest

from megatron_davinci.config import validate
from tests.config import small
from tests.ranks import run_ranks


def describe_groups(sharded: bool, precision: str) -> list[dict]:
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.step import wrap_model

    platform = choose("cpu", threads=1)
    distributed.start(platform)
    config = validate(
        small.settings(parallel={"distributed_optimizer": sharded}, train={"precision": precision}), "test"
    )
    optimizer = build_optimizer(config, wrap_model(build_model(config, platform), config))
    set_hyperparameters(optimizer, learning_rate=0.5, weight_decay=0.1)
    groups = [
        {
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "elements": sum(p.numel() for p in group["params"]),
            "dtypes": sorted({str(p.dtype) for p in group["params"]}),
        }
        for group in optimizer.param_groups
    ]
    inner = {type(one.optimizer).__name__ for one in optimizer.chained_optimizers}
    distributed.stop()
    return [{"inner": inner}, *groups]


def test_matrices_are_decayed_and_vectors_are_not():
    model = validate(small.settings(), "test").model
    # Two norms a layer and the last one, and the biases of queries, keys and values.
    vectors = model.num_layers * (2 * 32 + (4 + 2 + 2) * 8) + 32
    for sharded, precision in ((True, "fp32"), (False, "fp32"), (True, "bf16")):
        inner, *groups = run_ranks(1, describe_groups, sharded, precision)[0]
        assert inner == {"inner": {"GroupAdamW"}}
        decayed = {group["weight_decay"]: group["elements"] for group in groups}
        assert decayed == {0.0: vectors, 0.1: model.parameters() - vectors}
        assert {group["lr"] for group in groups} == {0.5}
        assert all(group["dtypes"] == ["torch.float32"] for group in groups), "the main weights are fp32"


def steps_of(optimizer: str, clip: float, parallel: dict) -> tuple:
    """Norms of steps on labels that weigh differently, sizes of first moments, and sweeps that scaled gradients."""
    from megatron.core.distributed import DistributedDataParallel

    from tests.stepping import built, start, tokens_of

    settings = small.settings(
        parallel={"device": "cpu", **parallel},
        backends={"optimizer": optimizer},
        optimizer={"clip_grad_norm": clip},
    )
    scale, swept = DistributedDataParallel.scale_gradients, []
    DistributedDataParallel.scale_gradients = lambda self, by: (swept.append(float(by)), scale(self, by))
    config, platform = start(settings)
    _, outer, stepper = built(config, platform)
    norms = []
    for step in range(2):
        tokens = tokens_of(config, step)
        norms.append(stepper.train(tokens, len(tokens), tokens[:, 1:] % 3).grad_norm)
    moments = [
        float(outer_part.optimizer.state[p]["exp_avg"].double().norm())
        for outer_part in outer.chained_optimizers
        for group in outer_part.optimizer.param_groups
        for p in group["params"]
    ]
    return norms, moments, len(swept)


@pytest.mark.parametrize(
    ("clip", "parallel"), [(0.0, {"distributed_optimizer": True}), (0.05, {"pipeline": 2})]
)
def test_our_update_divides_by_the_tokens_and_nothing_sweeps_over_gradients(clip, parallel):
    theirs = run_ranks(2, steps_of, "torch", clip, parallel)
    ours = run_ranks(2, steps_of, "davinci", clip, parallel)
    for (norms, moments, sweeps), (expected, of_torch, swept) in zip(ours, theirs, strict=True):
        assert min(expected) > 0.05, "nothing is clipped"
        assert norms == pytest.approx(expected, rel=1e-5)
        # AdamW hides a wrong factor from the loss; its moments do not.
        assert moments == pytest.approx(of_torch, rel=1e-4, abs=1e-12)
        assert max(moments) > 0
        assert (sweeps, swept) == (0, 2)
