"""What the data order promises, tried on thousands of mixtures: complete, fair, and a function of `n` alone."""

from __future__ import annotations

import itertools
import tempfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_davinci.data.curriculum import Curriculum, Location
from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.errors import DataError
from tests.cases import cases
from tests.data.orders import Order, end, orders

SLIVER = Order(
    {"web": 40, "maths": 3, "code": 11},
    0,
    [MixRecord(0, "all", {"web": "0.9", "maths": "1e-6", "code": "0.099999"})],
)


def columns(curriculum: Curriculum, ns: np.ndarray) -> np.ndarray:
    """[3, n]: source, epoch and window."""
    return np.stack(curriculum.locate_many(ns))


class TestEachWindowComesOncePerEpochAndSource:
    @given(orders())
    @cases(250)
    def test_however_often_the_mixture_changes(self, order):
        curriculum = order.curriculum()
        source, epoch, window = columns(curriculum, np.arange(end(order)))
        for place, name in enumerate(curriculum.sources):
            size, here = order.windows[name], source == place
            # Epochs follow each other, and one begins when the one before is complete.
            assert np.array_equal(epoch[here], np.arange(here.sum()) // size)
            for number in range(0, int(here.sum()), size):
                seen = np.sort(window[here][number : number + size])
                assert seen[0] >= 0 and seen[-1] < size
                assert (np.diff(seen) > 0).all()

    @given(orders(most_records=6, most_sources=5), st.data())
    @cases(200)
    def test_asking_for_one_sample_is_asking_for_many(self, order, data):
        curriculum = order.curriculum()
        far = data.draw(st.integers(0, 50))
        ns = np.array(data.draw(st.lists(st.integers(0, 2**far + 500), min_size=1, max_size=30)))
        located = curriculum.locate_many(ns)
        for n, source, epoch, window in zip(ns.tolist(), *located):
            stage = [record.stage for record in order.records if record.first_sample <= n][-1]
            assert curriculum.locate(n) == Location(stage, curriculum.sources[source], epoch, window)
        assert all(column.dtype == np.int64 for column in located)


class TestShares:
    """Within max(sources, 32) samples of exact at every prefix, within twice that in every interval."""

    @given(orders())
    @example(SLIVER)
    @cases(250)
    def test_every_prefix_and_interval_of_the_samples_that_are_handed_out(self, order):
        count = len(order.names)
        source = order.curriculum().locate_many(np.arange(end(order))).source
        taken = np.cumsum(np.eye(count)[source], axis=0)
        firsts = [record.first_sample for record in order.records]
        share = np.array([[float(share) for share in order.shares(record)] for record in order.records])
        exact = np.cumsum(share[np.searchsorted(firsts, np.arange(end(order)), side="right") - 1], axis=0)
        error = np.concatenate([np.zeros((1, count)), taken - exact])
        bound = max(count, 32)
        assert abs(error).max() <= bound
        # An interval's error is the difference of two prefixes' errors.
        assert (error.max(axis=0) - error.min(axis=0)).max() <= 2 * bound

    @given(orders(most_records=20), st.integers(1, 10**8), st.lists(st.integers(0, 2**31 - 1), max_size=8))
    @cases(80)
    def test_prefixes_far_out(self, order, stretch, ns):
        # Segments of up to some billions of samples; shares without a common 32-bit denominator drift by at most
        # one sample in 2^31, which this bound holds as well.
        records = [
            MixRecord(record.first_sample * stretch, record.stage, record.weights) for record in order.records
        ]
        curriculum, bound = order.curriculum(records), max(len(order.names), 32)
        low, high = [Fraction(0)] * len(order.names), [Fraction(0)] * len(order.names)
        firsts = [record.first_sample for record in records if record.first_sample < 2**31]
        for n in sorted({*ns, *firsts, *(first + 1 for first in firsts)}):
            for place, (exact, had) in enumerate(
                zip(exact_counts(order, records, n), curriculum.consumed(n).values())
            ):
                low[place], high[place] = min(low[place], had - exact), max(high[place], had - exact)
        assert max(high) <= bound and min(low) >= -bound
        assert max(above - below for above, below in zip(high, low)) <= 2 * bound

    def test_a_millionth_beside_nine_tenths_is_not_floored_to_nothing(self):
        curriculum = SLIVER.curriculum()
        assert abs(curriculum.consumed(8_000_000)["maths"] - 8) <= 1
        assert abs(curriculum.consumed(2 * 10**9)["maths"] - 2000) <= 1
        handed_out = [curriculum.find("maths", epoch, 0) for epoch in range(600)]
        gaps = np.diff(sorted(handed_out))
        assert gaps.min() > 900_000 and gaps.max() < 5_100_000


def exact_counts(order: Order, records: list[MixRecord], n: int) -> list[Fraction]:
    counts = [Fraction(0)] * len(order.names)
    ends = [record.first_sample for record in records[1:]] + [n]
    for record, last in zip(records, ends, strict=True):
        length = max(0, min(n, last) - record.first_sample)
        counts = [had + length * share for had, share in zip(counts, order.shares(record), strict=True)]
    return counts


class TestConsumed:
    @given(orders(), st.data())
    @cases(250)
    def test_is_what_counting_finds(self, order, data):
        curriculum, length = order.curriculum(), end(order)
        taken = np.zeros((length + 1, len(order.names)), np.int64)
        np.cumsum(np.eye(len(order.names), dtype=np.int64)[curriculum.locate_many(np.arange(length)).source],
                  axis=0, out=taken[1:])  # fmt: skip
        asked = data.draw(st.lists(st.integers(0, length), max_size=10))
        for n in {*asked, *curriculum.first_samples, length}:
            assert curriculum.consumed(n) == dict(zip(curriculum.sources, taken[n].tolist(), strict=True))


class TestFind:
    @given(orders(most_records=12), st.data())
    @cases(300)
    def test_undoes_locate(self, order, data):
        curriculum = order.curriculum()
        far = data.draw(st.integers(0, 55))
        for n in data.draw(st.lists(st.integers(0, 2**far), min_size=1, max_size=10)):
            _, source, epoch, window = curriculum.locate(n)
            assert curriculum.find(source, epoch, window) == n

    @given(orders(most_records=12, largest_source=2**40, longest_segment=2**40), st.data())
    @cases(300)
    def test_is_undone_by_locate_or_says_that_the_mixture_moved_on(self, order, data):
        curriculum = order.curriculum()
        source = data.draw(st.sampled_from(order.names))
        epoch = data.draw(st.one_of(st.integers(0, 2), st.integers(0, 2**15)))
        window = data.draw(st.integers(0, order.windows[source] - 1))
        last = order.records[-1]
        try:
            n = curriculum.find(source, epoch, window)
        except DataError:
            assert last.weights.get(source, "0") == "0"
            # All of that source that will ever come ends before this epoch or in it.
            assert curriculum.consumed(last.first_sample)[source] < (epoch + 1) * order.windows[source]
        else:
            assert curriculum.locate(n)[1:] == (source, epoch, window)

    @given(orders(most_sources=6, largest_source=9))
    @cases(150)
    def test_finds_every_window_that_was_handed_out_and_no_other(self, order):
        curriculum, length = order.curriculum(), order.records[-1].first_sample
        handed_out = {}
        for n, (source, epoch, window) in enumerate(columns(curriculum, np.arange(length)).T.tolist()):
            handed_out[curriculum.sources[source], epoch, window] = n
        for source, count in curriculum.consumed(length).items():
            for epoch in range(count // order.windows[source] + 1):
                for window in range(order.windows[source]):
                    try:
                        found = curriculum.find(source, epoch, window)
                    except DataError:
                        assert (source, epoch, window) not in handed_out
                    else:
                        assert found == handed_out.get((source, epoch, window), found)
                        assert found >= length or (source, epoch, window) in handed_out


# Fewest and most ranks, workers, samples a batch and samples until the next restart.
LIMITS = (1, 4), (1, 3), (40, 150), (300, 1500)


class TestNothingElseDecides:
    @given(orders(most_sources=12, longest_segment=30), st.data())
    @cases(80)
    def test_ranks_workers_batches_restarts_and_the_length_of_a_run(self, order, data):
        """A run in pieces, with a journal on disk that each piece opens anew and extends as it gets there."""
        length = end(order)
        run, n = np.full((3, length), -1), 0
        with tempfile.TemporaryDirectory() as folder:
            while n < length:
                ranks, workers, batch, more = (data.draw(st.integers(*most)) for most in LIMITS)
                journal, stop = Journal.open(Path(folder) / "journal.jsonl", order.windows), n + more
                curriculum = order.curriculum(journal.mixes)
                pending = [record for record in order.records if record not in journal.mixes]
                while n < min(stop, length):
                    if pending and pending[0].first_sample == n:
                        journal.append(pending[0])
                        curriculum.append(pending.pop(0))
                    # A record takes effect at the boundary of a batch.
                    until = min([stop, length, n + batch, *(record.first_sample for record in pending[:1])])
                    for part in range(ranks * workers):
                        mine = np.arange(n, until)[part :: ranks * workers]
                        assert (run[:, mine] == -1).all()
                        run[:, mine] = columns(curriculum, mine)
                    n = until
        assert np.array_equal(run, columns(order.curriculum(), np.arange(length)))

    @given(orders(most_sources=12), st.lists(st.text("az .~", min_size=1), max_size=4), st.randoms())
    @cases(150)
    def test_the_order_of_the_sources_and_sources_that_are_not_mixed(self, order, more, random):
        names = [*order.windows, *more]
        random.shuffle(names)
        grown = Order({name: order.windows.get(name, 7) for name in names}, order.seed, order.records)
        one, other = order.curriculum(), grown.curriculum()
        located, again = (columns(c, np.arange(end(order))) for c in (one, other))
        assert np.array_equal(located[1:], again[1:])
        assert np.array_equal(np.array(one.sources)[located[0]], np.array(other.sources)[again[0]])

    @given(orders(), st.data())
    @cases(150)
    def test_records_that_come_later(self, order, data):
        keep = data.draw(st.integers(1, len(order.records)))
        earlier, whole = order.curriculum(order.records[:keep]), order.curriculum()
        until = order.records[keep].first_sample if keep < len(order.records) else end(order)
        ns = np.arange(until)
        assert np.array_equal(columns(earlier, ns), columns(whole, ns))

    @given(st.integers(-(2**64), 2**64), st.integers(-(2**64), 2**64), st.integers(0, 2**30))
    @cases(200)
    def test_the_seed_does_and_so_does_the_epoch(self, seed, other, epoch):
        assume(seed != other)
        # Two of the 60! orders are equal by chance less than once in 10^80.
        mix = [MixRecord(0, "all", {"web": "1"})]
        ns = np.arange(epoch * 60, (epoch + 2) * 60)
        a, b = (Curriculum({"web": 60}, s, mix).locate_many(ns).window.reshape(2, 60) for s in (seed, other))
        assert len({tuple(part) for part in (*a.tolist(), *b.tolist())}) == 4


@st.composite
def skips(draw: st.DrawFn, until: int) -> list[SkipRecord]:
    bounds = sorted(draw(st.sets(st.integers(0, until), max_size=16)))
    ranges = list(zip(bounds[::2], bounds[1::2]))
    # Some touch: what one leaves out ends where the next begins.
    touching = [(b, c) for (_, b), (c, _) in itertools.pairwise(ranges) if c - b < 9]
    return [SkipRecord(*span, "a spike") for span in draw(st.permutations(ranges + touching))]


NO_SKIP = SimpleNamespace(from_sample=0, to_sample=0)


class TestSkips:
    @given(orders(longest_segment=40), st.data())
    @cases(100)
    def test_leave_out_their_own_windows_and_move_no_other(self, order, data):
        length = end(order)
        left_out = data.draw(skips(until=length))
        records = [*left_out, *order.records]
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal.open(Path(folder) / "journal.jsonl")
            for record in records if data.draw(st.booleans()) else records[len(left_out) :] + left_out:
                journal.append(record)
            journal = Journal.open(Path(folder) / "journal.jsonl")
        handed_out, n = np.empty(0, np.int64), 0
        while n < length:
            handed_out = np.append(handed_out, journal.usable(n, data.draw(st.integers(100, 900))))
            n = int(handed_out[-1]) + 1
        handed_out = handed_out[handed_out < length]
        skipped = np.concatenate([np.arange(s.from_sample, s.to_sample) for s in (*left_out, NO_SKIP)])
        assert np.array_equal(np.sort(np.append(handed_out, skipped)), np.arange(length))
        # Whatever is not handed out is exactly what the skips hold, window for window, and nothing comes twice.
        before, after = order.curriculum(), order.curriculum(journal.mixes)
        seen, lost, every = (
            set(map(tuple, columns(curriculum, ns).T.tolist()))
            for curriculum, ns in ((after, handed_out), (before, skipped), (before, np.arange(length)))
        )
        assert seen | lost == every and len(seen) + len(lost) == len(every) == length
        assert before.consumed(length) == after.consumed(length)

    @given(skips(until=200), st.integers(0, 260), st.integers(0, 60))
    @cases(400)
    def test_are_walked_over_as_by_counting(self, left_out, first, count):
        journal = Journal.in_memory()
        for skip in left_out:
            journal.append(skip)
        free = [n for n in range(600) if not any(skip.from_sample <= n < skip.to_sample for skip in left_out)]
        assert journal.usable(first, count).tolist() == [n for n in free if n >= first][:count]
        assert journal.after_skips(first) == next(n for n in free if n >= first)
        assert journal.skipped_before(first) == first - sum(n < first for n in free)

    @given(skips(until=2**40), st.integers(0, 2**41), st.integers(1, 500), st.integers(1, 9))
    @cases(150)
    def test_cut_a_batch_in_pieces_that_join(self, left_out, first, count, pieces):
        journal = Journal.in_memory()
        for skip in left_out:
            journal.append(skip)
        whole, n = journal.usable(first, count * pieces), first
        for piece in whole.reshape(pieces, count):
            assert np.array_equal(journal.usable(n, count), piece)
            n = int(piece[-1]) + 1
        handed_out = n - journal.skipped_before(n) - (first - journal.skipped_before(first))
        assert handed_out == count * pieces


class TestItLooksRandom:
    """Chi-square statistics of fixed seeds, at a bound that an honest shuffle passes all but once in 10^5."""

    SIZE, CELLS, BOUND = 200_000, 20, 4.5

    def order(self, seed: int, epoch: int = 0) -> np.ndarray:
        """The windows of one source in the order in which a run of three sources sees them."""
        mix = [MixRecord(0, "all", {"web": "0.6", "code": "0.3", "maths": "0.1"})]
        curriculum = Curriculum({"web": self.SIZE, "code": 1000, "maths": 50}, seed, mix)
        ns = np.arange(int((epoch + 1) * self.SIZE / 0.6) + 10)
        located = curriculum.locate_many(ns)
        return located.window[(located.source == 2) & (located.epoch == epoch)]

    def deviation(self, x: np.ndarray, y: np.ndarray) -> float:
        """How far the joint counts of two series are from independence, in standard deviations."""
        bins = [np.linspace(0, self.SIZE, self.CELLS + 1)] * 2
        expected = len(x) / self.CELLS**2
        chi_square = ((np.histogram2d(x, y, bins)[0] - expected) ** 2).sum() / expected
        freedom = (self.CELLS - 1) ** 2
        return abs(chi_square - freedom) / np.sqrt(2 * freedom)

    def failures(self, order: np.ndarray) -> set[str]:
        """The checks that an order does not pass."""
        found = {
            "where blocks go": self.deviation(np.arange(self.SIZE), order),
            "what follows what": self.deviation(order[:-1], order[1:]),
            "what follows seven later": self.deviation(order[:-7], order[7:]),
        }
        for lag in (1, 2, 448, 1000):  # 448 = ceil(sqrt(SIZE)), where a network of too few rounds would show
            correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
            found[f"serial correlation at {lag}"] = abs(correlation) * np.sqrt(self.SIZE)
        return {name for name, sigmas in found.items() if sigmas > self.BOUND}

    @pytest.mark.parametrize("seed", [0, 1, 2**40])
    def test_within_an_epoch(self, seed):
        order = self.order(seed)
        assert np.array_equal(np.sort(order), np.arange(self.SIZE))
        assert self.failures(order) == set()

    def test_from_epoch_to_epoch_and_from_seed_to_seed(self):
        first = self.order(0)
        for other in (self.order(0, epoch=1), self.order(1)):
            assert self.deviation(first, other) < self.BOUND
            assert self.deviation(np.argsort(first), np.argsort(other)) < self.BOUND

    def test_orders_that_are_not_random_do_not_pass(self):
        numbers, generator = np.arange(self.SIZE), np.random.default_rng(0)
        honest = generator.permutation(self.SIZE)
        buffer = generator.permuted(numbers.reshape(-1, 1000), axis=1).ravel()
        bad = {
            "sequential": numbers,
            "backwards": numbers[::-1],
            "affine": (numbers * 123_457 + 99) % self.SIZE,
            "a shuffle buffer of 1,000": buffer,
            "two halves in turn": numbers.reshape(2, -1).T.ravel(),
        }
        assert self.failures(honest) == set()
        for name, order in bad.items():
            assert np.array_equal(np.sort(order), numbers)
            assert self.failures(order), name
        assert "where blocks go" in self.failures(buffer)
        assert "what follows what" in self.failures(bad["affine"])
        assert self.deviation(honest, (honest + 5) % self.SIZE) > self.BOUND
