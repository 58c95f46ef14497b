"""Every design that is shipped passes the lab's own check."""

from pathlib import Path

import pytest

from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.control import check, cost_of
from megatron_davinci.lab.design import load_design

DESIGNS = sorted((Path(__file__).parents[2] / "examples" / "ablations" / "designs").glob("*.yaml"))


@pytest.mark.parametrize("path", DESIGNS, ids=lambda path: path.stem)
def test_a_shipped_design_differs_in_nothing_else(path):
    design = load_design(path)
    arms = arms_of(design)
    assert check(design, arms) == []
    assert len({run.identity for run in runs_of(design, arms)}) == len(arms) * len(design.seeds)
    assert cost_of(arms[0].config).tokens == 500_736


def test_designs_share_runs():
    rate, grid, share, null = (
        {run.identity for run in runs_of(load_design(path))}
        for path in DESIGNS
        if path.stem in ("learning-rate", "code-science", "qa-share", "planted-null")
    )
    # The plain configuration is an arm of each.
    assert len(rate & grid & share & null) >= 3
