"""A linear classifier of texts: hashed words and pairs of words, softmax regression; fastText's recipe, in numpy.

Words are case folded, without marks; an underscore counts as a letter, as in code. Each word and each pair of
neighbours is hashed into one of `2**bits` features; counts are damped by a square root and scaled to length 1, so
that long texts weigh no more than short ones. Weights are fitted by AdaGrad (Duchi, Hazan and Singer 2011) on the
logarithmic loss, with a small L2 penalty, in an order that the seed draws: the same data and seed give the same
weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin.sketches import save
from megatron_davinci.darwin.words import rolling, word_hashes
from megatron_davinci.errors import DataError
from megatron_davinci.files import disk_errors, file_digest, write_json

Floats = NDArray[np.float64]
_BATCH = 64
# Not those of `words`: another pattern would be other features, and weights that are saved know of these.
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Features(NamedTuple):
    """Features of one text.

    Attributes:
        places: Which features it has, int64 [f], increasing.
        values: How much of each, float64 [f]; their squares sum to 1.
    """

    places: NDArray[np.int64]
    values: Floats


def features(text: str, bits: int, characters: int) -> Features:
    """The hashed words and pairs of the first `characters` of a text."""
    hashes = word_hashes(_WORD.findall(text[:characters].casefold()))
    # The two kinds are mixed differently, so that a word and a pair do not meet by construction.
    runs = np.concatenate([hashes * _MIX, rolling(hashes, 2)]) >> np.uint64(64 - bits)
    places, counts = np.unique(runs.astype(np.int64), return_counts=True)
    values = np.sqrt(counts.astype(np.float64))
    return Features(places, values / max(1e-12, float(np.linalg.norm(values))))


def softmax(logits: Floats) -> Floats:
    """Probabilities of labels, float64 [labels]."""
    odds = np.exp(logits - logits.max())
    return np.asarray(odds / odds.sum(), dtype=np.float64)


@dataclass(frozen=True)
class LinearClassifier:
    """A trained classifier.

    Attributes:
        labels: Its labels, in the order of its probabilities.
        weights: float32 [labels, 2**bits].
        bias: float64 [labels].
        bits: Of a feature's number.
        characters: Of a text that are looked at.
        facts: What it was trained on, and how well it did on held-out data.
        name: `linear`, and the digest of its weights.
    """

    labels: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: Floats
    bits: int
    characters: int
    facts: dict[str, Any]
    name: str = "linear"

    def probabilities(self, text: str) -> Floats:
        """The probability of each label, float64 [labels]."""
        return self._of(features(text, self.bits, self.characters))

    def _of(self, found: Features) -> Floats:
        logits = self.weights[:, found.places].astype(np.float64) @ found.values + self.bias
        return softmax(logits)

    def save(self, folder: Path) -> None:
        """Write the weights, then `classifier.json`, which makes the folder one.

        Raises:
            EnvironmentProblem: The disk refused.
        """
        with disk_errors(folder, "making a classifier's folder"):
            folder.mkdir(parents=True, exist_ok=True)
        save(folder / "linear", weights=self.weights, bias=self.bias)
        digests = {name: file_digest(folder / name) for name in _FILES}
        content = {"kind": "linear", "labels": self.labels, "bits": self.bits, "characters": self.characters}
        write_json(folder / "classifier.json", content | {"sha256": digests, "trained": self.facts})

    @classmethod
    def load(cls, folder: Path, described: dict[str, Any]) -> LinearClassifier:
        """Open a classifier.

        Args:
            folder: Where it lies.
            described: Its `classifier.json`.

        Raises:
            DataError: A file is missing or damaged.
        """
        for name in _FILES:
            path = folder / name
            if not path.exists() or file_digest(path) != described["sha256"][name]:
                raise DataError(
                    "A classifier's file is missing or damaged.",
                    where=path,
                    do="train it again, or copy it again",
                )
        weights, bias = (np.load(folder / name, allow_pickle=False) for name in _FILES)
        digest = described["sha256"][_FILES[0]][:12]
        return cls(
            tuple(described["labels"]), weights, bias, described["bits"], described["characters"],
            described["trained"], f"linear {digest}",
        )  # fmt: skip


_FILES = ("linear.weights.npy", "linear.bias.npy")


def train(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    bits: int = 18,
    epochs: int = 10,
    characters: int = 20_000,
    learning_rate: float = 0.5,
    penalty: float = 1e-6,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> LinearClassifier:
    """Fit a classifier.

    Args:
        texts: At least one of each label.
        labels: Of each text.
        bits: Features are `2**bits`.
        epochs: Passes over the texts.
        characters: Of a text that are looked at.
        learning_rate: Of AdaGrad.
        penalty: Of the squared weights.
        seed: Draws the order.
        progress: Is told how many epochs of all are done.

    Returns:
        The classifier, without facts.
    """
    names = tuple(sorted(set(labels)))
    rows = [features(text, bits, characters) for text in texts]
    wanted = np.array([names.index(label) for label in labels])
    # Each label counts alike, however many texts it has.
    weight = len(labels) / (len(names) * np.bincount(wanted, minlength=len(names)).astype(np.float64))
    weights = np.zeros((len(names), 1 << bits))
    bias = np.zeros(len(names))
    squares, bias_squares = np.full_like(weights, 1e-8), np.full_like(bias, 1e-8)
    draw = np.random.Generator(np.random.Philox(seed))
    for epoch in range(epochs):
        order = draw.permutation(len(rows))
        for begin in range(0, len(order), _BATCH):
            chosen = order[begin : begin + _BATCH]
            places = np.concatenate([rows[row].places for row in chosen])
            values = np.concatenate([rows[row].values for row in chosen])
            owner = np.repeat(np.arange(len(chosen)), [len(rows[row].places) for row in chosen])
            logits = np.stack(
                [np.bincount(owner, weights[k, places] * values, len(chosen)) for k in range(len(names))], 1
            )
            odds = np.exp(logits + bias - (logits + bias).max(axis=1, keepdims=True))
            error = odds / odds.sum(axis=1, keepdims=True)
            error[np.arange(len(chosen)), wanted[chosen]] -= 1
            error *= weight[wanted[chosen], None] / len(chosen)
            touched, at = np.unique(places, return_inverse=True)
            for k in range(len(names)):
                slope = (
                    np.bincount(at, error[owner, k] * values, len(touched)) + penalty * weights[k, touched]
                )
                squares[k, touched] += slope**2
                weights[k, touched] -= learning_rate * slope / np.sqrt(squares[k, touched])
            slope = error.sum(axis=0)
            bias_squares += slope**2
            bias -= learning_rate * slope / np.sqrt(bias_squares)
        progress(epoch + 1, epochs)
    return LinearClassifier(names, weights.astype(np.float32), bias, bits, characters, {})


def accuracy(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """The mean over labels of the share of its texts that were told: 1 / labels by chance, however many of each."""
    names = sorted(set(labels))
    shares = [
        np.mean([guess == name for guess, label in zip(predicted, labels, strict=True) if label == name])
        for name in names
    ]
    return float(np.mean(shares))


def area_under_curve(scores: Sequence[float] | Floats, positive: Sequence[bool]) -> float:
    """The probability that a positive scores above a negative, ties counting half; NaN without both."""
    values, yes = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if yes.all() or not yes.any():
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]
    n = int(yes.sum())
    return float((ranks[yes].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))


def length_heuristic(
    texts: Sequence[str], labels: Sequence[str], asked: Sequence[str]
) -> tuple[list[str], list[dict[str, float]]]:
    """What length alone tells: a normal distribution of its logarithm for each label.

    Returns:
        For each text that was asked, the likeliest label, and the log-likelihood of each.
    """
    sizes = np.log1p([len(text) for text in texts])
    fitted = {}
    for name in sorted(set(labels)):
        own = sizes[[label == name for label in labels]]
        fitted[name] = (float(own.mean()), max(0.05, float(own.std())))
    told, all_scores = [], []
    for text in asked:
        size = float(np.log1p(len(text)))
        scores = {
            name: -(((size - mean) / deviation) ** 2) / 2 - float(np.log(deviation))
            for name, (mean, deviation) in fitted.items()
        }
        told.append(max(scores, key=lambda name: scores[name]))
        all_scores.append(scores)
    return told, all_scores


def read_json(path: Path) -> dict[str, Any]:
    """A classifier's description.

    Raises:
        DataError: There is none, or it is no JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "There is no classifier.", where=path, do="train one by `davinci data train-classifier`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError("A classifier's description is damaged.", where=path, found=error) from error
    return content
