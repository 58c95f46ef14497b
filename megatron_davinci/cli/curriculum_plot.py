"""A run's mixture as a picture or a page."""

from __future__ import annotations

from pathlib import Path

from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import write_atomically
from megatron_davinci.report.mixture import Change, SourceUse, mixture_page, mixture_png
from megatron_davinci.train.course import Course


def write_plot(course: Course, path: Path) -> Path:
    """Draw it, as the file's name says.

    Raises:
        ConfigError: The name ends otherwise than in `.png` or `.html`.
        EnvironmentProblem: It could not be written.
    """
    if path.suffix not in (".png", ".html"):
        raise ConfigError(
            "A plot is a picture or a page.", where="--plot", found=path, expected=".png or .html"
        )
    length = course.schedule.sequence_length
    changes = []
    for record, number in course.records:
        whole = sum(exact_weight(weight) for weight in record.weights.values())
        changes.append(
            Change(
                record.first_sample * length,
                course.step_of(record.first_sample),
                record.stage,
                record.origin,
                record.reason,
                number is None,
                {name: float(exact_weight(weight) / whole) for name, weight in record.weights.items()},
            )
        )
    uses = [
        SourceUse(use.source, use.domain, use.windows * length, use.given * length, use.planned * length)
        for use in course.uses()
    ]
    facts = (
        f"Mixture of {course.past.directory.path.name}",
        changes,
        uses,
        course.now * length,
        course.total * length,
    )
    if path.suffix == ".png":
        write_atomically(path, mixture_png(*facts))
    else:
        mixture_page(*facts).write(path)
    return path
