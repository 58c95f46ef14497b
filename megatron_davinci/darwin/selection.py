"""Level 3: selection by light models. Documents go or stay; no text is touched, which is checked by hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from pydantic import Field, model_validator

from megatron_davinci.darwin import classifiers
from megatron_davinci.darwin.linear import read_json
from megatron_davinci.darwin.sketches import Arrays, save_sketch
from megatron_davinci.darwin.step import GlobalStep, Outcome, Step, StepParameters, Verdict
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import file_digest


class _Asking(Step):
    """Asks a classifier."""

    def files(self) -> dict[str, Any]:
        """The classifier's digest in place of its path; its description has the digests of its other files."""
        folder: Path = self.parameters.classifier  # type: ignore[attr-defined]
        return {"classifier": [folder.name, file_digest(folder / "classifier.json")]}

    def find_model(self) -> str:
        """The classifier's name."""
        return classifiers.load(self.parameters.classifier).name  # type: ignore[attr-defined]

    def check(self) -> None:
        """Open the classifier, and look for the labels that the parameters name.

        Raises:
            DataError: It is missing or damaged.
            ConfigError: It has no such label.
        """
        folder: Path = self.parameters.classifier  # type: ignore[attr-defined]
        described = read_json(folder / "classifier.json")
        labels = classifiers.load(folder).labels
        for label in self.labels():
            if label not in labels:
                raise ConfigError(
                    "A classifier has no such label.",
                    where=folder,
                    found=label,
                    expected=", ".join(described.get("labels", labels)),
                )

    def labels(self) -> list[str]:
        """Labels that the parameters name."""
        raise NotImplementedError

    def open(self) -> None:
        """Load the classifier."""
        self._classifier = classifiers.load(self.parameters.classifier)  # type: ignore[attr-defined]


class Classify(_Asking):
    """What a classifier says of a document, and whether it stays."""

    name = "classify"
    level = 3
    about = "label and score of a classifier (`davinci data train-classifier`, or a plug-in), and who stays by them"

    class Parameters(StepParameters):
        """Parameters of `classify`.

        Attributes:
            classifier: Folder of the classifier.
            field: What the label is called in the record: `quality`, `domain`, `document_type`.
            keep: Labels that stay; None for all.
            score: The label whose probability is the document's score; None for no score.
            min_score: Least score that stays.
        """

        classifier: Path
        field: str = Field(default="label", pattern="^[a-z][a-z0-9_]*$")
        keep: list[str] | None = None
        score: str | None = None
        min_score: float | None = Field(default=None, ge=0, le=1)

        @model_validator(mode="after")
        def _a_least_score_needs_a_score(self) -> Classify.Parameters:
            if self.min_score is not None and self.score is None:
                raise ValueError("min_score needs `score`, the label whose probability it bounds")
            return self

    parameters: Parameters

    def labels(self) -> list[str]:
        """Labels that the parameters name."""
        chosen = self.parameters
        return [*(chosen.keep or []), *([chosen.score] if chosen.score else [])]

    def apply(self, document: Document) -> Outcome:
        """Ask, note, compare."""
        chosen, labels = self.parameters, self._classifier.labels
        probabilities = self._classifier.probabilities(document.text)
        if not np.isfinite(probabilities).all():
            # No label is likelier than NaN, and no score is below a bound: it would stay.
            return Outcome(quarantine="no_score", notes={"probabilities": [str(p) for p in probabilities]})
        label = labels[int(probabilities.argmax())]
        document.metadata.setdefault("labels", {})[chosen.field] = label
        scores, drop = {}, None
        if chosen.score is not None:
            score = round(float(probabilities[labels.index(chosen.score)]), 4)
            scores[chosen.field] = score
            if chosen.min_score is not None and score < chosen.min_score:
                drop = f"low_{chosen.field}"
        if chosen.keep is not None and label not in chosen.keep:
            drop = f"other_{chosen.field}"
        return Outcome(drop=drop, scores=scores or None, notes={chosen.field: label})


class SelectTop(_Asking, GlobalStep):
    """The best share of the documents by a classifier's score, as benchmark-targeted ranking selects (BETR)."""

    name = "select_top"
    level = 3
    about = "the best share of characters by a classifier's score: ranking, also towards a benchmark's training items"

    class Parameters(StepParameters):
        """Parameters of `select_top`.

        Attributes:
            classifier: Folder of the classifier.
            score: The label whose probability ranks.
            share: Of the characters that stays, best first.
            each_source: Whether each source keeps that share of its own, or all sources together.
        """

        classifier: Path
        score: str
        share: float = Field(gt=0, le=1)
        each_source: bool = False

    parameters: Parameters

    def labels(self) -> list[str]:
        """Labels that the parameters name."""
        return [self.parameters.score]

    def begin(self, folder: Path, task: int) -> None:
        """Begin a task's scores."""
        self._path = folder / f"{task:05d}"
        self._rows: list[tuple[float, int, int]] = []

    def sketch(self, document: Document) -> None:
        """Take the score, the length and the source."""
        place = self._classifier.labels.index(self.parameters.score)
        score = float(self._classifier.probabilities(document.text)[place])
        self._rows.append((score, len(document.text), _group(document.metadata["source"])))

    def skip(self) -> None:
        """A place that is not ranked."""
        self._rows.append((np.inf, 0, 0))

    def finish(self) -> None:
        """Write them."""
        scores, sizes, groups = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        save_sketch(
            self._path,
            scores=np.array(scores, np.float64),
            sizes=np.array(sizes, np.int64),
            groups=np.array(groups, np.int64),
        )

    def solve(self, folder: Path, tasks: Sequence[int]) -> Iterator[tuple[int, list[Verdict]]]:
        """What lies below the share, with its score, or has none; of equals the first in the recipe's order stays."""
        sketches = [Arrays(folder / f"{task:05d}") for task in tasks]
        scores, sizes, groups = (
            np.concatenate([sketch[name] for sketch in sketches]) for name in ("scores", "sizes", "groups")
        )
        goes = np.zeros(len(scores), bool)
        ranked, unknown = np.isfinite(scores), np.isnan(scores)
        goes[unknown] = True  # a classifier that says NaN has said nothing for it
        for group in np.unique(groups[ranked]) if self.parameters.each_source else [None]:
            own = np.nonzero(ranked if group is None else ranked & (groups == group))[0]
            best = own[np.argsort(-scores[own], kind="stable")]
            have = np.cumsum(sizes[best]) - sizes[best]  # before each: the one that crosses the share stays
            goes[best[have >= self.parameters.share * sizes[own].sum()]] = True
        begin = 0
        for task, sketch in zip(tasks, sketches, strict=True):
            end = begin + len(sketch["scores"])
            yield (
                task,
                [
                    Verdict(place, "no_score", {"score": "nan"})
                    if unknown[begin + place]
                    else Verdict(place, "below_the_share", {"score": round(float(scores[begin + place]), 4)})
                    for place in np.nonzero(goes[begin:end])[0].tolist()
                ],
            )
            begin = end


def _group(source: str) -> int:
    """A number that a source has in every process."""
    import zlib

    return zlib.crc32(source.encode())
