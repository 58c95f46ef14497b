"""`davinci data plan`: what a recipe's models will be asked, and what that costs."""

from __future__ import annotations

import argparse
import math

from megatron_davinci.errors import ConfigError
from megatron_davinci.files import write_json


def plan_recipe(arguments: argparse.Namespace) -> int:
    """Estimate, print, and write if asked to."""
    from megatron_davinci.darwin.cost import Rates, as_json, estimate
    from megatron_davinci.darwin.recipe import load_recipe

    for name in ("documents", "input_price", "output_price", "tokens_per_second"):
        value = getattr(arguments, name)
        least = 0 if name.endswith("price") else 1e-9
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(
                "An option is out of bounds.",
                where=f"--{name.replace('_', '-')}",
                found=value,
                expected="0 or more" if least == 0 else "more than 0",
            )
    rates = Rates(arguments.input_price, arguments.output_price, arguments.tokens_per_second)
    loaded = load_recipe(arguments.recipe)
    plan = estimate(loaded, arguments.documents, arguments.tokenizer, rates)
    _show(loaded.recipe.name, plan)
    if arguments.json is not None:
        write_json(arguments.json, as_json(plan))
    return 0


def _show(title: str, plan: object) -> None:
    from megatron_davinci.cli.data_progress import duration
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.darwin.cost import CHARACTERS_A_TOKEN, CostPlan

    assert isinstance(plan, CostPlan)
    screen = Screen()
    rows = [
        [
            step.step, f"{step.documents:,.0f}", f"{step.calls:,.0f}", f"{step.known:,.0f}",
            f"{step.most_calls:,.0f}", format_tokens(round(step.prompt_tokens)),
            format_tokens(round(step.answer_tokens)), f"{step.price:,.2f}",
            "–" if step.hours is None else duration(3600 * step.hours), step.model,
        ]
        for step in plan.steps
    ]  # fmt: skip
    if len(rows) > 1:
        hours = [step.hours for step in plan.steps]
        known = [each for each in hours if each is not None]
        rows.append(
            ["all", "", f"{sum(s.calls for s in plan.steps):,.0f}", f"{sum(s.known for s in plan.steps):,.0f}",
             f"{sum(s.most_calls for s in plan.steps):,.0f}",
             format_tokens(round(sum(s.prompt_tokens for s in plan.steps))),
             format_tokens(round(sum(s.answer_tokens for s in plan.steps))),
             f"{sum(s.price for s in plan.steps):,.2f}",
             duration(3600 * sum(known)) if len(known) == len(hours) else "–", ""]
        )  # fmt: skip
    columns = (
        "step",
        "documents",
        "calls",
        "on disk",
        "at most",
        "prompt tokens",
        "answer tokens",
        "price",
        "time",
    )
    if rows:
        screen.table(
            f"{title}: what models will be asked, about",
            [(name, "left" if name == "step" else "right") for name in columns] + [("model", "left")],
            rows,
        )
    else:
        screen.console.print(f"{title}: no step asks a model.")
    sampled, all_ = sum(plan.sampled.values()), sum(plan.documents.values())
    notes = [
        f"Told from {sampled:,} of about {all_:,.0f} documents; at most, if every try but the last fails."
    ]
    if not plan.tokenizer:
        notes.append(
            f"Tokens are taken to be {CHARACTERS_A_TOKEN:g} characters each; --tokenizer counts them instead."
        )
    supposed = [step.step for step in plan.steps if step.measured == 0 and step.calls]
    if supposed:
        notes.append(
            f"How long answers are is a supposition for {', '.join(dict.fromkeys(supposed))}: "
            "none is on disk yet for these documents."
        )
    if plan.passed_over:
        notes.append(f"Taken to drop nothing: {', '.join(plan.passed_over)}.")
    if plan.dropped:
        notes.append(
            "Dropped of the sample: "
            + ", ".join(f"{count:,} by {what}" for what, count in sorted(plan.dropped.items()))
        )
    if any(step.hours is None for step in plan.steps):
        notes.append("Time: name --tokens-per-second, or limits in the recipe's `endpoint`.")
    screen.console.print()
    for note in notes:
        screen.console.print(screen.safe(note), soft_wrap=True)
