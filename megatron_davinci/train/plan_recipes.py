"""What each recipe of few bits would take on a GPU: memory by estimate, speed by measurement where there is one.

Where no speed has been measured, arithmetic says how much faster a recipe can be at most: the share of the FLOPs
that it multiplies, at the rate that the data sheet has for its format, and all else as fast as before.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.config.low_precision import size_problems
from megatron_davinci.train.memory import plan_memory
from megatron_davinci.train.plan_cost import Gpu


@dataclass(frozen=True)
class Measured:
    """Steps that were timed.

    Attributes:
        recipe: Of `train.low_precision`; `none` for bf16.
        gpu: As `davinci plan --gpu` has it.
        tokens_per_second: On one GPU.
        flops_per_token: Of the model, forward and backward.
        what: Which model, and how many tokens a step.
        record: The file in `benchmarks/results`, and the figure in it.
    """

    recipe: str
    gpu: str
    tokens_per_second: float
    flops_per_token: int
    what: str
    record: tuple[str, str]


MEASURED = (
    Measured(
        "none",
        "h100",
        18384.7,
        20_326_121_472,
        "davinci-3b, 4 sequences of 4,096 tokens",
        ("2026-11-26-train_gpu.json", "davinci_loss_tokens_per_second"),
    ),
    Measured(
        "none",
        "h200",
        27884.0,
        20_326_121_472,
        "davinci-3b, 16 sequences of 4,096 tokens",
        ("2026-11-27-train_gpu.json", "davinci_ops_tokens_per_second"),
    ),
    Measured(
        "delayed",
        "h200",
        38501.0,
        20_326_121_472,
        "davinci-3b, 16 sequences of 4,096 tokens",
        ("2026-11-27-train_gpu.json", "native_delayed_tokens_per_second"),
    ),
    Measured(
        "current",
        "h200",
        36622.0,
        20_326_121_472,
        "davinci-3b, 16 sequences of 4,096 tokens",
        ("2026-11-27-train_gpu.json", "native_current_tokens_per_second"),
    ),
    Measured(
        "block",
        "h200",
        34135.0,
        20_326_121_472,
        "davinci-3b, 16 sequences of 4,096 tokens",
        ("2026-11-27-train_gpu.json", "native_block_tokens_per_second"),
    ),
)
"""All speeds of steps on a GPU that are on record, with whichever recipe."""

_FP8 = {"delayed": 2.0, "current": 2.0}
RATES = {
    "l40s": _FP8,
    "h100": _FP8 | {"block": 2.0},
    "h200": _FP8 | {"block": 2.0},
    "b200": _FP8 | {"mxfp8": 2.0, "nvfp4": 4.0},
}
"""Matrix products of a recipe on a GPU over those in bf16, by NVIDIA's data sheets; a GPU that is missing has
none."""

_VARIANTS: tuple[tuple[str, str], ...] = (
    ("none", "as_computed"),
    ("delayed", "as_computed"),
    ("current", "as_computed"),
    ("current", "fp8"),
    ("block", "as_computed"),
    ("mxfp8", "as_computed"),
    ("nvfp4", "as_computed"),
)


@dataclass(frozen=True)
class RecipePlan:
    """A recipe on a GPU.

    Attributes:
        name: The recipe, and whether activations are kept in 8 bits.
        memory: Bytes of the fullest rank, by estimate.
        at_most: Times faster than bf16 by arithmetic; None where the GPU has no such products.
        measured: Steps of it that were timed on this GPU; None where none were.
        problem: Why its blocks do not fit the model; empty where they do.
    """

    name: str
    memory: int
    at_most: float | None
    measured: Measured | None
    problem: str


def share_of_products(config: RunConfig) -> float:
    """The part of the FLOPs that the linear layers with few bits have, 0 to 1."""
    low, model = config.train.low_precision, config.model
    inside = model.num_layers - low.keep_first_layers - low.keep_last_layers
    of_layers = 6 * model.parameters(embeddings=False) * inside / model.num_layers
    return of_layers / model.flops_per_token(config.data.sequence_length)


def plan_recipes(config: RunConfig, layout: Layout, gpu: Gpu) -> list[RecipePlan]:
    """All recipes, with the layers kept that the configuration keeps.

    Args:
        config: The run configuration.
        layout: Of the ranks.
        gpu: What they are.
    """
    share, found = share_of_products(config), []
    for recipe, activations in _VARIANTS:
        low = config.train.low_precision.model_copy(
            update={"recipe": recipe, "activations": activations, "backend": "emulate"}
        )
        train = config.train.model_copy(update={"low_precision": low})
        variant = config.model_copy(update={"train": train})
        rate = 1.0 if recipe == "none" else RATES.get(gpu.name, {}).get(recipe)
        found.append(
            RecipePlan(
                name="bf16"
                if recipe == "none"
                else f"{recipe}, 8 bits kept"
                if activations == "fp8"
                else recipe,
                memory=plan_memory(variant, layout).total,
                at_most=None if rate is None else 1 / (1 - share + share / rate),
                measured=next((one for one in MEASURED if (one.recipe, one.gpu) == (recipe, gpu.name)), None)
                if activations == "as_computed"
                else None,
                problem="; ".join(size_problems(variant, own=True)) if recipe != "none" else "",
            )
        )
    return found
