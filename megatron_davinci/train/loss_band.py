"""Whether the loss of a run of few bits stays beside that of a reference: the same steps, taken in bf16.

Data order and batches are a function of the configuration, so a run and its reference take the same batches, and
the difference of their losses at a step has none of the noise that batches make. Its mean over some steps is held
against a band. In NVIDIA's run of 12B parameters NVFP4 stayed within 1% of FP8 while the learning rate was constant
and within 1.5% in its decay (arXiv 2509.25149, section 3).
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

from megatron_davinci.config.low_precision import BandConfig
from megatron_davinci.errors import DataError
from megatron_davinci.train.run_directory import read_lines


class LossBand:
    """Compares losses with those of a reference run.

    Args:
        settings: The section `train.low_precision.band`.

    Raises:
        DataError: The reference has no `metrics.jsonl` with losses.
    """

    def __init__(self, settings: BandConfig) -> None:
        self._settings = settings
        self._losses = _losses(settings.reference)
        self._gaps: deque[float] = deque(maxlen=settings.steps)
        self._outside = False
        self._missing = False
        self._news: list[str] = []

    def add(self, step: int, consumed_samples: int, loss: float) -> float | None:
        """Take a step's loss.

        Args:
            step: Its number.
            consumed_samples: After it: the steps that are compared end at the same sample.
            loss: Of the run.

        Returns:
            The loss over the reference's, less 1: the mean over the last `steps` steps that both have taken; None
            while there are fewer of them.
        """
        reference = self._losses.get(consumed_samples)
        if reference is None:
            if not self._missing:
                self._news.append(
                    f"Step {step}: the reference {self._settings.reference} has no step that ends at sample "
                    f"{consumed_samples:,}: losses are not compared there"
                )
            self._missing = True
            return None
        self._gaps.append(loss / reference - 1)
        if len(self._gaps) < self._settings.steps:
            return None
        gap = math.fsum(self._gaps) / len(self._gaps)
        outside = not gap <= self._settings.width  # a gap that is no number is outside
        if outside != self._outside:
            where = "leaves" if outside else "is back in"
            advice = (
                ": keep more layers (keep_first_layers, keep_last_layers), take a recipe of more bits, or end in "
                "train.precision (tail_tokens)"
            )
            self._news.append(
                f"Step {step}: the loss {where} the reference's band: {gap:+.2%} over {len(self._gaps)} steps, "
                f"width {self._settings.width:.2%}{advice if outside else ''}"
            )
        self._outside = outside
        return gap

    def told(self) -> list[str]:
        """Lines for whoever watches the run, of what has come up since this was asked last."""
        news, self._news = self._news, []
        return news


def _losses(directory: Path) -> dict[int, float]:
    """By the samples that were consumed after a step; of steps that were taken again the last."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise DataError(
            "The reference of a run of few bits is not there.",
            where="train.low_precision.band.reference",
            found=path,
            expected="a run directory with metrics.jsonl in it",
            do="name the directory of the same run in bf16, or take band out",
        )
    found: dict[int, float] = {}
    for line in read_lines(path):
        consumed, loss = line.get("consumed_samples"), line.get("loss")
        if isinstance(consumed, int) and isinstance(loss, int | float) and math.isfinite(loss) and loss > 0:
            found[consumed] = float(loss)
    if not found:
        raise DataError(
            "The reference of a run of few bits has no losses.",
            where=path,
            found="no line with consumed_samples and loss",
            expected="lines as a run writes them",
            do="name the directory of a run that has taken steps",
        )
    return found
