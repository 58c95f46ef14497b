"""Scores of seen texts against what is computed by hand, in float64, token by token."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.evaluate.contamination import (
    Frequencies,
    auroc,
    dc_pdd,
    min_k,
    scores_of,
    true_positives,
)
from megatron_davinci.evaluate.overlap import _hits, overlap


def distribution(generator: np.random.Generator, places: int, vocabulary: int) -> np.ndarray:
    """Log-probabilities of every token at every place."""
    logits = generator.normal(0, 3, (places, vocabulary))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def by_hand(tokens: list[int], logs: np.ndarray, counts: list[int], share: float) -> dict[str, float]:
    """The three scores as their papers write them, in plain loops."""
    own, plus, parts, met = [], [], [], set()
    total, vocabulary = sum(counts), len(counts)
    for place, token in enumerate(tokens[1:]):
        row = [float(value) for value in logs[place]]
        mu = sum(math.exp(value) * value for value in row)
        variance = sum(math.exp(value) * (value - mu) ** 2 for value in row)
        own.append(row[token])
        plus.append((row[token] - mu) / math.sqrt(variance))
        if token not in met:
            met.add(token)
            frequency = (counts[token] + 1) / (total + vocabulary)
            parts.append(min(math.exp(row[token]) * math.log(1 / frequency), 0.01))
    kept = max(1, int(len(own) * share))
    return {
        "min_k": sum(sorted(own)[:kept]) / kept,
        "min_k_plus": sum(sorted(plus)[:kept]) / kept,
        "dc_pdd": sum(parts) / len(parts),
        "loss": -sum(own) / len(own),
    }


@given(st.integers(0, 1000), st.integers(2, 30), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_scores_are_those_of_the_papers(seed, length, share):
    generator = np.random.default_rng(seed)
    vocabulary = 12
    tokens = generator.integers(0, vocabulary, length).tolist()
    logs = distribution(generator, length - 1, vocabulary)
    counts = generator.integers(0, 50, vocabulary).tolist()
    p = np.exp(logs)
    mean = (p * logs).sum(1)
    spread = np.sqrt((p * (logs - mean[:, None]) ** 2).sum(1))
    moments = np.stack([logs[np.arange(length - 1), tokens[1:]], mean, spread], 1)
    found = scores_of(tokens, moments, Frequencies(counts), share=share).record()
    assert found == pytest.approx(by_hand(tokens, logs, counts, share), abs=1e-9)


def test_frequencies_are_those_of_the_windows_and_never_zero():
    reference = Frequencies.of([np.array([1, 1, 2]), np.array([0])], 4)
    np.testing.assert_allclose(reference.of_tokens(np.array([1, 3])), [3 / 8, 1 / 8])


def test_only_the_first_of_equal_tokens_counts_and_none_adds_more_than_the_ceiling():
    reference = Frequencies([0, 0, 0])
    log = np.log([0.5, 0.001, 0.001])
    assert dc_pdd([9, 1, 1, 2], log, reference) == pytest.approx((0.01 + 0.001 * math.log(3)) / 2)


def test_a_text_that_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="cannot be scored"):
        scores_of([1], np.empty((0, 3)))
    with pytest.raises(DataError, match="not numbers"):
        scores_of([1, 2], np.array([[math.nan, 0.0, 1.0]]))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=1, max_size=20)
)
def test_auroc_is_the_share_of_pairs_in_order(seen, unseen):
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in seen for b in unseen]
    assert auroc(seen, unseen) == pytest.approx(sum(pairs) / len(pairs))


def test_true_positives_are_counted_above_what_few_unseen_texts_exceed():
    assert true_positives([5.0, 10.5, 30.0], np.arange(20.0), 0.05) == pytest.approx(1 / 3)
    assert min_k([3.0, 1.0, 2.0], 0.01) == 1.0


def test_runs_of_training_samples_are_found_and_the_samples_named():
    generator = np.random.default_rng(0)
    samples = [(number, generator.integers(0, 50, 65)) for number in range(40)]
    planted = samples[7][1][20:50].tolist()
    half = [*samples[12][1][:20].tolist(), *generator.integers(50, 60, 20).tolist()]
    unseen = generator.integers(50, 60, 30).tolist()
    samples.append((90, np.concatenate([np.full(10, 3), planted])))
    found = overlap([planted, half, unseen, planted[:5]], samples, 13)
    assert found[0].share == 1.0
    assert found[0].samples == [7, 90]
    assert found[0].times == 2
    assert found[1].share == pytest.approx(8 / 28)
    assert found[1].samples == [12]
    assert found[2].share == 0.0
    assert found[2].samples == []
    assert math.isnan(found[3].share)


def test_hashes_are_looked_up_without_a_walk_over_all_texts(monkeypatch):
    """Of a million runs to look for, a walk over all of them for each sample would take a second."""
    known = np.array([3, 7, 2**63 + 1], np.uint64)
    values = np.array([0, 3, 5, 7, 2**63 + 1, 2**64 - 1], np.uint64)
    assert _hits(values, known).tolist() == [1, 3, 4]
    assert _hits(values, known[:0]).tolist() == [] and _hits(values[:0], known).tolist() == []
    monkeypatch.delattr(np, "isin")
    assert overlap([[1, 2, 3]], [(0, np.array([0, 1, 2, 3]))], 3)[0].samples == [0]


def test_a_run_has_a_length():
    with pytest.raises(ConfigError, match="one token at least"):
        overlap([[1]], [], 0)


def test_texts_that_are_not_there_are_refused_by_name(tmp_path):
    from megatron_davinci.cli.eval_plan import given_texts

    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no texts") as refused:
        given_texts([f"a={tmp_path / 'none.jsonl'}"], 9)
    assert "none.jsonl" in str(refused.value)
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="two files"):
        given_texts([f"a={tmp_path / 'one.jsonl'}"] * 2, 9)


def test_samples_that_a_checkpoint_was_not_trained_on_are_refused(monkeypatch):
    from megatron_davinci.cli import eval_contamination

    monkeypatch.setattr(eval_contamination, "_forecast", lambda found: None)
    found = SimpleNamespace(checkpoint=SimpleNamespace(consumed_samples=100))
    for span in ("100:200", "9:9", "9:3"):
        with pytest.raises(ConfigError, match="no such samples"):
            next(eval_contamination._samples(found, span))


def test_a_text_without_tokens_is_named(tmp_path):
    from megatron_davinci.cli import eval_contamination

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    asked = SimpleNamespace(texts=[f"a={tmp_path / 'a.jsonl'}"], limit=None, samples=None)
    tokenizer = SimpleNamespace(encode_batch=lambda texts: [list(text) for text in texts])
    with pytest.raises(DataError, match="record 2"):
        eval_contamination.contamination(asked, None, None, tokenizer, 8, None)
