"""A curriculum: its order for all time, its cost, the search for a window, and what it refuses.

What it promises of every mixture is in `test_order_properties.py`.
"""

from __future__ import annotations

import hashlib
import sys
from fractions import Fraction

import numpy as np
import pytest

from megatron_davinci.data.curriculum import Curriculum, Location
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.errors import DataError

GOLDEN: dict[str, list[str]] = {
    "one mixture": ["e9ff157c9303292a", "702fb3ea68e4120b", "1c890fea430b6b62", "bd6c2732baeacd00"],
    "three mixtures": ["83f5dbcc16f3ee5f", "aeccf528cc3c89ad", "17d8378f1ee4930d", "edbc14e946ff8507"],
    "shares that are rounded": [
        "756689412cd5f2bc",
        "6824019e71511b3b",
        "572f01b120628ec4",
        "7229b2190424fab5",
    ],
    "the quickstart": ["fb1b79bddee1d8bb", "be7a7ac96e53b2a4", "a7260c8052930238", "8c2fba351d493d69"],
    "very small and very large": [
        "46ac21945664c4f6",
        "4ed68749c9c9e753",
        "16012b5d6cc97bf2",
        "55e92bfdace0a67a",
    ],
}


class TestTheOrderIsFixedForAllTime:
    """Digests of the order as it was when it was released.

    If one of these changes, every training that is under way reads other windows than it said it would after its next
    restart, and no finished one can be replayed. Do not mend the digests: mend the code. An order that has to change
    changes in a major version, which goes on computing the old one for the journals that began with it.
    """

    def digest(self, curriculum: Curriculum, ns: np.ndarray) -> str:
        located = np.stack(curriculum.locate_many(ns))
        assert curriculum.locate(int(ns[-1])).window == located[2, -1]
        return hashlib.sha256(located.astype("<i8").tobytes()).hexdigest()[:16]

    def curriculum(self, case: str) -> Curriculum:
        names = [f"source {i}" for i in range(28)]
        parts = [1 + i * i * 37 % 1000 for i in range(28)]
        weights = dict(zip(names, (str(Fraction(part, sum(parts))) for part in parts)))
        turned = dict(zip(names, reversed(weights.values())))
        windows = dict(zip(names, (part * 1000 for part in parts)))
        fine = {name: f"0.0357142857{i:02}" for i, name in enumerate(names)}
        fine["source 0"] = str(1 - sum(Fraction(share) for share in list(fine.values())[1:]))
        mixes = {
            "one mixture": [MixRecord(0, "a", weights)],
            "three mixtures": [
                MixRecord(0, "a", weights),
                MixRecord(1000, "b", turned),
                MixRecord(99_999, "c", weights),
            ],
            "shares that are rounded": [MixRecord(0, "a", fine)],
            "the quickstart": [
                MixRecord(0, "1-1", {"general": "0.682", "code": "0.0953", "science": "0.2227", "qa": "0"}),
                MixRecord(
                    4688, "1-2", {"general": "0.5542", "code": "0.1166", "science": "0.3292", "qa": "0"}
                ),
                MixRecord(7040, "2-1", {"general": "0.1", "code": "0.3", "science": "0.3", "qa": "0.3"}),
            ],
            "very small and very large": [
                MixRecord(0, "x", {"a": "0.1", "b": "0.2", "c": "0.3", "d": "0.4"})
            ],
        }
        if case == "the quickstart":
            windows = {"general": 4000, "code": 500, "science": 900, "qa": 700}
        if case == "very small and very large":
            windows = {"d": 2**61, "c": 10**15, "b": 2, "a": 1}
        return Curriculum(windows, 2**64 + 7 if case == "three mixtures" else 1234, mixes[case])

    @pytest.mark.parametrize("case, digests", list(GOLDEN.items()))
    def test_it_is(self, case, digests):
        curriculum = self.curriculum(case)
        scattered = np.arange(5000) * (2**40 + 12_345) % 2**50
        spans = (np.arange(120_000), np.arange(5000) + 2 * 10**9, np.arange(5000) + 2**54, scattered)
        assert [self.digest(curriculum, ns) for ns in spans] == digests


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


class TestFind:
    curriculum = Curriculum(
        {"web": 10, "code": 4, "empty": 0},
        5,
        [MixRecord(0, "a", {"web": "1/2", "code": "1/2"}), MixRecord(20, "b", {"web": "1"})],
    )

    def test_says_which_sample_a_window_is(self):
        for n in range(100):
            _, source, epoch, window = self.curriculum.locate(n)
            assert self.curriculum.find(source, epoch, window) == n

    def test_a_window_that_the_mixture_leaves_behind_is_no_sample(self):
        # Ten samples of code before sample 20: two epochs and a half.
        late = [window for window in range(4) if self.left_behind(window)]
        assert len(late) == 2 and self.curriculum.consumed(20)["code"] == 10
        with pytest.raises(DataError, match=r"(?s)moved on.*10 samples of code before sample 20"):
            self.curriculum.find("code", 3, 0)

    def left_behind(self, window: int) -> bool:
        try:
            return self.curriculum.find("code", 2, window) >= 20
        except DataError:
            return True

    def test_it_comes_when_the_source_is_mixed_again(self):
        grown = Curriculum(self.curriculum.windows, 5, [
            MixRecord(0, "a", {"web": "1/2", "code": "1/2"}), MixRecord(20, "b", {"web": "1"}),
            MixRecord(10**12, "c", {"code": "1"}),
        ])  # fmt: skip
        n = grown.find("code", 3, 0)
        assert 10**12 <= n < 10**12 + 6
        assert grown.locate(n) == Location("c", "code", 3, 0)

    @pytest.mark.parametrize(
        "source, epoch, window, says",
        [
            ("law", 0, 0, r"(?s)no such source.*code, empty, web"),
            ("web", 0, 10, r"(?s)no such window.*window 10 of epoch 0.*0 to 9"),
            ("web", 0, -1, "no such window"),
            ("web", -1, 0, "no such window"),
            ("empty", 0, 0, "it is empty"),
        ],
    )
    def test_what_is_no_window_is_refused(self, source, epoch, window, says):
        with pytest.raises(DataError, match=says):
            self.curriculum.find(source, epoch, window)
        with pytest.raises(DataError, match="No record"):
            Curriculum({"web": 5}, 0).find("web", 0, 0)


def test_numbers_may_be_numpys():
    curriculum = Curriculum({"a": 5000, "b": 9000}, 1, [MixRecord(0, "1", {"a": "0.5", "b": "0.5"})])
    located = curriculum.locate_many(np.arange(40))
    for n in np.arange(40):
        source = curriculum.sources[located.source[n]]
        assert curriculum.locate(n) == ("1", source, located.epoch[n], located.window[n])
        assert curriculum.find(source, located.epoch[n], located.window[n]) == n
    assert curriculum.consumed(np.int32(40)) == {"a": 20, "b": 20}


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
