"""Experts: how many parameters they have, the same weights on every layout, and what keeps them equally busy."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.config import small
from tests.ranks import run_ranks

EXPERTS = {"number": 4, "top_k": 2, "shared_ffn_hidden_size": 24}


def moe_settings(model=None, **parallel):
    experts = {**EXPERTS, **(model or {})}
    whole = small.settings(model={"experts": experts}, parallel={"device": "cpu", **parallel})
    whole["train"]["micro_batch_size"] = 2
    return whole


def weights_of(settings):
    """Every weight of this rank by its name in the whole model, and its count in this rank's chunks."""
    from megatron_davinci.model.build import build_model
    from megatron_davinci.model.initialize import global_name
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    config, platform = validate(settings, "test"), choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    found = {
        global_name(name, chunk): p.detach().numpy()
        for chunk in build_model(config, platform)
        for name, p in chunk.named_parameters()
    }
    distributed.stop()
    return found


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, weights_of, moe_settings())[0]


def test_the_parameters_are_as_many_as_the_configuration_says(one_rank):
    model = validate(moe_settings(), "test").model
    assert sum(weight.size for weight in one_rank.values()) == model.parameters()
    of_experts = sum(weight.size for name, weight in one_rank.items() if ".mlp.experts." in name)
    assert of_experts == model.num_layers * model.expert_parameters()
    assert (
        model.parameters() - model.parameters(active=True) == of_experts // 2
    )  # two of four work on a token
    dense = validate(small.settings(), "test").model
    assert dense.parameters(active=True) == dense.parameters()
    # Two experts, the shared one and the router, where the dense model has one MLP.
    more = 3 * 32 * (2 * 48 + 24 - 48) + 4 * 32
    assert model.flops_per_token(16) - dense.flops_per_token(16) == 6 * 2 * more


def test_every_expert_has_the_same_weights_whoever_computes_it(one_rank):
    parallel = {"expert": 2, "tensor": 2, "sequence": True}
    ranks = run_ranks(2, weights_of, moe_settings(**parallel))
    names = [{name for name in weights if ".mlp.experts." in name} for weights in ranks]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {name for name in one_rank if ".mlp.experts." in name}
    for weights, mine in zip(ranks, names, strict=True):
        for name in mine:
            assert np.array_equal(weights[name], one_rank[name])
    values = [weight.tobytes() for name, weight in one_rank.items() if name.endswith("linear_fc1.weight")]
    assert len(set(values)) == len(values), "experts that begin alike stay alike"


def gradients(settings, explicit):
    """The gradient of the batch by parameter: with our router's losses, or with them written out beside the loss."""
    import torch
    from torch.nn import functional as F

    from megatron_davinci.model.build import build_model
    from megatron_davinci.model.initialize import global_name
    from megatron_davinci.model.router import routers
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train import micro_batches as micro
    from megatron_davinci.train.step import Stepper, wrap_model

    config, platform = validate(settings, "test"), choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    (model,) = build_model(config, platform)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    (wrapped,) = wrap_model([model], config)
    stepper = Stepper([wrapped], None, config, platform)
    length = config.data.sequence_length
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (4, length + 1), generator=draw)
    mask = torch.randint(0, 3, (4, length), generator=draw, dtype=torch.uint8)  # weights 0, 1 and 2
    wrapped.zero_grad_buffer()
    if not explicit:
        stepper._tell_routers(tokens, mask, None)
        batches = micro.split(tokens, mask, None, config.train.micro_batch_size, platform.device)
        stepper._run(
            batches, 4 // config.train.micro_batch_size, config.train.micro_batch_size, forward_only=False
        )
    else:
        experts = config.model.experts
        kept = []
        for router in routers([model]):
            router.get_aux_loss_coeff = lambda _: 0.0
            router.apply_z_loss = lambda logits, padding_mask=None: kept.append(logits) or logits
        losses = wrapped(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous())
        total = (losses * mask).sum() / mask.sum()
        for logits in kept:
            by_sample = logits.view(length, 4, experts.number).transpose(0, 1)
            scores = by_sample.softmax(-1)
            chosen = F.one_hot(scores.topk(experts.top_k).indices, experts.number).sum(-2).to(scores)
            # Switch Transformer, eq. 4, for each sequence: experts * sum over them of share * mean score.
            share = chosen.mean(1) / experts.top_k
            balance = experts.number * (share * scores.mean(1)).sum(-1).mean()
            total = total + 0.5 * balance + 0.25 * logits.logsumexp(-1).square().mean()
        total.backward()
    found = {global_name(n, model): p.main_grad.double().numpy() for n, p in model.named_parameters()}
    distributed.stop()
    return found


@pytest.mark.parametrize("micro", [1, 4])
def test_the_auxiliary_losses_are_their_formulas_whatever_the_micro_batch_and_the_mask(micro):
    settings = moe_settings({"balance_coefficient": 0.5, "router_z_loss": 0.25}, distributed_optimizer=False)
    settings["train"]["micro_batch_size"] = micro
    (ours,) = run_ranks(1, gradients, settings, False)
    settings["train"]["micro_batch_size"] = 4
    (formula,) = run_ranks(1, gradients, settings, True)
    assert ours.keys() == formula.keys()
    for name, gradient in ours.items():
        scale = np.abs(formula[name]).max()
        assert np.abs(gradient - formula[name]).max() <= 2e-5 * max(scale, 1e-3), name
    without = {**settings, "model": {**settings["model"], "experts": {**EXPERTS, "balance": "none"}}}
    (other,) = run_ranks(1, gradients, without, False)
    name = "decoder.layers.0.mlp.router.weight"
    assert np.abs(other[name] - formula[name]).max() > 0.1 * np.abs(formula[name]).max(), "the losses matter"


def test_more_chosen_than_there_are():
    with pytest.raises(ConfigError, match=r"top_k \(5\) is more than there are experts \(4\)"):
        validate(moe_settings({"top_k": 5}), "test")
