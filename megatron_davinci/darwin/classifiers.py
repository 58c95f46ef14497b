"""Classifiers as plug-ins: what selection asks of one, where they are found, and how one is trained and judged.

A classifier is a folder with `classifier.json`, whose `kind` says who reads it: `linear` and `embedding` are ours,
any other is looked up among the entry points of the group `megatron_davinci.classifiers`, as
`kind = package.module:loader`. A loader takes the folder and its description, and returns a `Classifier`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin import embedding, linear
from megatron_davinci.errors import DataError

GROUP = "megatron_davinci.classifiers"


class Classifier(Protocol):
    """What selection asks.

    Attributes:
        labels: In the order of the probabilities.
        name: What a document's history calls it, with its version.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the probabilities."""

    @property
    def name(self) -> str:
        """With the version."""

    def probabilities(self, text: str) -> NDArray[np.float64]:
        """The probability of each label, float64 [labels]."""


def load(folder: Path) -> Classifier:
    """Open a classifier.

    Raises:
        DataError: It is missing or damaged, or nobody reads its kind.
    """
    described = linear.read_json(folder / "classifier.json")
    kind = described.get("kind")
    if kind == "linear":
        return linear.LinearClassifier.load(folder, described)
    if kind == embedding.KIND:
        return embedding.EmbeddingClassifier.load(folder, described)
    found = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in found:
        raise DataError(
            "Nobody reads this kind of classifier.",
            where=folder / "classifier.json",
            found=kind,
            expected=", ".join(["linear", embedding.KIND, *sorted(found)]),
            do=f"install the package that reads it, which has an entry point {kind!r} in the group {GROUP!r}",
        )
    loader: Callable[[Path, dict[str, Any]], Classifier] = found[str(kind)].load()
    return loader(folder, described)


def split(texts: Sequence[str], held_out: float) -> tuple[list[int], list[int]]:
    """Training and held-out places, by each text's hash: one text, given twice, is on one side."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, text in enumerate(texts):
        digest = hashlib.blake2b(
            " ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        sides[int.from_bytes(digest, "little") < held_out * 2**64].append(place)
    return sides


Trained = linear.LinearClassifier | embedding.EmbeddingClassifier


def train_and_judge(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    held_out: float = 0.2,
    train: Callable[..., Trained] = linear.train,
    **options: Any,
) -> Trained:
    """Train on a part, judge on the rest beside what length alone tells; the facts are the classifier's.

    Args:
        texts: The texts.
        labels: Of each.
        held_out: The share that is kept for judging.
        train: `linear.train` or `embedding.train`.
        options: Of it.

    Raises:
        DataError: There are not two labels, or a label has too few texts to be on both sides.
    """
    train_on, judge_on = split(texts, held_out)
    for name, side in (("to train on", train_on), ("held out", judge_on)):
        found = {labels[place] for place in side}
        missing = sorted(set(labels) - found)
        if missing or len(found) < 2:
            raise DataError(
                "A classifier needs texts of two labels at least, on both sides.",
                found=f"no text {name} of {', '.join(missing)}" if missing else f"only {', '.join(found)}",
                expected="some dozens of each label",
                do="give more labelled texts, or another --held-out",
            )
    known, told = [texts[place] for place in train_on], [labels[place] for place in train_on]
    asked, true = [texts[place] for place in judge_on], [labels[place] for place in judge_on]
    made = train(known, told, **options)
    probabilities = np.stack([made.probabilities(text) for text in asked])
    guesses = [made.labels[place] for place in probabilities.argmax(axis=1)]
    by_length, length_scores = linear.length_heuristic(known, told, asked)
    facts: dict[str, Any] = {
        "texts": {name: {"trained": told.count(name), "held_out": true.count(name)} for name in made.labels},
        "held_out_accuracy": linear.accuracy(guesses, true),
        "length_accuracy": linear.accuracy(by_length, true),
        "held_out_auc": {},
        "length_auc": {},
        "options": {
            "held_out": held_out,
            **{
                key: str(value) if isinstance(value, Path) else value
                for key, value in options.items()
                if key != "progress"
            },
        },
    }
    for place, name in enumerate(made.labels):
        positive = [label == name for label in true]
        others = [[score for other, score in scores.items() if other != name] for scores in length_scores]
        lengths = [scores[name] - max(rest) for scores, rest in zip(length_scores, others, strict=True)]
        facts["held_out_auc"][name] = linear.area_under_curve(probabilities[:, place], positive)
        facts["length_auc"][name] = linear.area_under_curve(lengths, positive)
    return replace(made, facts=facts)
