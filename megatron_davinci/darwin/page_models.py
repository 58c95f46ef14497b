"""What a corpus's page says of the steps that ask models: chunks by what came of them, tokens, price."""

from __future__ import annotations

from typing import Any

from megatron_davinci.report.axes import Axis
from megatron_davinci.report.numbers import percent, quantity
from megatron_davinci.report.page import Page
from megatron_davinci.report.plots import Bar, Bars

_GOOD = ("refined", "completed", "put_into_context", "unchanged", "verbatim", "accepted")


def add_models(page: Page, manifest: dict[str, Any], statistics: dict[str, Any]) -> None:
    """Add the section, if a step asked a model."""
    models = manifest.get("models")
    if not models:
        return
    page.section(
        "Models",
        "What came of the answers, by gate. Tokens are those of all answers that were judged, by the servers' count.",
    )
    page.table(
        ["step", "model", "prompt tokens", "answer tokens", "price at the recipe's rates"],
        [
            [
                name,
                each["model"],
                quantity(each["prompt_tokens"]),
                quantity(each["completion_tokens"]),
                f"{each['price']:,.4g}",
            ]
            for name, each in models.items()
        ],
    )
    for name in models:
        for unit in (
            "documents",
            "chunks",
            "pairs",
            "answers",
            "checks",
            "dialogues",
            "worlds",
            "aims",
            "unused answers",
        ):
            prefix = f"{name}/{unit}/"
            found = {
                key.removeprefix(prefix): count
                for key, count in statistics.get("counts", {}).items()
                if key.startswith(prefix)
            }
            if not found:
                continue
            total = sum(found.values())
            page.plot(
                Bars(
                    title=f"{name}: {unit} by what came of them",
                    value=Axis("number", unit, zero=True),
                    bars=[
                        Bar(
                            result.replace("_", " "),
                            count,
                            "blue" if result in (*_GOOD, "done", "answered", "checked") else "vermillion",
                        )
                        for result, count in sorted(found.items(), key=lambda item: -item[1])
                    ],
                    write=lambda value, total=total: f"{int(value):,} ({percent(value / total)})",  # type: ignore[misc]
                )
            )
