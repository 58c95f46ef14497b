"""A plan on the screen: facts, stages, sources, memory, and what to know first."""

from __future__ import annotations

from rich.text import Text

from megatron_davinci.cli.screen import Screen
from megatron_davinci.config import RunConfig
from megatron_davinci.config.units import format_tokens
from megatron_davinci.report.numbers import scientific
from megatron_davinci.train.plan import RunPlan, StagePlan
from megatron_davinci.train.plan_cost import Gpu, checkpoints_kept
from megatron_davinci.train.plan_layouts import ROOM, Suggested
from megatron_davinci.train.plan_recipes import MEASURED, plan_recipes, share_of_products


def show_plan(plan: RunPlan, config: RunConfig) -> None:
    """Print a plan."""
    screen = Screen()
    screen.facts(_facts(plan, config))
    rows = [
        _stage_row(stage, settings.learning_rate.shape)
        for stage, settings in zip(plan.stages, config.curriculum)
    ]
    screen.console.print()
    screen.table(
        "Stages",
        [
            ("stage", "left"), ("tokens", "right"), ("steps", "right"), ("GPU hours", "right"), ("time", "right"),
            ("batch", "left"), ("learning rate", "left"), ("mixture", "left"),
        ],
        rows,
    )  # fmt: skip
    screen.console.print()
    _show_sources(screen, plan)
    screen.console.print()
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "working", "total")
    screen.table(
        f"Memory of the fullest rank, GiB (estimate; a GPU has {plan.gpu.memory_gib:g})",
        [(name, "right") for name in parts],
        [[f"{getattr(plan.memory, name) / 2**30:.2f}" for name in parts]],
    )
    if plan.memory.total > plan.gpu.memory_gib * 2**30:
        screen.console.print(Text("IT DOES NOT FIT.", style="bold"))
    if config.train.low_precision.recipe != "none":
        _show_recipes(screen, plan, config)
    if plan.warnings:
        screen.console.print()
        screen.console.print(Text("To know before it starts", style="italic"))
        for warning in plan.warnings:
            screen.console.print(Text("- " + screen.safe(warning)))


def show_layouts(layouts: list[Suggested], gpu: Gpu) -> None:
    """Print layouts that fit, with the overrides that make them."""
    screen = Screen()
    screen.console.print()
    if not layouts:
        screen.console.print(
            Text(
                f"No layout of these ranks fits {ROOM:.0%} of {gpu.memory_gib:g} GiB: take more ranks, or ranks that "
                "divide the batch"
            )
        )
        return
    screen.table(
        f"Layouts that fit {ROOM:.0%} of {gpu.memory_gib:g} GiB, by the estimated time of a step",
        [
            ("step", "right"), ("bubble", "right"), ("sent", "right"), ("GiB", "right"), ("ranks", "left"),
            ("overrides", "left"),
        ],
        [
            [
                f"{one.seconds:.3g} s",
                f"{one.bubble:.1%}",
                _bytes(one.communication),
                f"{one.memory / 2**30:.1f}",
                str(one.layout).split(" = ")[0].replace(" x ", " "),
                one.overrides,
            ]
            for one in layouts
        ],
    )  # fmt: skip


def key_figures(plan: RunPlan) -> list[tuple[str, str, str]]:
    """The figures at the top of a plan's page: label, value, note."""
    return [
        ("Parameters", format_tokens(plan.parameters), f"{plan.parameters:,}"),
        ("Tokens", format_tokens(plan.total_tokens), f"{plan.total_steps:,} steps"),
        ("GPU hours", f"{plan.cost.gpu_hours:,.0f}", f"{plan.gpu.name} at {plan.mfu:.0%}"),
        ("Time", _time(plan.cost.wall_hours), str(plan.layout)),
        ("Memory a GPU", f"{plan.memory.total / 2**30:.1f} GiB", f"of {plan.gpu.memory_gib:g}"),
    ]


def _facts(plan: RunPlan, config: RunConfig) -> list[tuple[str, str]]:
    active = ""
    if plan.parameters_active != plan.parameters:
        active = f"; {plan.parameters_active:,} that a token passes"
    rate, batch = plan.step_law
    chosen = max(stage.learning_rate.peak for stage in config.curriculum)
    largest = max(phase.size for stage in config.curriculum for phase in stage.global_batch_size)
    every = config.checkpoint.every_steps
    return [
        (
            "parameters",
            f"{plan.parameters:,} ({plan.parameters_without_embeddings:,} without embeddings{active})",
        ),
        (
            "FLOPs a token",
            f"{plan.flops_per_token / 1e9:.3g} GFLOP, forward and backward; attention counted causally",
        ),
        (
            "total",
            f"{format_tokens(plan.total_tokens)} tokens, {plan.total_samples:,} samples, "
            f"{plan.total_steps:,} steps, {plan.cost.flops:.3g} FLOPs",
        ),
        (
            "layout",
            f"{plan.layout}, micro-batch {config.train.micro_batch_size}, {config.train.precision} precision",
        ),
        *_products(plan, config),
        (
            "time",
            f"{plan.cost.gpu_hours:,.0f} GPU hours, {_time(plan.cost.wall_hours)}: {plan.gpu.name} with "
            f"{plan.gpu.teraflops:g} TFLOP/s at {plan.mfu:.0%} (--mfu)",
        ),
        (
            "checkpoints",
            f"{_bytes(plan.checkpoint_bytes)} each, {_bytes(plan.checkpoint_space)} with the "
            f"{checkpoints_kept(config):,} that are kept and the one being written"
            + (f"; every {every:,} steps" if every else "; at the end only"),
        ),
        *_snapshots(plan, config),
        (
            "Step Law",
            f"peak {rate:.2e}, batch {format_tokens(batch)} tokens; chosen {chosen:.2e}, "
            f"{format_tokens(largest * config.data.sequence_length)} (Li et al. 2025, fitted to 1.1B parameters and "
            "100B tokens: a prior)",
        ),
    ]


def _products(plan: RunPlan, config: RunConfig) -> list[tuple[str, str]]:
    """What is multiplied in few bits, and what that does to the hours."""
    low, layers = config.train.low_precision, config.model.num_layers
    if low.recipe == "none":
        return []
    inside = layers - low.keep_first_layers - low.keep_last_layers
    share = share_of_products(config)
    name = low.bits.format if low.recipe == "bits" else low.recipe
    speed = (
        "emulated products are slower than others: hours are those of the hardware, at --mfu of its bf16 peak"
        if low.backend == "emulate" or low.recipe == "bits"
        else "hours are at --mfu of the bf16 peak: " + _speed_on_record(low.recipe)
    )
    tail = f", the last {format_tokens(low.tail_tokens)} tokens without" if low.tail_tokens else ""
    return [
        (
            "products",
            f"{name} in {inside} of {layers} layers, {share:.0%} of the FLOPs{tail} (backend: {low.backend}); "
            + speed,
        )
    ]


def _speed_on_record(recipe: str) -> str:
    timed = [one for one in MEASURED if one.recipe == recipe]
    if not timed:
        return "no speed of this recipe has been measured"
    return "measured are " + ", ".join(
        f"{one.tokens_per_second:,.0f} tokens/s on one {one.gpu}" for one in timed
    )


def _show_recipes(screen: Screen, plan: RunPlan, config: RunConfig) -> None:
    rows = []
    for one in plan_recipes(config, plan.layout, plan.gpu):
        at_most = "no such products" if one.at_most is None else f"{one.at_most:.2f} ×"
        timed = "not measured"
        if (found := one.measured) is not None:
            rate = found.tokens_per_second * found.flops_per_token / (plan.gpu.teraflops * 1e12)
            timed = f"{found.tokens_per_second:,.0f} tokens/s, {rate:.1%} of the peak ({found.what})"
        fits = "blocks do not divide the model" if one.problem else at_most
        rows.append([one.name, f"{one.memory / 2**30:.1f}", fits, timed])
    screen.console.print()
    screen.table(
        f"Recipes on {plan.gpu.name}: memory by estimate; times faster at most by arithmetic",
        [("recipe", "left"), ("GiB", "right"), ("at most", "right"), ("measured on one GPU", "left")],
        rows,
    )


def _snapshots(plan: RunPlan, config: RunConfig) -> list[tuple[str, str]]:
    settings = config.snapshots
    if settings.every_steps is None:
        return []
    over = (
        "without parity" if settings.parity == "never" else f"with parity over {settings.parity_nodes} nodes"
    )
    return [
        (
            "snapshots",
            f"{_bytes(plan.snapshot_bytes)} of host memory a rank, {over}; every {settings.every_steps:,} steps",
        )
    ]


def _stage_row(stage: StagePlan, shape: str) -> list[str]:
    first, last = stage.learning_rate
    rate = f"{scientific(first)} to {scientific(last)}" if first != last else scientific(first)
    mixture = (f"{name} {100 * tokens / stage.tokens:.4g}%" for name, tokens in stage.domain_tokens.items())
    return [
        stage.name,
        format_tokens(stage.tokens),
        f"{stage.steps:,}",
        f"{stage.cost.gpu_hours:,.0f}",
        _time(stage.cost.wall_hours),
        ", ".join(str(size) for size in stage.batch),
        f"{rate}, {shape}",
        ", ".join(mixture),
    ]


def _show_sources(screen: Screen, plan: RunPlan) -> None:
    rows = []
    for source in plan.sources:
        passes = ["?"] * len(plan.stages) if source.epochs is None else [_passes(e) for e in source.epochs]
        rows.append(
            [
                source.name,
                "?" if source.pool is None else format_tokens(source.pool),
                format_tokens(sum(source.tokens)),
                *passes,
                source.domain,
            ]
        )
    screen.table(
        "Sources: passes through each by the end of a stage",
        [
            ("source", "left"), ("pool", "right"), ("taken", "right"),
            *((stage.name, "right") for stage in plan.stages), ("domain", "left"),
        ],
        rows,
    )  # fmt: skip


def _passes(value: float) -> str:
    return f"{value:.2f}" if value else "-"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:.3g} TB"
