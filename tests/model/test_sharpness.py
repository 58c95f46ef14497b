"""The sharpness of logits against a search, and over a vocabulary with padding."""

from __future__ import annotations

import torch

from megatron_davinci.model.sharpness import SharpnessMonitor, logit_sharpness


def test_the_corner_is_where_a_search_ends():
    """Sign ascent, which the box's gradient takes, from the middle and from a random place."""
    generator = torch.Generator().manual_seed(0)
    y = 3 * torch.randn(5, 40, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 7, 39, 3, 11])
    epsilon = 0.02
    away = epsilon * (y.abs() + 1)

    def loss(d):
        return torch.nn.functional.cross_entropy(y + d, labels, reduction="none")

    for d in (torch.zeros_like(y), away * (2 * torch.rand(y.shape, generator=generator, dtype=y.dtype) - 1)):
        for _ in range(30):
            d = d.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(d).sum(), d)
            d = torch.maximum(torch.minimum(d + 0.2 * away * slope.sign(), away), -away)
        right = 100 * (loss(d) - loss(torch.zeros_like(y))) / (1 + loss(torch.zeros_like(y)))
        found = logit_sharpness(y, labels, epsilon=epsilon, tokens=40)
        torch.testing.assert_close(found, right.detach().float(), rtol=1e-4, atol=0)


def test_padding_has_no_part_and_a_monitor_takes_the_mean():
    generator = torch.Generator().manual_seed(1)
    y, labels = torch.randn(4, 24, generator=generator), torch.tensor([0, 1, 2, 19])
    padded = torch.cat([y[:, :20], torch.full((4, 4), 50.0)], 1)
    plain = logit_sharpness(y[:, :20], labels, epsilon=0.01, tokens=20)
    assert (plain > 0).all()
    torch.testing.assert_close(logit_sharpness(padded, labels, epsilon=0.01, tokens=20), plain)
    monitor = SharpnessMonitor(0.01, last=True, device=torch.device("cpu"))
    monitor.begin(True)
    monitor.add(padded, labels, tokens=20, first=0, group=None)
    monitor.add(padded[:2], labels[:2], tokens=20, first=0, group=None)
    total, count = monitor.total.tolist()
    assert count == 6 and abs(total - float(plain.sum() + plain[:2].sum())) < 1e-4
    monitor.begin(False)
    assert monitor.total.tolist() == [0, 0] and not monitor.on
