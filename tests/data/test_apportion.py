"""Shares: closed-form counts that add up, never fall, stay near exact, and agree with who takes which sample."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_davinci.data.apportion import (
    DEBT_BITS,
    MAX_DENOMINATOR,
    Apportionment,
    exact_weight,
    integer_weights,
)
from megatron_davinci.errors import DataError
from tests.cases import cases

weights = st.lists(
    st.one_of(
        st.sampled_from(["0", "1e-6", "0.9", "1"]),
        st.integers(0, 1000).map(lambda k: str(k / 1000)),
        st.fractions(0, 1, max_denominator=10**6).map(str),
    ),
    min_size=1,
    max_size=33,
).filter(lambda values: any(Fraction(value) for value in values))


def exact_shares(values: list[str]) -> np.ndarray:
    fractions = [Fraction(value) for value in values]
    return np.array([float(value / sum(fractions)) for value in fractions])


@given(values=weights, length=st.integers(0, 400))
@cases(80)
def test_who_takes_a_sample_agrees_with_the_counts_at_every_prefix(values, length):
    shares = Apportionment(values)
    sources, indices = shares.assign(np.arange(length))
    taken = np.zeros(len(values), np.int64)
    assert shares.counts(0).tolist() == taken.tolist()
    for m in range(length):
        assert (sources[m], indices[m]) == shares.assign_one(m)
        assert indices[m] == taken[sources[m]]
        taken[sources[m]] += 1
        assert np.array_equal(shares.counts(m + 1), taken)


@given(values=weights, m=st.integers(0, 2**61), steps=st.lists(st.integers(0, 2**40), max_size=5))
@cases(150)
def test_far_out_it_is_the_same(values, m, steps):
    # One by one uses whole numbers without bounds, all at once uses int64: they agree to the end of the range.
    shares = Apportionment(values)
    ms = m + np.cumsum([0, *steps])
    before = shares.counts(m)
    for later, source, index in zip(ms.tolist(), *shares.assign(ms)):
        counts = shares.counts(later)
        assert counts.sum() == later and (counts >= before).all()
        assert (source, index) == shares.assign_one(later)
        assert index == counts[source] and shares.counts(later + 1)[source] == index + 1
        before = counts


@given(
    values=weights,
    owed=st.integers(-(40 << DEBT_BITS), 40 << DEBT_BITS),
    bits=st.integers(0, 62),
    data=st.data(),
)
@cases(250)
def test_when_a_source_takes_its_sample_is_known_without_searching(values, owed, bits, data):
    # Up to the end of int64 from a sample to its source and index, and past it the other way.
    shares = Apportionment(values, [owed * (-1) ** i for i in range(len(values))])
    m = data.draw(st.integers((1 << bits) >> 1, 1 << bits))
    assert shares.when(*shares.assign_one(m)) == m
    source = data.draw(st.sampled_from([i for i, value in enumerate(values) if Fraction(value)]))
    assert shares.assign_one(shares.when(source, m)) == (source, m)


def test_a_source_without_weight_never_comes():
    shares = Apportionment(["0", "0.3", "0", "0.7", "0"], debts=[5 << DEBT_BITS, 0, -(5 << DEBT_BITS), 0, 0])
    assert shares.counts(10**9).tolist() == [0, 3 * 10**8, 0, 7 * 10**8, 0]
    assert set(shares.assign(np.arange(1000))[0].tolist()) == {1, 3}


def test_one_source_takes_all():
    shares = Apportionment(["1"])
    assert shares.assign_one(12345) == (0, 12345)
    assert shares.counts(2**40).tolist() == [2**40]


segment = st.tuples(weights, st.one_of(st.integers(1, 3), st.integers(1, 150)))


@given(
    sources=st.integers(1, 33),
    segments=st.lists(segment, min_size=1, max_size=50),
)
@example(sources=3, segments=[(["1e-6", "0.9", "0.099999"], 150)] * 50)
@cases(30)
def test_every_prefix_and_interval_is_near_its_exact_share_over_many_segments(sources, segments):
    taken, exact, debts, errors = np.zeros(sources), np.zeros(sources), [0] * sources, []
    for values, length in segments:
        values = (values * sources)[:sources]
        values = values if any(Fraction(value) for value in values) else ["1"] * sources
        shares = Apportionment(values, debts)
        taker = shares.assign(np.arange(length))[0]
        prefix = taken + np.cumsum(np.eye(sources)[taker], axis=0)
        target = exact + np.outer(np.arange(1, length + 1), exact_shares(values))
        errors.append(prefix - target)
        taken, exact, debts = prefix[-1], target[-1], shares.debts_after(length)
        assert np.allclose(np.array(debts) / 2**DEBT_BITS, exact - taken, atol=1e-4)
    history = np.concatenate([np.zeros((1, sources)), *errors])
    bound = max(sources, 32)
    assert abs(history).max() <= bound
    assert (history.max(axis=0) - history.min(axis=0)).max() <= 2 * bound


def test_a_millionth_beside_nine_tenths_gets_its_millionth():
    shares = Apportionment(["0.9", "1e-6", "0.099999"])
    for millions in (1, 10, 8_000_000):
        assert abs(int(shares.counts(millions * 10**6)[1]) - millions) <= 1


def test_debts_are_carried_where_errors_would_add_up():
    # Fifty segments of one sample each at 1/2: without debts the same source would take all of them.
    debts, taken, forgetful = [0, 0], np.zeros(2, int), np.zeros(2, int)
    for _ in range(50):
        shares = Apportionment(["0.5", "0.5"], debts)
        taken, debts = taken + shares.counts(1), shares.debts_after(1)
        forgetful = forgetful + Apportionment(["0.5", "0.5"]).counts(1)
    assert taken.tolist() == [25, 25]
    assert sorted(forgetful.tolist()) == [0, 50]


@pytest.mark.parametrize("low", ["0", "1e-6", "1e-3", "0.1"])
def test_mixtures_that_take_turns_do_not_drift_apart(low):
    # Each source is mixed in every second or third record only, a few samples at a time.
    rng = np.random.default_rng(3)
    for _ in range(4):
        mixtures = np.where(rng.random((3, 12)) < 0.5, "1", low)
        mixtures[:, 0] = "1"
        debts, drift = [0] * 12, np.zeros(12)
        for record in range(200):
            shares = Apportionment(mixtures[record % 3].tolist(), debts)
            debts = shares.debts_after(3)
            drift = np.maximum(drift, abs(np.array(debts) / 2**DEBT_BITS))
        assert drift.max() < 6


class TestWeights:
    def test_are_exact(self):
        assert exact_weight(0.1) == exact_weight("0.1") == Fraction(1, 10)
        assert integer_weights([Fraction(1, 3), Fraction(1, 2), Fraction(1, 6)]) == [2, 3, 1]
        assert integer_weights(map(exact_weight, ["0.25", 0.75])) == [1, 3]

    @given(st.lists(st.fractions(0, 1), min_size=1, max_size=40).filter(any))
    @cases(60)
    def test_fit_and_stay_in_proportion(self, fractions):
        whole = integer_weights(fractions)
        total = sum(fractions)
        assert sum(whole) <= MAX_DENOMINATOR
        assert [n > 0 for n in whole] == [f > 0 for f in fractions]
        error = max(abs(Fraction(n, sum(whole)) - f / total) for n, f in zip(whole, fractions))
        assert error <= Fraction(len(whole), MAX_DENOMINATOR)

    def test_that_are_too_fine_are_rounded_and_never_to_zero(self):
        whole = integer_weights([Fraction(1, 10**30), Fraction(1), Fraction(1, 10**30)])
        assert whole == [1, MAX_DENOMINATOR - 2, 1]

    @pytest.mark.parametrize("bad", ["a lot", "", "nan", "1/0", float("inf"), -0.1, "-1"])
    def test_that_are_none_are_refused(self, bad):
        with pytest.raises(DataError):
            exact_weight(bad)

    def test_that_are_all_zero_are_refused(self):
        with pytest.raises(DataError, match="All mixture weights are zero"):
            Apportionment(["0", "0"])
