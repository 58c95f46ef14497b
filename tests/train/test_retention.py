"""Which checkpoints stay, and that the newest always does."""

from math import inf, isfinite, nan

from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.errors import DataError
from megatron_davinci.train import checkpoint_files as cf
from megatron_davinci.train.retention import Retention, losses_by_step, prune
from tests.train.test_checkpoint_files import write


def there(folder):
    return [cf.step_of(path) for path in cf.steps(folder)]


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 100_000_000):
        write(tmp_path, step)
    assert sorted(prune(tmp_path, Retention(2), newest=100_000_000)) == [2, 4]
    assert there(tmp_path) == [100_000_000, 6]


def test_a_damaged_newer_one_takes_no_place_among_those_kept(tmp_path):
    for step in (2, 4, 6, 16):
        write(tmp_path, step)
    prune(tmp_path, Retention(2), newest=6)
    assert there(tmp_path) == [16, 6, 4]


def test_every_nth_stays_forever_and_the_best_stay_while_they_are(tmp_path):
    losses = {2: 3.0, 3: 1.0, 5: 0.5, 7: 2.0}
    for step in range(1, 10):
        write(tmp_path, step)
        prune(tmp_path, Retention(2, every=4, best=2), newest=step, losses=lambda: losses)
    # The newest two, the fourth, the eighth, and the two that were measured best.
    assert there(tmp_path) == [9, 8, 5, 4, 3]


def test_a_loss_that_is_no_number_is_never_the_best():
    for losses in ({1: 1.0, 2: nan, 3: 2.0}, {1: nan, 2: 1.0, 3: 2.0}, {1: 1.0, 2: inf, 3: nan}):
        best = min(losses, key=lambda step: losses[step] if isfinite(losses[step]) else inf)
        assert Retention(1, best=1).kept(range(1, 6), losses) == {5, best}
    assert Retention(1, best=2).kept(range(1, 6), {1: nan, 2: 4.0}) == {5, 2}


def test_when_nobody_knows_which_is_best_all_stay(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)

    def damaged():
        raise DataError("A record is damaged.")

    assert prune(tmp_path, Retention(1, best=1), newest=3, losses=damaged) == []
    assert prune(tmp_path, Retention(1), newest=3, losses=damaged) == [2, 1]


@given(
    steps=st.sets(st.integers(1, 60), min_size=1, max_size=20),
    newest=st.integers(1, 4),
    every=st.none() | st.integers(1, 9),
    best=st.integers(0, 3),
    losses=st.dictionaries(st.integers(1, 60), st.floats(0, 9)),
)
def test_what_stays(steps, newest, every, best, losses):
    kept = Retention(newest, every, best).kept(steps, losses)
    assert kept <= steps and max(steps) in kept
    assert set(sorted(steps)[-newest:]) <= kept
    assert every is None or {step for step in steps if step % every == 0} <= kept
    measured = sorted(losses[step] for step in steps if step in losses)[:best]
    assert measured == sorted(losses[step] for step in kept if step in losses)[: len(measured)]
    assert len(kept) <= newest + best + (len(steps) if every else 0)


def test_the_loss_that_counts_is_the_mean_or_a_domains():
    lines = [
        {"step": 2, "heldout_loss": {"web": 4.0, "code": 2.0}},
        {"step": 4, "heldout_loss": {"web": 1.0, "code": 3.0}},
        {"step": 4, "heldout_loss": {"web": 2.0, "code": 3.0}},
    ]
    assert losses_by_step(lines, "mean") == {2: 3.0, 4: 2.5}
    assert losses_by_step(lines, "web") == {2: 4.0, 4: 2.0}
    assert losses_by_step(lines, "math") == {}
