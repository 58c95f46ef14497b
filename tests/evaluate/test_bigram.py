"""The Kneser-Ney bigram: a distribution, equal to the formulas, as good as the data allow."""

from __future__ import annotations

import math
import re
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.errors import DataError
from megatron_davinci.evaluate import bigram
from megatron_davinci.evaluate.bigram import BigramKneserNey, estimate_discounts

VOCAB = 7
corpora = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60).map(lambda ids: np.array(ids, np.uint16)),
    min_size=1,
    max_size=8,
)


def slow_prob(windows: list[np.ndarray], vocab: int, v: int, w: int) -> float:
    """The module's formulas, word for word, over dictionaries."""
    count: Counter[tuple[int, int]] = Counter()
    for window in windows:
        count.update(zip(window[:-1].tolist(), window[1:].tolist()))
    continuation = Counter(following for _, following in count)

    def discounts(counts: list[int]) -> list[float]:
        n = Counter(counts)
        y = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
        if not all(n[k] for k in (1, 2, 3, 4)):
            return [0, y, y, y]
        d = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return d if min(d[1:]) > 0 else [0, y, y, y]

    lower_d = discounts(list(continuation.values()))
    k_sum = sum(continuation.values())
    freed = sum(lower_d[min(k, 3)] for k in continuation.values())
    k = continuation[w]
    lower = (k - lower_d[min(k, 3)]) / k_sum + freed / k_sum / vocab

    d = discounts(list(count.values()))
    row = {following: c for (previous, following), c in count.items() if previous == v}
    if not row:
        return lower
    total = sum(row.values())
    c = row.get(w, 0)
    return (c - d[min(c, 3)]) / total + sum(d[min(c, 3)] for c in row.values()) / total * lower


@given(corpora)
@settings(max_examples=40, deadline=None)
def test_it_is_a_distribution_in_every_context_also_in_unseen_ones(windows: list[np.ndarray]) -> None:
    model = BigramKneserNey.fit(windows, VOCAB)
    table = model.prob(np.arange(VOCAB)[:, None], np.arange(VOCAB)[None, :])
    assert (table > 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-12)


@given(corpora)
@settings(max_examples=40, deadline=None)
def test_it_equals_the_formulas_over_dictionaries(windows: list[np.ndarray]) -> None:
    model = BigramKneserNey.fit(windows, VOCAB)
    for v in range(VOCAB):
        for w in range(VOCAB):
            expected = math.log(slow_prob(windows, VOCAB, v, w))
            assert model.log_prob(np.array(v), np.array(w)) == pytest.approx(expected, rel=1e-12)


def test_both_kinds_of_discount_occur_in_the_comparison_above() -> None:
    rng = np.random.default_rng(0)
    rich = rng.zipf(1.3, 4000) % 40
    assert len(set(estimate_discounts(np.unique(rich, return_counts=True)[1]))) == 1  # too few types
    model = BigramKneserNey.fit([rich], 40)
    assert len(set(model.discounts)) == 3
    for v, w in [(1, 1), (1, 39), (39, 1), (38, 39)]:
        assert float(model.prob(np.array(v), np.array(w))) == pytest.approx(
            slow_prob([rich], 40, v, w), rel=1e-12
        )


def test_the_discounts_are_those_of_chen_and_goodman() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 10, 5])
    y = 100 / 180
    assert estimate_discounts(counts) == pytest.approx((y, 2 - 3 * y * 20 / 40, 3 - 4 * y * 10 / 20))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 1, 2], 2 / 4),
        ([1, 1], 0.5),
        ([2, 2, 3], 0.5),
        ([7], 0.5),
        ([1] + [2] * 2 + [3] * 50 + [4], 1 / 5),
    ],
)
def test_with_too_little_data_one_positive_discount_stands_for_three(
    counts: list[int], expected: float
) -> None:
    assert estimate_discounts(np.array(counts)) == pytest.approx((expected,) * 3)


def markov(rng: np.random.Generator, table: np.ndarray, tokens: int, rows: int) -> np.ndarray:
    """`rows` independent chains of `tokens` steps, int64 `[rows, tokens]`."""
    cumulative = np.cumsum(table, axis=1)
    out = np.empty((rows, tokens), np.int64)
    out[:, 0] = rng.integers(len(table), size=rows)
    for t in range(1, tokens):
        out[:, t] = (
            (rng.random(rows)[:, None] > cumulative[out[:, t - 1]]).sum(axis=1).clip(max=len(table) - 1)
        )
    return out


def test_on_markov_data_it_comes_near_the_entropy_and_beats_the_unigram() -> None:
    rng = np.random.default_rng(1)
    size = 30
    table = rng.dirichlet(np.full(size, 0.1), size)
    train, test = markov(rng, table, 200, 2000), markov(rng, table, 200, 400)
    model = BigramKneserNey.fit(train, size)
    loss = model.loss(test)
    entropy_on_test = float(-np.log(table[test[:, :-1], test[:, 1:]]).mean())
    frequency = np.bincount(train[:, 1:].ravel(), minlength=size) / train[:, 1:].size
    unigram_loss = float(-np.log(frequency[test[:, 1:]]).mean())
    assert entropy_on_test <= loss < entropy_on_test + 0.01
    assert loss < unigram_loss - 0.5


def test_on_english_three_discounts_are_better_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics))[:200_000])
    number = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(999), start=1)}
    ids = np.array([number.get(word, 0) for word in words])
    train, test = ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    model = BigramKneserNey.fit([train], 1000)
    single = model.discounts[0]
    monkeypatch.setattr(bigram, "estimate_discounts", lambda counts: (single,) * 3)
    assert model.loss([test]) < BigramKneserNey.fit([train], 1000).loss([test])


def test_nothing_is_counted_across_windows_and_windows_may_come_as_a_stream() -> None:
    windows = [np.array([0, 1, 2]), np.array([3, 4])]
    model = BigramKneserNey.fit(iter(windows), 5)
    assert model.bigrams.tolist() == [0 * 5 + 1, 1 * 5 + 2, 3 * 5 + 4]
    assert model.tokens == 3
    assert model.loss(iter(windows)) == pytest.approx(
        -np.mean(model.log_prob(np.array([0, 1, 3]), np.array([1, 2, 4])))
    )


def test_counting_in_many_small_merges_gives_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = list(np.random.default_rng(3).integers(0, 20, (50, 17)))
    whole = BigramKneserNey.fit(windows, 20)
    monkeypatch.setattr(bigram, "PENDING_KEYS", 40)
    pieces = BigramKneserNey.fit(windows, 20)
    np.testing.assert_array_equal(pieces.bigrams, whole.bigrams)
    np.testing.assert_array_equal(pieces.discounted, whole.discounted)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (np.array([0, 9]), "outside the vocabulary"),
        (np.array([-1, 0]), "outside the vocabulary"),
        (np.array([0.0, 1.0]), "not one row of token ids"),
        (np.array([[0, 1], [1, 0]]), "not one row of token ids"),
        (np.array([0]), "not one row of token ids"),
    ],
)
def test_bad_windows_are_named(window: np.ndarray, message: str) -> None:
    good = np.array([0, 1, 2])
    with pytest.raises(DataError, match=message) as caught:
        BigramKneserNey.fit([good, window], 5)
    assert caught.value.where == "window 1"
    with pytest.raises(DataError, match=message):
        BigramKneserNey.fit([good], 5).loss([window])


def test_no_windows_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to count"):
        BigramKneserNey.fit([], 5)
    with pytest.raises(DataError, match="nothing to score"):
        BigramKneserNey.fit([np.array([0, 1])], 5).loss([])
