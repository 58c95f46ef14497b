"""z-loss and QK-norm against plain torch in float64, and the same on every layout."""

from __future__ import annotations

import math

import pytest
import torch

from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

COEFFICIENT = 0.01


def a_batch():
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(5, 2, 12, generator=generator)
    labels = torch.randint(12, (5, 2), generator=generator)
    along = torch.randn(2, 5, 2, generator=generator)
    return logits, labels, along


def ours(tensor):
    """Both losses, and the gradient of their sum along random weights by this rank's logits."""
    from megatron.core import parallel_state

    from megatron_davinci.model.loss import cross_entropy_and_z_loss
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    distributed.start(choose("cpu", threads=1), tensor=tensor)
    logits, labels, along = a_batch()
    part = logits.chunk(tensor, -1)[parallel_state.get_tensor_model_parallel_rank()].clone().requires_grad_()
    # Logits are the output of a product; a leaf could not be overwritten.
    losses = cross_entropy_and_z_loss(part * 1, labels, COEFFICIENT)
    (losses * along).sum().backward()
    distributed.stop()
    return losses.detach().numpy(), part.grad.numpy()


def reference():
    logits, labels, along = a_batch()
    wide = logits.double().requires_grad_()
    log_z = wide.logsumexp(-1)
    loss = log_z - wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    losses = torch.stack([loss, COEFFICIENT * log_z.square()])
    (losses * along).sum().backward()
    return losses.detach().numpy(), wide.grad.numpy()


@pytest.mark.parametrize("tensor", [1, 2])
def test_z_loss_and_its_gradient_are_those_of_the_formula_in_float64(tensor):
    import numpy as np

    losses, gradient = reference()
    found = run_ranks(tensor, ours, tensor)
    for mine, _ in found:
        np.testing.assert_allclose(mine, losses, rtol=1e-5, atol=1e-6)
    whole = np.concatenate([part for _, part in found], axis=-1)
    np.testing.assert_allclose(whole, gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def whole(parallel=None, *, z_loss=0.01, qk_norm=True, micro=2):
    return small.settings(
        model={"num_layers": 2, "qk_norm": qk_norm},
        parallel={"device": "cpu", **(parallel or {})},
        train={"precision": "fp32", "micro_batch_size": micro, "z_loss": z_loss},
    )


LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "TP2xPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "DP2": (2, {}),
}
SHORT = ("TP2+SP",)


def _take(settings):
    return take_all(settings, masked=True)


@pytest.fixture(scope="module")
def one_rank():
    settings = {
        "both": whole(),
        "other micro-batches": whole(micro=4),
        "no z-loss": whole(z_loss=0.0),
        "no QK-norm": whole(qk_norm=False),
    }
    return run_ranks(1, _take, settings)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in LAYOUTS]
)
def test_every_layout_takes_the_steps_of_one_rank(name, one_rank):
    ranks, parallel = LAYOUTS[name]
    for taken in run_ranks(ranks, _take, {"both": whole(parallel)}):
        for part in ("losses", "norms", "z_losses"):
            assert getattr(taken["both"], part) == pytest.approx(getattr(one_rank["both"], part), rel=1e-4)


def test_the_cut_into_micro_batches_is_nothing_to_the_z_loss(one_rank):
    both, other = one_rank["both"], one_rank["other micro-batches"]
    for part in ("losses", "norms", "z_losses"):
        assert getattr(other, part) == pytest.approx(getattr(both, part), rel=1e-5)


def test_the_loss_on_record_is_the_cross_entropy_alone(one_rank):
    with_it, without = one_rank["both"], one_rank["no z-loss"]
    assert with_it.losses[0] == without.losses[0], "the first step has the same weights"
    assert with_it.losses[2] != without.losses[2] and with_it.norms[0] != without.norms[0]
    assert without.z_losses == [None] * 3
    # Logits of a fresh model are near 0, so Z is near the vocabulary's size.
    assert with_it.z_losses[0] == pytest.approx(0.01 * math.log(64) ** 2, rel=0.05)
    assert with_it.losses != one_rank["no QK-norm"].losses


def attention_and_reference():
    """Queries and keys as Megatron-Core's attention makes them with QK-norm, against plain torch in float64."""
    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose("cpu", threads=1)
    distributed.start(platform)
    (model,) = build_model(validate(whole(), "test"), platform)
    attention = model.decoder.layers[0].self_attention
    for norm in (attention.q_layernorm, attention.k_layernorm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(6, 2, 32)
    query, key, value = attention.get_query_key_value_tensors(x)
    rows = x.double() @ attention.linear_qkv.weight.double().t() + attention.linear_qkv.bias.double()
    q, k, v = rows.unflatten(-1, (2, 4 * 8)).split([2 * 8, 8, 8], dim=-1)

    def normal(part, norm):
        heads = part.reshape(6, 2, -1, 8)
        return heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()

    pairs = [(query, normal(q, attention.q_layernorm)), (key, normal(k, attention.k_layernorm)), (value, v)]
    distributed.stop()
    return [float((a - b).abs().max()) for a, b in pairs], sorted(
        name for name, _ in model.named_parameters() if "q_layernorm" in name
    )


def test_qk_norm_is_that_of_the_formula_head_by_head():
    differences, names = run_ranks(1, attention_and_reference)[0]
    assert max(differences) < 1e-5
    assert names == [f"decoder.layers.{n}.self_attention.q_layernorm.weight" for n in (0, 1)]


@pytest.mark.long
def test_weights_of_qk_norm_go_from_layout_to_layout(tmp_path):
    from tests.distributed.test_layouts import deviation, metrics
    from tests.tiny import tiny_settings, train_here

    def settings(directory, stop, **parallel):
        made = tiny_settings(
            tmp_path,
            parallel={"device": "cpu", **parallel},
            run={"directory": str(tmp_path / directory), "seed": 7},
            train={
                "micro_batch_size": 2,
                "precision": "fp32",
                "threads": 1,
                "stop_after_steps": stop,
                "z_loss": 1e-3,
            },
        )
        made["model"]["qk_norm"] = True
        return made

    run_ranks(1, train_here, settings("whole", 12))
    run_ranks(2, train_here, settings("parts", 6, tensor=2))
    run_ranks(2, train_here, settings("parts", 9, pipeline=2))
    run_ranks(1, train_here, settings("parts", 12))
    found = metrics(tmp_path / "parts")
    assert deviation(found, metrics(tmp_path / "whole"), "loss") <= 1e-4
    assert all(0 < step["z_loss"] < 0.1 for step in found)
