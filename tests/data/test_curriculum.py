"""The data order is a function of the sample number: exact, complete in every epoch, the same however it is asked."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.curriculum import Curriculum, Location
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.errors import DataError

NAMES = ["web", "code", "maths", "books", "wiki", "qa", "law"]


@st.composite
def journals(draw: st.DrawFn, most_records: int = 6) -> tuple[dict[str, int], list[MixRecord]]:
    """Sources of a few windows, and records that mix them anew after a few samples."""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    windows = {name: draw(st.integers(1, 40)) for name in names}
    records, first = [], 0
    for stage in range(draw(st.integers(1, most_records))):
        parts = draw(
            st.lists(st.sampled_from([0, 0, 1, 2, 7, 300]), min_size=len(names), max_size=len(names)).filter(
                any
            )
        )
        weights = {name: str(Fraction(part, sum(parts))) for name, part in zip(names, parts)}
        records.append(MixRecord(first, f"stage {stage}", weights))
        first += draw(st.one_of(st.integers(1, 4), st.integers(1, 90)))
    return windows, records


@given(journals(), st.integers(0, 2**63), st.integers(1, 400))
@settings(max_examples=120, deadline=None)
def test_each_window_comes_once_per_epoch_and_source(journal, seed, length):
    windows, records = journal
    curriculum = Curriculum(windows, seed, records)
    seen: dict[tuple[str, int], list[int]] = defaultdict(list)
    for n in range(length):
        at = curriculum.locate(n)
        # A source's epochs follow each other, and one begins when the one before is complete.
        assert at.epoch == 0 or len(seen[at.source, at.epoch - 1]) == windows[at.source]
        seen[at.source, at.epoch].append(at.window)
    for (source, _), order in seen.items():
        assert len(set(order)) == len(order)
        assert all(0 <= window < windows[source] for window in order)
        assert len(order) < windows[source] or sorted(order) == list(range(windows[source]))


@given(journals(most_records=50), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_consumed_is_a_count_whatever_the_records_do(journal, seed):
    windows, records = journal
    curriculum = Curriculum(windows, seed, records)
    length = records[-1].first_sample + 30
    located = curriculum.locate_many(np.arange(length))
    names = [curriculum.sources[source] for source in located.source]
    taken: Counter[str] = Counter()
    for n in range(length):
        if n % 7 == 0 or n in curriculum.first_samples:
            assert curriculum.consumed(n) == {name: taken[name] for name in windows}
        # The position of a sample in its source is the number of samples that the source gave before.
        assert located.epoch[n] == taken[names[n]] // windows[names[n]]
        taken[names[n]] += 1
    assert sum(curriculum.consumed(length).values()) == length


@given(journals(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_answer_does_not_depend_on_what_else_is_asked(journal, data):
    windows, records = journal
    curriculum = Curriculum(windows, 3, records)
    ns = np.array(data.draw(st.lists(st.integers(0, 600), min_size=1, max_size=40)))
    whole = curriculum.locate_many(ns)
    cut = data.draw(st.integers(0, len(ns)))
    parts = [curriculum.locate_many(part) for part in (ns[:cut], ns[cut:])]
    for column, first, second in zip(whole, *parts):
        assert column.dtype == np.int64
        assert np.array_equal(column, np.concatenate([first, second]))
    for n, source, epoch, window in zip(ns.tolist(), *whole):
        stage = [record.stage for record in records if record.first_sample <= n][-1]
        assert curriculum.locate(n) == Location(stage, curriculum.sources[source], epoch, window)


@given(journals(most_records=10), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_a_record_moves_no_sample_before_it(journal, keep):
    windows, records = journal
    keep = min(keep, len(records) - 1)
    later, grown = Curriculum(windows, 3, records), Curriculum(windows, 3, records[:keep])
    ns = np.arange(records[keep].first_sample)
    if keep:
        before = grown.locate_many(ns)
        assert all(np.array_equal(*pair) for pair in zip(before, later.locate_many(ns)))
    for record in records[keep:]:
        grown.append(record)
    ns = np.arange(records[-1].first_sample + 50)
    assert all(np.array_equal(*pair) for pair in zip(grown.locate_many(ns), later.locate_many(ns)))


@given(journals(most_records=50))
@settings(max_examples=40, deadline=None)
def test_every_prefix_has_its_exact_shares(journal):
    windows, records = journal
    curriculum = Curriculum(windows, 3, records)
    exact, errors = np.zeros(len(windows)), [np.zeros((1, len(windows)))]
    taken = np.zeros(len(windows))
    ends = [record.first_sample for record in records[1:]] + [records[-1].first_sample + 100]
    for record, end in zip(records, ends):
        ns = np.arange(record.first_sample, end)
        prefix = taken + np.cumsum(np.eye(len(windows))[curriculum.locate_many(ns).source], axis=0)
        shares = np.array([float(Fraction(record.weights[name])) for name in windows])
        target = exact + np.outer(np.arange(1, len(ns) + 1), shares)
        errors.append(prefix - target)
        taken, exact = prefix[-1], target[-1]
    history = np.concatenate(errors)
    assert abs(history).max() <= 32
    assert (history.max(axis=0) - history.min(axis=0)).max() <= 64


def test_the_order_changes_with_the_seed_and_with_every_epoch():
    mix = [MixRecord(0, "all", {"web": "1"})]
    orders = set()
    for seed in range(5):
        window = Curriculum({"web": 50}, seed, mix).locate_many(np.arange(250)).window
        orders |= {tuple(epoch) for epoch in window.reshape(5, 50).tolist()}
    assert len(orders) == 25


FAR_RECORDS = (
    MixRecord(0, "a", {"web": "0.9", "code": "0.099999", "maths": "1e-6"}),
    MixRecord(1000, "b", {"web": "0.5", "code": "0.25", "maths": "0.25"}),
)
FAR_WINDOWS = {"web": 10**9, "code": 10**8, "maths": 12345}


class TestCost:
    def calls(self, n: int) -> int:
        """Python and C calls that locating one sample and counting up to it takes."""
        curriculum, count = Curriculum(FAR_WINDOWS, 1, FAR_RECORDS), 0

        def profile(_: object, event: str, __: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            curriculum.locate(n)
            curriculum.consumed(n)
            curriculum.locate_many(np.array([n]))
        finally:
            sys.setprofile(None)
        return count

    def test_is_the_same_at_the_beginning_and_two_billion_samples_on(self):
        # Within a few calls: a sample may walk one cycle more.
        counts = [self.calls(n) for n in (10, 999, 2 * 10**9, 2**55)]
        assert max(counts) - min(counts) < 30 < min(counts)

    def test_nothing_is_as_long_as_the_source(self):
        # A table of 2^40 windows would not fit in memory.
        huge = Curriculum(
            {"web": 2**40, "code": 2**62}, 1, [MixRecord(0, "a", {"web": "0.5", "code": "0.5"})]
        )
        at = huge.locate(2**50)
        assert huge.locate_many(np.array([2**50])).window[0] == at.window
        assert sum(huge.consumed(2**50).values()) == 2**50


class TestBadInput:
    def test_a_mixture_of_a_source_that_is_not_there(self):
        with pytest.raises(DataError, match=r"(?s)does not have.*maths"):
            Curriculum({"web": 5}, 0, [MixRecord(0, "a", {"web": "0.5", "maths": "0.5"})])

    def test_a_source_without_windows_may_wait_but_not_be_mixed(self):
        curriculum = Curriculum({"web": 5, "code": 0}, 0, [MixRecord(0, "a", {"web": "1", "code": "0"})])
        assert {curriculum.locate(n).source for n in range(20)} == {"web"}
        with pytest.raises(DataError, match=r"(?s)without a window.*code"):
            curriculum.append(MixRecord(20, "b", {"web": "1/2", "code": "1/2"}))

    def test_records_out_of_order(self):
        mix = {"web": "1"}
        with pytest.raises(DataError, match="out of order"):
            Curriculum({"web": 5}, 0, [MixRecord(1, "a", mix)])
        for second in (0, 10):
            curriculum = Curriculum({"web": 5}, 0, [MixRecord(0, "a", mix), MixRecord(10, "b", mix)])
            with pytest.raises(DataError, match="out of order"):
                curriculum.append(MixRecord(second, "c", mix))
            assert curriculum.first_samples == (0, 10)

    def test_a_sample_that_no_record_governs(self):
        empty = Curriculum({"web": 5}, 0)
        for ask in (empty.locate, empty.consumed, lambda n: empty.locate_many(np.array([n]))):
            with pytest.raises(DataError, match="No record"):
                ask(1)
        empty.append(MixRecord(0, "a", {"web": "1"}))
        with pytest.raises(DataError, match="No record"):
            empty.locate(-1)
        with pytest.raises(DataError, match="No record"):
            empty.locate_many(np.array([3, -1]))

    def test_no_samples_are_no_error(self):
        curriculum = Curriculum({"web": 5}, 0)
        assert [len(column) for column in curriculum.locate_many(np.array([], np.int64))] == [0, 0, 0]
        assert curriculum.consumed(0) == {"web": 0}
