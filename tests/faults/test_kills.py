"""Killed at random and started again, a run is the run that would have been. `make faults` does it 200 times."""

import random

import pytest

from tests.cases import is_long
from tests.faults import chains
from tests.faults.kills import LAYOUTS


@pytest.mark.parametrize(
    "layout", [name if name == "DP2" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_a_run_that_is_killed_again_and_again(layout, tmp_path):
    undisturbed = chains.Undisturbed(tmp_path, layout, short=not is_long())
    aims = ("save", "rank 0", "recovery", "evaluation", "loader worker", "all ranks")
    number = 6 if is_long() else 1
    done = chains.chain(undisturbed, iter(aims), number, random.Random(1))
    assert done.problem == "" and done.equal
    assert len(done.kills) >= (number + 1) // 2, "it was done before it was killed"
    assert (done.samples_lost, done.samples_repeated) == (0, 0)
    assert done.damaged_loaded == done.older_loaded == 0
    assert all(kill.ended for kill in done.kills)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["launcher", "import"])
def test_a_run_of_the_launcher_that_is_killed(kind, tmp_path):
    undisturbed = chains.Undisturbed(tmp_path, "DP2")
    done = chains.chain(undisturbed, iter((kind, kind)), 2, random.Random(2))
    assert done.problem == "" and len(done.kills) == 2
    assert all(kill.noticed for kill in done.kills), "ranks outlive their launcher"


@pytest.mark.long
def test_an_export_that_is_killed_again_and_again(tmp_path):
    undisturbed = chains.Undisturbed(tmp_path, "TP2")
    kills, whole = chains.killed_exports(undisturbed, tmp_path / "undisturbed", 6, random.Random(3))
    assert kills >= 1 and whole
