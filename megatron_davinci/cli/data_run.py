"""`davinci data run | plan | steps`: raw files to a corpus, by a recipe of steps; and the catalogue of steps."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_davinci.darwin.corpus import Corpus
    from megatron_davinci.darwin.watching import Progress


def add_actions(actions: Any) -> None:
    """Declare the actions' arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    run_ = actions.add_parser("run", help="make a corpus from raw files by a recipe, or go on with one")
    run_.add_argument("recipe", type=Path, help="YAML file: sources, steps, output")
    run_.add_argument(
        "--workers",
        type=int,
        help="tasks at once (default: one for each core; on a cluster, as many as it takes)",
    )
    run_.add_argument(
        "--executor",
        choices=["local", "slurm", "ray"],
        default="local",
        help="where tasks run: here, or on the cluster that the recipe's section says (default: local)",
    )
    run_.add_argument("--restart", action="store_true", help="do away with what an earlier run has left")
    plan = actions.add_parser("plan", help="what a recipe's models will be asked, and what that costs")
    plan.add_argument("recipe", type=Path, help="YAML file: sources, steps, output")
    plan.add_argument(
        "--documents", type=int, default=50, metavar="N", help="to look at, of each source (default: 50)"
    )
    plan.add_argument("--tokenizer", type=Path, help="folder of the model's tokenizer, to count tokens by")
    plan.add_argument("--input-price", type=float, metavar="X", help="of a million prompt tokens")
    plan.add_argument("--output-price", type=float, metavar="X", help="of a million answer tokens")
    plan.add_argument(
        "--tokens-per-second", type=float, metavar="X", help="answer tokens that the server writes in all"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the estimate here too")
    steps = actions.add_parser("steps", help="list the steps that a recipe can name, by level")
    steps.add_argument("step", nargs="?", help="a step, to see its parameters")


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    _needs_packages()
    return ACTIONS[arguments.action](arguments)


def _needs_packages() -> None:
    from megatron_davinci.errors import EnvironmentProblem

    try:
        import datatrove  # noqa: F401
        import orjson  # noqa: F401
        import zstandard  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "Making a corpus needs packages that are not installed.",
            found=error,
            do="pip install 'megatron-davinci[darwin]'",
        ) from error


def run_recipe(arguments: argparse.Namespace) -> int:
    """Make the corpus, and say what became of its documents."""
    from megatron_davinci.darwin.recipe import load_recipe
    from megatron_davinci.darwin.run import run_recipe as make

    loaded = load_recipe(arguments.recipe)
    with shown(loaded.recipe.name) as progress:
        corpus = make(loaded, arguments.workers, arguments.restart, arguments.executor, progress)
    show_corpus(corpus)
    return 0


def show_corpus(corpus: Corpus) -> None:
    """Print what became of the documents, by source and by step."""
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.config.units import format_tokens

    screen, counts = Screen(), corpus.counts
    rows = []
    for name, source in corpus.manifest["sources"].items():
        given = source["input"]
        for level, kept in source["levels"].items() or [("–", {})]:
            tokens = format_tokens(kept["tokens"]) if "tokens" in kept else "–"
            rows.append(
                [name, level, f"{given['documents']:,}", f"{kept.get('documents', 0):,}",
                 f"{kept.get('characters', 0):,}", tokens, source["licence"] or "–"]
            )  # fmt: skip
    made = f" read and {derived:,} made of them" if (derived := counts.get("derived", 0)) else ""
    screen.table(
        f"{corpus.manifest['name']}: {counts['output']:,} of {counts['input']:,} documents{made}",
        [("source", "left"), ("level", "right"), ("read", "right"), ("kept", "right"), ("characters", "right"),
         ("tokens", "right"), ("licence", "left")],
        rows,
    )  # fmt: skip
    gone = [
        [kind, *key.split("/", 1), f"{count:,}"]
        for kind in ("dropped", "quarantined")
        for key, count in sorted(counts[kind].items(), key=lambda item: -item[1])
    ]
    if gone:
        screen.console.print()
        screen.table(
            "turned away",
            [("documents", "right"), ("", "left"), ("by", "left"), ("why", "left")],
            [[count, kind, step, reason] for kind, step, reason, count in gone],
        )
    models = corpus.manifest.get("models", {})
    if models:
        screen.console.print()
        screen.table(
            "asked of models",
            [("step", "left"), ("model", "left"), ("prompt tokens", "right"), ("answer tokens", "right"),
             ("price", "right")],
            [[name, each["model"], f"{each['prompt_tokens']:,}", f"{each['completion_tokens']:,}",
              f"{each['price']:,.4g}"] for name, each in models.items()],
        )  # fmt: skip
        statistics = json.loads((corpus.folder / "statistics.json").read_text(encoding="utf-8"))
        rows = [
            [*key.split("/"), f"{count:,}"]
            for key, count in statistics["counts"].items()
            if key.count("/") == 2
        ]
        screen.console.print()
        screen.table("what came of it", [("step", "left"), ("", "left"), ("", "left"), ("", "right")], rows)
    away = sum(sum(counts[kind].values()) for kind in ("dropped", "quarantined"))
    derived = f" + {counts['derived']:,} made of them" if counts.get("derived") else ""
    screen.console.print(
        f"\n{counts['input']:,} read{derived} = {counts['output']:,} kept + {away:,} turned away, "
        "counted in the files.\n"
        f"{corpus.folder / 'documents'}",
        soft_wrap=True,
    )


def list_steps(arguments: argparse.Namespace) -> int:
    """Print the catalogue, or what one step takes."""
    import difflib

    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin.catalogue import LEVELS, STEPS
    from megatron_davinci.errors import ConfigError

    screen = Screen()
    if arguments.step is None:
        for level, about in LEVELS.items():
            chosen = sorted(
                (step for step in STEPS.values() if step.level == level), key=lambda step: step.name
            )
            if chosen:
                rows = [[step.name, step.about] for step in chosen]
                screen.table(f"level {level}: {about}", [("step", "left"), ("", "left")], rows)
                screen.console.print()
        return 0
    if arguments.step not in STEPS:
        nearest = difflib.get_close_matches(arguments.step, STEPS, n=1, cutoff=0.4)
        raise ConfigError(
            "There is no such step.",
            found=arguments.step,
            expected=nearest[0] if nearest else ", ".join(STEPS),
        )
    step = STEPS[arguments.step]
    described: dict[str, str] = {}
    for each in reversed(step.Parameters.__mro__):  # a step says of its own what its base says of all
        described |= _described(each.__dict__.get("__doc__") or "")
    rows = [
        [
            name,
            str(field.default) if not field.is_required() else "required",
            described[name],
        ]
        for name, field in step.Parameters.model_fields.items()
    ]
    screen.table(
        f"{step.name}, level {step.level}: {step.about}",
        [("parameter", "left"), ("default", "left"), ("", "left")],
        rows,
    )
    return 0


def _described(docstring: str) -> dict[str, str]:
    """The lines of a Google-style `Attributes:` section, by name."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        head, colon, rest = line.strip().partition(": ")
        if colon and head.isidentifier() and line.startswith("    ") and not line.startswith("     "):
            name = head
            found[name] = rest
        elif line.strip() and name:
            found[name] += " " + line.strip()
    return found


@contextmanager
def shown(title: str, every: float = 30.0) -> Iterator[Callable[[Progress], None]]:
    """How far a run is: a bar on a screen; elsewhere a line a pass, and one now and then while a model is asked."""
    from megatron_davinci.cli.data_progress import line, what_was_asked

    if not sys.stdout.isatty():
        said: set[int] = set()
        last = [time.monotonic()]

        def say(progress: Progress) -> None:
            if progress.done == progress.tasks and progress.number not in said:
                said.add(progress.number)
                print(f"{title}: {line(progress)}", file=sys.stderr, flush=True)
            elif progress.asked and progress.done < progress.tasks and time.monotonic() - last[0] >= every:
                last[0] = time.monotonic()
                print(f"{title}: {line(progress)}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[asked]}"),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, asked="")
        yield lambda progress: bar.update(
            task,
            description=f"{progress.number}/{progress.passes} {progress.what[:48]}",
            completed=progress.done,
            total=progress.tasks,
            asked=what_was_asked(progress),
        )


def plan_recipe(arguments: argparse.Namespace) -> int:
    """Estimate a recipe."""
    from megatron_davinci.cli.data_cost import plan_recipe as plan

    return plan(arguments)


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run_recipe,
    "plan": plan_recipe,
    "steps": list_steps,
}
