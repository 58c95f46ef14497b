"""Muon: hidden matrices move by orthogonal momentum, the same on every layout; the rest by AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.muon import Matrices, orthogonal
from tests.config import small
from tests.ranks import run_ranks


def muon(precision: str = "fp32", **parallel: object) -> dict:
    return small.settings(
        model={"num_layers": 2, "dropout": 0.0},
        parallel={"device": "cpu", "distributed_optimizer": False, **parallel},
        optimizer={"kind": "muon", "clip_grad_norm": 0.3},
        train={"precision": precision, "micro_batch_size": 2},
    )


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonal(matrix) @ right.T
    assert ((turned.diagonal() > 0.5) & (turned.diagonal() < 1.3)).all()
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-9
    scaled = orthogonal(1e-6 * matrix)
    assert torch.allclose(scaled, orthogonal(matrix), atol=1e-9)
    assert not orthogonal(torch.zeros(shape)).any()


def test_values_of_three_thousandths_of_the_norm_come_up() -> None:
    values = torch.logspace(-2.5, -1, 60, dtype=torch.float64)
    made = orthogonal((values / values.norm()).clamp_min(3e-3).diag()).diagonal()
    assert made.min() > 0.68 and made.max() < 1.21


def test_a_parameter_is_divided_into_the_matrices_of_the_model() -> None:
    # Two groups of three query heads, a key and a value, of two channels each.
    numbers = torch.arange(20)[:, None]

    def seen(held: Matrices, whole: Tensor) -> list[Tensor]:
        found = []

        def make(matrix: Tensor) -> Tensor:
            found.append(matrix[:, 0])
            return matrix + 100

        assert torch.equal(held.each(whole, make), whole + 100)
        return found

    queries, keys, values = seen(Matrices((6, 2, 2)), numbers)
    assert queries.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert keys.tolist() == [6, 7, 16, 17] and values.tolist() == [8, 9, 18, 19]
    assert [place.tolist() for place in seen(Matrices(), numbers[:3])] == [[0, 1, 2]]


def polar(matrix: Tensor) -> Tensor:
    """Five rounds by way of singular values, on which they act one by one."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right * 0.2 * max(matrix.shape) ** 0.5


def steps_by_hand(
    parameter: Tensor, gradients: list[Tensor], pieces: list[Tensor], decay: float, nesterov: bool
) -> Tensor:
    """What steps of Muon make of a parameter, in float64."""
    value, momentum = parameter.double(), torch.zeros_like(parameter, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient.double()
        direction = gradient.double() + 0.95 * momentum if nesterov else momentum
        value = value * (1 - 1e-2 * decay)
        for rows in pieces:
            value[rows] -= 1e-2 * polar(direction[rows])
    return value


def watched(settings: dict) -> dict:
    """Parameters before and after two steps, by name, with the gradients that the optimizer was given."""
    from megatron_davinci.platform import distributed
    from tests.stepping import built, start, tokens_of

    config, platform = start(settings)
    chunks, optimizer, stepper = built(config, platform)
    [part] = optimizer.chained_optimizers
    named = {name: getattr(p, "main_param", p) for chunk in chunks for name, p in chunk.named_parameters()}
    before = {name: p.detach().clone() for name, p in named.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in named}
    step = part.optimizer.step

    def noted() -> None:
        for name, p in named.items():
            gradients[name].append(p.grad.detach().clone())
        step()

    part.optimizer.step = noted
    for number in range(2):
        tokens = tokens_of(config, number)
        stepper.train(tokens, len(tokens) // 2)
    states = {name: sorted(part.optimizer.state[p]) for name, p in named.items()}
    found = {
        name: (before[name].numpy(), p.detach().numpy(), [g.numpy() for g in gradients[name]], states[name])
        for name, p in named.items()
    }
    distributed.stop()
    return found


@pytest.mark.parametrize(("precision", "nesterov"), [("fp32", False), ("bf16", True)])
def test_each_matrix_moves_as_by_hand_and_nothing_else_does(precision: str, nesterov: bool) -> None:
    settings = muon(precision)
    settings["optimizer"]["muon"] = {"nesterov": nesterov}
    [found] = run_ranks(1, watched, settings)
    config = validate(muon(), "test")
    channels, of_group, moved = 8, 2, 0
    for name, (*values, given, states) in found.items():
        before, after, *gradients = map(torch.from_numpy, (*values, *given))
        rows = len(before)
        pieces = [torch.arange(rows)]
        if name.endswith("linear_qkv.weight"):
            heads = torch.arange(rows).view(-1, of_group + 2, channels)
            pieces = [
                heads[:, :of_group].flatten(),
                heads[:, of_group].flatten(),
                heads[:, of_group + 1].flatten(),
            ]
        elif name.endswith("linear_fc1.weight"):
            pieces = list(torch.arange(rows).chunk(2))
        expected = (
            steps_by_hand(before, gradients, pieces, config.optimizer.weight_decay, nesterov)
            if before.dim() == 2
            else before.double()
        )
        if ".layers." in name and before.dim() == 2:
            moved += 1
            assert states == ["exp_avg"]
            assert (after - expected).abs().max() < 2e-5, name
        else:
            assert states == ["exp_avg", "exp_avg_sq"]
            assert (after - expected).abs().max() > 1e-4, name
    assert moved == 4 * config.model.num_layers


def losses(cases: dict) -> dict:
    from tests.stepping import take_all

    return {name: taken.losses for name, taken in take_all(cases).items()}


@pytest.fixture(scope="module")
def alone() -> list[float]:
    [found] = run_ranks(1, losses, {"one": muon()})
    return found["one"]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {}])
def test_two_ranks_take_the_steps_of_one(parallel: dict, alone: list[float]) -> None:
    for found in run_ranks(2, losses, {"two": muon(**parallel)}):
        assert found["two"] == pytest.approx(alone, abs=2e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"optimizer_instances": 2}}, "optimizer_instances: 1; found 2"),
        ({"parallel": {"overlap_parameter_gather": True}}, "overlap_parameter_gather: false; found true"),
        ({"parallel": {"expert_tensor": 2}}, "expert_tensor: 1; found 2"),
        ({"optimizer": {"kind": "muon", "cpu_offload": 0.5}}, "muon needs optimizer.cpu_offload: 0"),
        ({"backends": {"optimizer": "davinci"}}, "auto or torch; found davinci"),
        ({"optimizer": {"kind": "adamw", "muon": {"rounds": 3}}}, "found kind: adamw"),
    ],
)
def test_what_does_not_go_with_muon_is_refused(changes: dict, said: str) -> None:
    settings = muon()
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    with pytest.raises(ConfigError) as refused:
        validate(settings, "test")
    assert said in str(refused.value)
