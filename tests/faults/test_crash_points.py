"""Whatever file-system call a save or an export dies at, or is refused, nothing half-written is ever trusted.

A short part of the trials is run here, all of them by `make test-long`.
"""

import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.cases import is_long
from tests.faults import trials
from tests.faults.shim import Mode, build
from tests.ranks import RankFailed, run_ranks
from tests.tiny import tiny_settings


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: a save syncs a dozen times, and nothing here asks a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


TIMEOUT = 1800 if is_long() else 200

pytestmark = pytest.mark.skipif(build() is None, reason="needs a C compiler")


def test_a_save_that_dies_or_is_refused_at_a_call(folder):
    calls, met = run_ranks(1, trials.saves, str(folder), 30, 0, 1 if is_long() else 11, timeout=TIMEOUT)[0]
    expected = (*trials.BROKEN, *trials.HALVES) if is_long() else trials.BROKEN
    assert calls > 80 and {mode.name for mode in expected} <= set(met)


def test_a_save_of_a_step_that_is_there_already(folder):
    calls, met = run_ranks(1, trials.saves, str(folder), 20, 3, 1 if is_long() else 41, timeout=TIMEOUT)[0]
    assert calls > 80 and len(met) > 3


def test_what_is_visible_is_synced(folder):
    assert run_ranks(1, trials.order, str(folder / "right")) == [[]]
    [wrong] = run_ranks(1, trials.order, str(folder / "wrong"), "files are not synced")
    assert any("visible before it is synced" in one and ".distcp" in one for one in wrong)
    assert any("never synced" in one for one in wrong)


@pytest.mark.long
@pytest.mark.parametrize(
    "mutant", ["visible before it is whole", "old ones are removed first", "a failure is not said"]
)
def test_a_mistake_would_be_noticed(folder, mutant):
    with pytest.raises(RankFailed, match=r"at call \d+ of"):
        run_ranks(1, trials.saves, str(folder), 30, 0, 3 if is_long() else 9, True, mutant, timeout=TIMEOUT)


@pytest.mark.long
def test_a_save_in_the_foreground(folder):
    run_ranks(1, trials.saves, str(folder), 30, 1, 2, False, timeout=TIMEOUT)


@pytest.mark.long
@pytest.mark.parametrize("faulty", [0, 1])
def test_either_of_two_ranks(folder, faulty):
    tiny_settings(folder)
    met = run_ranks(2, trials.on_two_ranks, str(folder), faulty, 0, 1 if faulty else 3, timeout=TIMEOUT)
    assert met[0] == met[1] and sum(met[0].values()) > 20


def test_an_export_that_dies_or_is_refused_at_a_call(folder):
    calls, met = run_ranks(1, trials.exports, str(folder), 1, 1 if is_long() else 19, timeout=TIMEOUT)[0]
    assert calls > 20 and len(met) > 3


def test_a_kill_leaves_what_the_fault_that_stands_for_it_leaves(folder):
    calls = run_ranks(1, trials.prepare, str(folder))[0]
    kept = folder / "kept"
    shutil.copytree(folder / "checkpoints", kept)

    def left(call: int, mode: Mode) -> list[str]:
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(kept, folder / "checkpoints")
        ends = pytest.raises(RankFailed, match="exit code -9") if mode is Mode.KILL else nullcontext()
        with ends:
            run_ranks(1, trials.killed, str(folder), call, int(mode))
        good = trials.good_steps(folder / "checkpoints")
        names = list((folder / "checkpoints").rglob("*"))
        return [*map(str, good), *sorted(_without_chance(path, folder) for path in names)]

    for call in range(5, calls, calls // (12 if is_long() else 2)):
        assert left(call, Mode.KILL) == left(call, Mode.DEAD), f"call {call} of {calls}"


def _without_chance(path: Path, root: Path) -> str:
    """A file's name without random parts, and its size."""
    parts = [part.partition(".tmp-")[0] for part in path.relative_to(root).parts]
    return f"{'/'.join(parts)} {path.stat().st_size if path.is_file() else ''}"
