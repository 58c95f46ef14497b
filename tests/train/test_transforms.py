"""Transformed samples through the model: loss and gradient are those of samples built by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.tiny import LENGTH
from tests.transforming import (
    EOD,
    FILLING,
    FIRST_CHANGED,
    METADATA_IDS,
    TRANSFORMS,
    by_hand,
    transformed_settings,
)

CASES = {
    "prompt 0": {},
    "prompt 0.5": {"prompt_loss_weight": 0.5},
    "prompt 1": {"prompt_loss_weight": 1},
    "metadata": {"metadata_prefix": {}},
    "fill in the middle": {"fill_in_the_middle": FILLING},
    "all": TRANSFORMS,
    "all, in documents": {**TRANSFORMS, "document_mask": True, "reset_positions": True},
}
ROWS = 12


def measured(root):
    """For each case, loss and gradient of `ROWS` samples as the program makes them, and as they are built by hand."""
    import torch
    from megatron.core import parallel_state

    from megatron_davinci.config import validate
    from megatron_davinci.data import Batches
    from megatron_davinci.data.transforms import stage_transforms
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.schedule import Schedule
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train import micro_batches as micro
    from megatron_davinci.train.documents import document_masks
    from megatron_davinci.train.order import DataOrder
    from megatron_davinci.train.planned import open_sources
    from megatron_davinci.train.run_directory import RunDirectory
    from megatron_davinci.train.step import Stepper, wrap_model

    configs = {name: validate(transformed_settings(root, case), where="test") for name, case in CASES.items()}
    platform = choose("cpu", threads=1)
    first = configs["all, in documents"]  # its attention serves all
    distributed.start(platform, seed=1)
    assert parallel_state.get_data_parallel_world_size() == 1
    (model,) = build_model(first, platform)
    with torch.no_grad():
        for parameter in model.parameters():
            # At initial weights every token has about the same loss, and a wrong one would hardly show.
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    (wrapped,) = wrap_model([model], first)
    stepper = Stepper([wrapped], None, first, platform)
    found = {}

    def gradient():
        return {name: p.main_grad.clone().numpy() for name, p in model.named_parameters()}

    for name, config in configs.items():
        schedule = Schedule(config.curriculum, LENGTH)
        sources = open_sources(config)
        order = DataOrder(config, schedule, sources, RunDirectory(root / "journals" / name))
        order.prepare(schedule.at(FIRST_CHANGED))
        ns = np.arange(FIRST_CHANGED, FIRST_CHANGED + ROWS)
        read = Batches(order.curriculum, sources).read(ns)
        transforms, document_mask = stage_transforms(config, sources)[1], document_masks(config, sources)[1]
        tokens, weights = read.tokens, read.loss_mask
        if transforms is not None:
            tokens, weights, _ = transforms.apply(order.curriculum, ns, tokens, weights)
        wrapped.zero_grad_buffer()
        batches = micro.split(
            torch.from_numpy(tokens), torch.from_numpy(weights), document_mask, 2, platform.device
        )
        [(total, count, _)] = stepper._gather(stepper._run(batches, ROWS // 2, 2, forward_only=False))
        ours = total / count, gradient()

        # By hand: every sample alone, and with documents every document alone; its losses weighed in float64.
        wrapped.zero_grad_buffer()
        losses, weight = [], 0.0
        for n in ns.tolist():
            text, label_weights, _ = by_hand(sources, order.curriculum, n, CASES[name], config.run.seed)
            share = {0: 1, 0.5: 0.5, 1: 1}[CASES[name].get("prompt_loss_weight", 0)]
            text, label_weights = np.array(text), np.array(label_weights) * share
            ends = [i + 1 for i in range(LENGTH) if text[i] == EOD] if document_mask else []
            for begin, end in zip([0, *ends], [*ends, LENGTH], strict=True):
                # The label of an end is in the next document: with documents it is no label at all.
                labels = slice(begin, end - 1 if end in ends else end)
                if labels.start >= labels.stop or not label_weights[labels].any():
                    continue
                inputs = torch.from_numpy(text[labels])[None]
                logits = wrapped(inputs, None, None)[0].double()
                each = torch.nn.functional.cross_entropy(
                    logits, torch.from_numpy(text[labels.start + 1 : labels.stop + 1]), reduction="none"
                )
                of_label = torch.from_numpy(label_weights[labels])
                losses.append((each * of_label).sum())
                weight += float(of_label.sum())
        loss = torch.stack(losses).sum() / weight
        loss.backward()
        theirs = loss.item(), gradient()
        found[name] = {
            "ours": ours,
            "theirs": theirs,
            # Megatron-Core divides at the end of a step, when it knows how many labels all micro-batches had.
            "weight": (count, weight / share),
            "tokens": tokens,
            "weights": weights,
        }
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("transforms")
    transformed_settings(root)
    return run_ranks(1, measured, root)[0]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_samples_built_by_hand(name, cases):
    case = cases[name]
    (loss, gradients), (expected, wanted) = case["ours"], case["theirs"]
    assert abs(loss - expected) <= 1e-6 * expected
    assert case["weight"][0] == pytest.approx(case["weight"][1], rel=1e-12)
    for parameter, gradient in wanted.items():
        largest = np.abs(gradient).max()
        assert largest > 0, parameter
        assert np.abs(gradients[parameter] - gradient).max() <= 2e-6 * largest, parameter


def test_each_case_is_another_loss(cases):
    losses = [case["ours"][0] for case in cases.values()]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 5e-4


def test_no_token_of_a_prefix_is_trained_on(cases):
    case = cases["metadata"]
    labels, weights = case["tokens"][:, 1:].astype(np.int64), case["weights"]
    prefixes = [np.array(ids) for ids in METADATA_IDS.values()]
    found = 0
    for row, row_weights in zip(labels, weights, strict=True):
        for at in range(LENGTH):
            if row[at - 1 if at else 0] == EOD or at == 0:
                for ids in prefixes:
                    here = row[at : at + len(ids)]
                    if len(here) and np.array_equal(here, ids[: len(here)]):
                        found += 1
                        assert not row_weights[at : at + len(ids)].any()
    assert found > 5


def test_the_largest_batches_of_today_are_counted_exactly():
    import torch

    from megatron_davinci.train.step import _loss

    # In one piece, where Megatron-Core has it in many: 4,096 sequences of 4,096 labels of weight 100.
    losses = torch.full((4096, 4096), 2.0)
    weights = torch.full((4096, 4096), 100, dtype=torch.uint8)
    weights[0, 0] = 99
    total, count, report = _loss(losses, weights)
    assert count.dtype == torch.int and int(count) == 4096 * 4096 * 100 - 1 < 2**31
    assert float(total) == pytest.approx(2.0 * int(count), rel=1e-6)
    sum_of_all, weight, _ = report.sum(0).tolist()
    assert weight == int(count) and sum_of_all == pytest.approx(2.0 * weight, rel=1e-12)


def test_a_label_of_no_weight_may_have_any_loss():
    import torch

    from megatron_davinci.train.step import _loss

    losses = torch.tensor([[1.0, float("inf"), 3.0]], requires_grad=True)
    total, count, _ = _loss(losses, torch.tensor([[2, 0, 1]], dtype=torch.uint8))
    total.backward()
    assert (total.item(), int(count)) == (5.0, 3)
    assert losses.grad.tolist() == [[2.0, 0.0, 1.0]]
