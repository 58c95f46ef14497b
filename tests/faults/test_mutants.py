"""The trials notice every mistake in `mutants.py`, and nothing where there is none."""

import pytest

from tests.faults import gauntlet
from tests.faults.shim import build

NEED_SHIM = ("crash_points", "sync_order")
TRIALS = {trial.__name__: trial for trial in gauntlet.TRIALS.values()}
# What takes a second or two; `make test-long` and `make faults` take them all.
SHORT = ("short reads are taken", "code 0 for a failure", "digests are not looked at")


@pytest.mark.parametrize(
    "mutant", [one if one in SHORT else pytest.param(one, marks=pytest.mark.long) for one in gauntlet.TRIALS]
)
def test_a_mistake_is_noticed(mutant, tmp_path):
    trial = gauntlet.TRIALS[mutant]
    if trial.__name__ in NEED_SHIM and build() is None:
        pytest.skip("needs a C compiler")
    assert trial(tmp_path, mutant)


@pytest.mark.parametrize(
    "name",
    [
        name if gauntlet.TRIALS[SHORT[0]] is trial else pytest.param(name, marks=pytest.mark.long)
        for name, trial in TRIALS.items()
    ],
)
def test_nothing_is_noticed_where_nothing_is_wrong(name, tmp_path):
    if name in NEED_SHIM and build() is None:
        pytest.skip("needs a C compiler")
    assert TRIALS[name](tmp_path, "") == ""
