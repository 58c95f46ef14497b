"""Every design that is shipped passes the lab's own check."""

from pathlib import Path

import pytest
import yaml

from megatron_davinci.lab.arms import arms_of, runs_of
from megatron_davinci.lab.control import check, cost_of
from megatron_davinci.lab.design import load_design
from megatron_davinci.lab.mixtures import Space, load_search

FOLDER = Path(__file__).parents[2] / "examples" / "ablations"
DESIGNS, REPORTS = (sorted((FOLDER / kind).glob("*.yaml")) for kind in ("designs", "report"))


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


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_design_of_the_reports_size_differs_in_nothing_else(path):
    design = load_design(path)
    arms = arms_of(design)
    assert check(design, arms) == []
    assert arms[0].config.model.parameters() > 3e9 and cost_of(arms[0].config).tokens >= 6.5e12


def test_the_shipped_search_has_a_space():
    path = FOLDER / "mixture.yaml"
    search = load_search(path)
    space = Space(search, path)
    assert space.domains == ["general", "code", "science", "qa"] and space.before == "stage 1"
    assert sum(search.rounds) * len(search.seeds) == 8


def test_the_catalogue_names_every_design_and_says_why_where_there_is_none():
    entries = yaml.safe_load((FOLDER / "catalogue.yaml").read_text())
    named = {one[kind] for one in entries for kind in ("report", "laptop")} - {None}
    shipped = [path for path in (*DESIGNS, *REPORTS) if path.read_text().startswith("# The report's")]
    assert named == {str(path.relative_to(FOLDER)) for path in shipped} and set(REPORTS) <= set(shipped)
    for one in entries:
        assert one["expected"] and one["section"] and one["tokens"]
        assert bool(one.get("why")) == (None in (one["report"], one["laptop"]))
