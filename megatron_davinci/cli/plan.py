"""`davinci plan CONFIG`: what a run will cost, before anything starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.errors import ConfigError

if TYPE_CHECKING:
    from megatron_davinci.train.plan import RunPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--ranks", type=int, help="GPUs to plan for (default: the smallest that the layout needs)"
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="what they are: a100, l40s, h100, h200, b200"
    )
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of another GPU, 10^12 a second")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of a GPU, if not the data sheet's"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that becomes model FLOPs")
    parser.add_argument(
        "--suggest", action="store_true", help="layouts that fit a GPU's memory, the fastest first"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw learning rate, batch and mixture: FILE.png or FILE.html",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from megatron_davinci.cli.plan_screen import show_layouts, show_plan
    from megatron_davinci.cli.train import check_exports
    from megatron_davinci.files import write_json
    from megatron_davinci.train.plan import plan_run
    from megatron_davinci.train.plan_cost import choose_gpu
    from megatron_davinci.train.plan_layouts import suggest

    if not 0 < arguments.mfu <= 1:
        raise ConfigError(
            "A utilization is a share of the peak.",
            where="--mfu",
            found=arguments.mfu,
            expected="above 0, to 1",
        )
    for name, value in (("--peak-tflops", arguments.peak_tflops), ("--gpu-memory", arguments.gpu_memory)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError("This has to be above 0.", where=name, found=value)
    if arguments.plot and arguments.plot.suffix not in (".png", ".html"):
        raise ConfigError(
            "A plot is a picture or a page.", where="--plot", found=arguments.plot, expected=".png, .html"
        )
    gpu = choose_gpu(arguments.gpu, arguments.peak_tflops, arguments.gpu_memory)
    config = load_config(arguments.config, arguments.overrides)
    check_exports(config)
    ranks = config.parallel.model_ranks if arguments.ranks is None else arguments.ranks
    plan = plan_run(config, ranks, gpu, arguments.mfu)
    show_plan(plan, config)
    if arguments.suggest:
        show_layouts(suggest(config, ranks, gpu, arguments.mfu), gpu)
    if arguments.plot:
        _draw(arguments.plot, config, plan)
    if arguments.json:
        write_json(arguments.json, plan.as_json())
    return 0


def _draw(path: Path, config: RunConfig, plan: RunPlan) -> None:
    from megatron_davinci.cli.plan_screen import key_figures
    from megatron_davinci.files import write_atomically
    from megatron_davinci.report.schedule import schedule_page, schedule_png
    from megatron_davinci.train.plan_curves import schedule_curves

    curves, title = schedule_curves(config, plan), f"Plan of {config.run.directory.name}"
    if path.suffix == ".png":
        write_atomically(path, schedule_png(curves, title))
    else:
        schedule_page(curves, title, key_figures(plan), plan.warnings).write(path)
    print(f"Drawn: {path}")
