"""A rank that computes, or holds, wrong bits is named before a checkpoint can hold them."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from megatron_davinci.errors import ConfigError, Corrupt
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here

OVERLAP = {"overlap_gradient_reduce": True, "overlap_parameter_gather": True}


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines]


def settings_of(root, run, parallel=None, stop=9, **health):
    settings = tiny_settings(root, run={"directory": str(run), "seed": 7}, train={"stop_after_steps": stop})
    settings["parallel"] |= parallel or {}
    settings["train"]["micro_batch_size"] = 1
    return {**settings, "health": health}


def flipped(tensor, bit):
    """The tensor with one bit of its first element changed."""
    other = tensor.detach().clone()
    other.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)
    return other


def train_flipped(settings, rank, step, what, bit):
    """Train; on one rank a bit flips: of a gradient while the step is computed first, or of a weight after it.

    `product`: of a gradient that the product itself has written into `main_grad`, which autograd never sees.
    """
    from megatron_davinci.train.step import Stepper

    train, run, steps, runs = Stepper.train, Stepper._run, [], []

    def planted_run(self, *args, **keywords):
        runs.append(len(steps))
        handles = []
        if (
            what in ("gradient", "product")
            and rank == int(os.environ["RANK"])
            and runs.count(step) == 1
            and len(steps) == step
        ):
            parameters = dict(self.wrapped[0].module.named_parameters())
            parameter = list(parameters.values())[3]
            if what == "product":
                parameter = parameters["decoder.layers.1.mlp.linear_fc2.weight"]

            def flip(gradient):
                if what == "gradient":
                    return flipped(gradient, bit)
                assert parameter.grad_added_to_main_grad
                parameter.main_grad.copy_(flipped(parameter.main_grad, bit))
                return None

            handles = [parameter.register_hook(flip)]
        try:
            return run(self, *args, **keywords)
        finally:
            for handle in handles:
                handle.remove()

    def planted_train(self, *args, **keywords):
        steps.append(1)
        result = train(self, *args, **keywords)
        if what == "weight" and rank == int(os.environ["RANK"]) and len(steps) == step:
            parameter = list(self.wrapped[0].module.parameters())[3]
            parameter.data.copy_(flipped(parameter.data, bit))
        return result

    Stepper.train, Stepper._run = planted_train, planted_run
    return train_here(settings)


def test_a_run_that_looks_twice_is_the_run_that_does_not(tmp_path):
    model = {**tiny_settings(tmp_path)["model"], "dropout": 0.1}
    plain = {**settings_of(tmp_path, tmp_path / "plain"), "model": model}
    run_ranks(2, train_here, plain)
    looks = settings_of(tmp_path, tmp_path / "looks", recompute_every_steps=1, compare_replicas_every_steps=2)
    run_ranks(2, train_here, {**looks, "model": model})
    assert numbers(tmp_path / "looks") == numbers(tmp_path / "plain")


@pytest.mark.parametrize(
    ("parallel", "bit"),
    [
        ({}, 0),
        pytest.param(OVERLAP, 12, marks=pytest.mark.long),
        pytest.param({"tensor": 2, "sequence": True}, 22, marks=pytest.mark.long),
        pytest.param({"pipeline": 2}, 31, marks=pytest.mark.long),
    ],
    ids=["lowest bit", "overlap", "TP2", "PP2, sign"],
)
def test_a_bit_that_flips_in_a_gradient_is_found_in_the_step_and_names_the_rank(parallel, bit, tmp_path):
    settings = settings_of(tmp_path, tmp_path / "run", parallel, recompute_every_steps=3)
    with pytest.raises(Corrupt) as error:
        run_ranks(2, train_flipped, settings, 1, 6, "gradient", bit)
    said = str(error.value)
    assert "A rank has computed the same step twice, with different results." in said
    assert "step 6, which was not applied" in said
    assert re.search(r"found: +rank 1 on \S+: decoder\.layers\.[01]\.", said) and "rank 0" not in said
    assert error.value.code == 6
    assert [step for step, *_ in numbers(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("parallel", [OVERLAP, pytest.param({}, marks=pytest.mark.long)])
def test_a_bit_that_flips_where_a_product_writes_its_gradient_is_found(parallel, tmp_path):
    settings = settings_of(tmp_path, tmp_path / "run", parallel, recompute_every_steps=3)
    settings["backends"] = {"swiglu": "davinci"}
    with pytest.raises(Corrupt, match=r"rank 1 on \S+: decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        run_ranks(2, train_flipped, settings, 1, 6, "product", 12)


def test_a_weight_that_differs_is_found_at_the_next_look_and_the_rank_is_voted_out(tmp_path):
    parallel = {"distributed_optimizer": False}
    settings = settings_of(tmp_path, tmp_path / "run", parallel, compare_replicas_every_steps=4)
    with pytest.raises(Corrupt) as error:
        run_ranks(4, train_flipped, settings, 2, 5, "weight", 3)
    said = str(error.value)
    assert "Replicas of the model hold different weights." in said and "step 8, " in said
    assert re.search(r"found: +rank 2 on \S+\n", said)


@pytest.mark.long
@pytest.mark.parametrize("bit", range(32))
def test_any_bit_of_a_weight_is_found_and_of_two_replicas_both_are_named(bit, tmp_path):
    parallel = {"distributed_optimizer": False}
    settings = settings_of(tmp_path, tmp_path / "run", parallel, 3, compare_replicas_every_steps=1)
    with pytest.raises(Corrupt) as error:
        run_ranks(2, train_flipped, settings, 1, 2, "weight", bit)
    said = str(error.value)
    assert "step 2, " in said and "or another of these" in said


def test_any_single_bit_changes_the_sum():
    from megatron_davinci.train.integrity import bit_sums

    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = torch.arange(1, 33).to(dtype)
        for element in (0, 17, 31):
            for bit in range(8 * tensor.element_size()):
                other = tensor.clone()
                raw = other.view(torch.uint8)
                raw[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8
                assert bit_sums([other, tensor])[0] != bit_sums([tensor])[0], (dtype, element, bit)


def test_on_a_gpu_it_asks_for_kernels_that_add_in_order(tmp_path):
    from types import SimpleNamespace

    from megatron_davinci.config import validate
    from megatron_davinci.train.integrity import Integrity

    config = validate(settings_of(tmp_path, tmp_path / "run", recompute_every_steps=5), "config.yaml")
    with pytest.raises(ConfigError, match=r"health\.recompute_every_steps"):
        Integrity(config, SimpleNamespace(), SimpleNamespace(name="cuda"))
