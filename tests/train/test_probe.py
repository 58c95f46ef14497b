"""Where a number that is not finite comes from is said of all samples that have it."""

import numpy as np
import pytest
import torch

from megatron_davinci.train.probe import Probe


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([1], "sample 41 of source b"),
        ([0, 2], "samples 40, 42 of source a"),
        ([0, 1, 2, 3], "samples 40, 41, 42 and 1 more of sources a, b"),
    ],
)
def test_samples_are_said_with_every_source_that_they_are_of(bad, said):
    reports = [torch.ones(2, 3, dtype=torch.float64) for _ in range(2)]
    for row in bad:
        reports[row // 2][row % 2, 0] = torch.nan
    with Probe([torch.nn.Sequential(torch.nn.Linear(2, 2))]) as probe:
        found = probe.finding(reports, np.arange(40, 44), 2, torch.tensor([0, 1, 0, 1]), ["a", "b"])
    assert said in str(found) and found.samples == tuple(40 + row for row in bad)
