"""`davinci plan CONFIG`: what a run will cost, before anything starts."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_davinci.config import load_config
from megatron_davinci.config.mixture import share_text
from megatron_davinci.config.units import format_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--ranks", type=int, help="GPUs to plan for (default: the smallest that the layout needs)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from megatron_davinci.files import write_json
    from megatron_davinci.train.plan import plan_run

    config = load_config(arguments.config, arguments.overrides)
    smallest = config.parallel.model_ranks
    ranks = smallest if arguments.ranks is None else arguments.ranks
    plan = plan_run(config, ranks)
    _show(plan, config)
    if arguments.json:
        write_json(arguments.json, plan.as_json())
    return 0


def _show(plan: Any, config: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    gflop = plan.flops_per_token / 1e9
    experts = f", {plan.parameters_active:,} for a token" if config.model.experts else ""
    rows = [
        (
            "parameters",
            f"{plan.parameters:,} ({plan.parameters_without_embeddings:,} without embeddings{experts})",
        ),
        ("FLOPs a token", f"{gflop:.3g} GFLOP, forward and backward; attention counted causally"),
        (
            "total",
            f"{format_tokens(plan.total_tokens)} tokens, {plan.total_samples:,} samples, "
            f"{plan.total_steps:,} steps, {plan.flops_per_token * plan.total_tokens:.3g} FLOPs",
        ),
        (
            "layout",
            f"{plan.layout}, micro-batch {config.train.micro_batch_size}, {config.train.precision} precision",
        ),
    ]
    for name, value in rows:
        facts.add_row(f"[b]{name}[/b]", value)
    console.print(facts)

    stages = Table(title="Stages", title_justify="left", header_style="bold")
    for column, justify in (
        ("stage", "left"), ("tokens", "right"), ("steps", "right"), ("batch", "left"),
        ("learning rate", "left"), ("mixture", "left"),
    ):  # fmt: skip
        stages.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage, settings in zip(plan.stages, config.curriculum, strict=True):
        first, last = stage.learning_rate
        stages.add_row(
            stage.name,
            format_tokens(stage.tokens),
            f"{stage.steps:,}",
            " -> ".join(str(size) for size in stage.batch),
            f"{first:.2e} .. {last:.2e}, {settings.learning_rate.shape}",
            ", ".join(
                f"{n} {float(100 * Fraction(share_text(w))):g}%"
                for n, w in settings.mixture.items()
                if Fraction(share_text(w))
            ),
        )
    console.print(stages)

    memory = Table(title="Memory of the fullest rank (estimate)", title_justify="left", header_style="bold")
    for column in ("weights", "gradients", "optimizer", "activations", "logits", "working", "total"):
        memory.add_column(column, justify="right")
    parts = plan.memory
    memory.add_row(
        *(_bytes(size) for size in (
            parts.weights, parts.gradients, parts.optimizer, parts.activations, parts.logits, parts.working,
            parts.total,
        ))
    )  # fmt: skip
    console.print(memory)


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
