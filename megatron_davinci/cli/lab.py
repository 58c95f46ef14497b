"""`davinci lab`: ask a question by runs that differ in one thing, and hear how sure the answer is."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path("runs/lab")
_ARMS_ACROSS = 4  # with more than these, arms are rows of a table: columns would be too narrow to read

TEMPLATE = """\
# A design: a question, arms that differ in one thing, and what decides (docs/concepts/lab.md).
{head}
# Keys that the arms may differ in; a difference in any other is refused.
varies: [curriculum.0.learning_rate]
arms:
  control: {{}}
  changed:
    set: {{curriculum.0.learning_rate.peak: 1.0e-3}}
    words: half the peak
seeds: [1, 2, 3]
metrics:
  # The first one decides. `margin` is the smallest difference that matters.
  - {{name: heldout_loss.mean, margin: 0.02}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = commands.add_parser("new", help="write a design to fill in")
    new.add_argument("design", type=Path)
    new.add_argument("--base", default="config.yaml", help="run configuration, relative to the design")
    new.add_argument("--question", default="Does half the learning rate lose anything?")
    for name, help_text in (
        ("check", "look for what could explain a difference beside the factor; start nothing"),
        ("run", "train the runs that are not done, ask them the design's tasks, then draw the page"),
        ("eval", "ask the runs that are done the design's tasks, then draw the page"),
        ("report", "draw the page of what is there"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("design", type=Path)
        if name != "check":
            command.add_argument("--out", type=Path, default=ROOT, help=f"the lab's folder (default: {ROOT})")
        if name in ("run", "eval"):
            command.add_argument(
                "--parallel", type=int, help="runs at a time (default: the cores, one each; elsewhere all)"
            )
        if name == "run":
            command.add_argument(
                "--executor",
                choices=("local", "slurm", "ray"),
                default="local",
                help="where runs are trained",
            )
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="a setting of Slurm (partition=..., time=MINUTES, gpus_per_node=...) or of Ray's tasks",
            )
            command.add_argument(
                "--retry",
                action="store_true",
                help="start runs again that failed before, and ask again what had the same problem twice",
            )
    mixture = commands.add_parser("mixture", help="look for a stage's mixture by rounds of small runs")
    mixture.add_argument("search", type=Path)
    mixture.add_argument("--out", type=Path, default=ROOT, help=f"the lab's folder (default: {ROOT})")
    mixture.add_argument("--parallel", type=int, help="runs at a time (default: the cores, one each)")
    mixture.add_argument("--retry", action="store_true", help="start runs again that failed before")
    ratio = commands.add_parser(
        "ratio", help="how much of a domain general loss bears, by a design's short runs"
    )
    ratio.add_argument("design", type=Path, help="whose arms differ in the domain's share")
    ratio.add_argument("--stage", required=True, help="whose mixture it is")
    ratio.add_argument("--domain", required=True, help="whose share is looked for")
    ratio.add_argument("--general", required=True, help="held-out domain that should not be lost")
    ratio.add_argument("--tokens", required=True, help="of the stage that the share is wanted for (4B)")
    ratio.add_argument("--tolerance", type=float, default=0.05, help="nats that its loss may rise")
    ratio.add_argument("--size", default="", help="of the design's ladder, where it has one")
    ratio.add_argument("--out", type=Path, default=ROOT, help=f"the lab's folder (default: {ROOT})")
    power = commands.add_parser("power", help="how many seeds show a difference")
    power.add_argument("--noise", type=float, required=True, help="standard deviation of a pair's difference")
    power.add_argument("--effect", type=float, required=True, help="the difference to be shown")
    power.add_argument("--alpha", type=float, default=0.05, help="chance of a false verdict")
    power.add_argument(
        "--comparisons",
        type=int,
        default=1,
        metavar="N",
        help="comparisons that p-values are corrected for: a design's arms but the control, at each size",
    )
    log = commands.add_parser("log", help="add a dated entry to the lab book")
    log.add_argument("text")
    log.add_argument("--design", type=Path, help="with this design's verdict")
    log.add_argument("--book", type=Path, default=Path("LABBOOK.md"))
    log.add_argument("--out", type=Path, default=ROOT)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked."""
    actions = {
        "new": _new,
        "check": _check,
        "run": _run,
        "eval": _eval,
        "report": _report,
        "mixture": _mixture,
        "ratio": _ratio,
        "power": _power,
        "log": _log,
    }
    return actions[arguments.action](arguments)


def _new(arguments: argparse.Namespace) -> int:
    import yaml

    from megatron_davinci.errors import ConfigError
    from megatron_davinci.files import write_atomically

    if arguments.design.exists():
        raise ConfigError(
            "There is a file already.", where=arguments.design, do="give another name, or remove it"
        )
    said = {"question": arguments.question, "base": arguments.base}
    head = yaml.safe_dump(said, allow_unicode=True, sort_keys=False, width=math.inf)
    text = TEMPLATE.format(head=head.rstrip())
    write_atomically(arguments.design, text)
    print(f"Written: {arguments.design}. Fill it in, then: davinci lab check {arguments.design}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_davinci.config.section import shown
    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.lab.arms import arms_of, runs_of
    from megatron_davinci.lab.control import differences, refuse, tokens_of
    from megatron_davinci.lab.design import load_design
    from megatron_davinci.lab.pasts import pasts_of
    from megatron_davinci.lab.runner import unique

    design = load_design(arguments.design)
    arms = arms_of(design)
    refuse(design, arms, arguments.design)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(design.question, style="bold")
    first = [arm for arm in arms if arm.size == arms[0].size]
    differ = differences(first)
    across = len(first) <= _ARMS_ACROSS
    table = Table(header_style="bold")
    for column in ("differs", *(arm.name for arm in first)) if across else ("arm", *differ):
        table.add_column(column, overflow="fold")
    if across:
        for key, values in differ.items():
            table.add_row(key, *(shown(value) for value in values.values()))
    else:
        for arm in first:
            table.add_row(arm.name, *(shown(values[arm.name]) for values in differ.values()))
    console.print(table)
    runs = unique(runs_of(design, arms))
    tokens = tokens_of(design, runs)
    if pasts := pasts_of(design, runs):
        console.print(f"{len(pasts)} shared pasts are trained once each, {pasts[0].arm.words}.")
    console.print(
        f"The arms differ in nothing else. {len(runs)} runs, {format_tokens(tokens)} tokens in all; "
        f"{design.metrics[0].name} decides, and a difference of {design.metrics[0].margin:g} matters."
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli.lab_screen import Screen
    from megatron_davinci.lab.arms import arms_of, runs_of
    from megatron_davinci.lab.control import refuse
    from megatron_davinci.lab.design import load_design
    from megatron_davinci.lab.executors import executor_named
    from megatron_davinci.lab.runner import Executor, Trainer, carry_out

    design = load_design(arguments.design)
    arms = arms_of(design)
    refuse(design, arms, arguments.design)
    runs = runs_of(design, arms)
    # Elsewhere a queue says how many run at a time; a thread that waits costs little.
    local = arguments.executor == "local"
    parallel = arguments.parallel or (_cores() if local else min(len(runs), 256))
    settings = _settings(arguments.set)

    def executor(trainer: Trainer) -> Executor:
        return executor_named(arguments.executor, trainer, arguments.design, settings)

    with Screen(arguments.out, runs, design.metrics[0].name) as screen:
        carry_out(
            arguments.out,
            runs,
            parallel=parallel,
            retry=arguments.retry,
            say=screen.say,
            design=design,
            executor=executor,
        )
    if design.evaluate is None or local:
        return _eval(arguments)
    print(f"Tasks are asked where there is a processor for it: davinci lab eval {arguments.design}")
    return _report(arguments)


def _eval(arguments: argparse.Namespace) -> int:
    from megatron_davinci.lab.arms import Run, arms_of, runs_of
    from megatron_davinci.lab.asking import ask
    from megatron_davinci.lab.design import load_design

    def say(run: Run, problem: str) -> None:
        print(f"asked  {run.label:<40} {problem}", flush=True)

    design = load_design(arguments.design)
    runs = runs_of(design, arms_of(design))
    # `lab eval` is only called to ask; `lab run` may be called any number of times.
    again = getattr(arguments, "retry", True)
    ask(design, arguments.out, runs, parallel=arguments.parallel or _cores(), again=again, say=say)
    return _report(arguments)


def _cores() -> int:
    from megatron_davinci.platform.cores import usable_cores

    return usable_cores()


def _settings(said: list[str]) -> dict[str, Any]:
    from megatron_davinci.config.load import value_of
    from megatron_davinci.errors import ConfigError

    found = {}
    for one in said:
        key, equals, value = one.partition("=")
        if not (key and equals):
            raise ConfigError("A setting of an executor is KEY=VALUE.", where="--set", found=one)
        found[key] = value_of(value, f"--set {key}")
    return found


def _report(arguments: argparse.Namespace) -> int:
    from megatron_davinci.lab.arms import arms_of, runs_of
    from megatron_davinci.lab.control import check
    from megatron_davinci.lab.design import load_design
    from megatron_davinci.lab.outcomes import outcome_of
    from megatron_davinci.lab.report import write_index, write_report
    from megatron_davinci.lab.verdict import in_words, judge, seeds_in_words

    design = load_design(arguments.design)
    arms = arms_of(design)
    confounds = check(design, arms)
    runs = runs_of(design, arms)
    outcomes = [outcome_of(arguments.out, run, design.evaluate) for run in runs]
    verdict = judge(design, arms, runs, outcomes, confounds)
    folder = arguments.out / "designs" / arguments.design.stem
    page = write_report(folder, design, arms, runs, outcomes, verdict)
    write_index(arguments.out)
    print(design.question)
    for one in verdict.deciding:
        print(f"  {in_words(one)}")
    for warning in verdict.warnings:
        print(f"  note: {warning}")
    if any(one.state == "failed" for one in outcomes):
        print("  The page says why a run failed; davinci lab run with --retry starts it again.")
    if verdict.noise is not None:
        print(f"  Noise of a pair: {verdict.noise:.4f}. {seeds_in_words(verdict)}")
    print(page)
    return 0 if not confounds and all(one.state in ("done", "stopped") for one in outcomes) else 1


def _mixture(arguments: argparse.Namespace) -> int:
    from megatron_davinci.lab.mixtures import load_search, look
    from megatron_davinci.lab.outcomes import Outcome

    search = load_search(arguments.search)

    def say(one: Outcome, done: int, total: int) -> None:
        value = one.metric(search.metric)
        said = f"{search.metric} {value:.4f}" if value is not None else one.state
        print(f"{done:4} of {total}  {one.run.label:<40} {said}", flush=True)

    parallel = arguments.parallel or _cores()
    path = look(search, arguments.search, arguments.out, parallel=parallel, retry=arguments.retry, say=say)
    print(search.question)
    print("\n".join(f"  {line.removeprefix('# ')}" for line in path.read_text().splitlines()[1:2]))
    print(path)
    return 0


def _ratio(arguments: argparse.Namespace) -> int:
    from megatron_davinci.config.units import parse_tokens
    from megatron_davinci.errors import ConfigError
    from megatron_davinci.lab.arms import arms_of, runs_of
    from megatron_davinci.lab.control import refuse
    from megatron_davinci.lab.design import load_design
    from megatron_davinci.lab.outcomes import outcome_of
    from megatron_davinci.lab.ratio import Question, answer, in_words, write

    design = load_design(arguments.design)
    arms = arms_of(design)
    refuse(design, arms, arguments.design)
    try:
        tokens = parse_tokens(arguments.tokens)
    except ValueError as error:
        raise ConfigError("This is no token count.", where="--tokens", found=error) from None
    asked = Question(
        arguments.stage, arguments.domain, arguments.general, tokens, arguments.tolerance, arguments.size
    )
    outcomes = [outcome_of(arguments.out, run) for run in runs_of(design, arms)]
    found = answer(arms, outcomes, asked, arguments.design)
    path = write(arguments.out / "ratios" / arguments.design.stem, arms, asked, found)
    print(in_words(asked, found))
    for one in outcomes:
        if one.state != "done" and asked.size in ("", one.run.arm.size):
            print(f"  note: {one.run.label} is not counted: {one.state}")
    if path is not None:
        print(path)
    return 0


def _power(arguments: argparse.Namespace) -> int:
    from megatron_davinci.errors import ConfigError
    from megatron_davinci.stats.comparison import pairs_needed, power

    noise, effect, count = arguments.noise, arguments.effect, arguments.comparisons
    for name, value, fits, expected in (
        ("noise", noise, 0 <= noise < math.inf, "a standard deviation: a number that is not below 0"),
        ("effect", effect, 0 < abs(effect) < math.inf, "a difference: a number other than 0"),
        ("alpha", arguments.alpha, 0 < arguments.alpha < 1, "a chance above 0 and below 1"),
        ("comparisons", count, count > 0, "1 or more"),
    ):
        if not fits:
            raise ConfigError(
                "No number of seeds follows from this.", where=f"--{name}", found=value, expected=expected
            )
    alpha = arguments.alpha / count  # Holm's worst case
    need = pairs_needed(effect, noise, alpha=alpha)
    if need is None:
        print(f"More than 1,000 seeds: {effect:g} is too little against a noise of {noise:g}.")
        return 0
    corrected = f" with p-values corrected for {count} comparisons" if count > 1 else ""
    print(f"{need} seeds show a difference of {effect:g} in four cases of five{corrected}.")
    for seeds in sorted({2, 3, 5, 8, need}):
        print(f"  {seeds:4} seeds: {100 * power(effect, noise, seeds, alpha):5.1f}%")
    return 0


def _log(arguments: argparse.Namespace) -> int:
    from megatron_davinci.errors import DataError
    from megatron_davinci.lab.book import add_entry

    verdict = ""
    if arguments.design is not None:
        path = arguments.out / "designs" / arguments.design.stem / "lab.md"
        if not path.exists():
            raise DataError(
                "The design has no verdict yet.", where=path, do=f"davinci lab report {arguments.design}"
            )
        verdict = path.read_text(encoding="utf-8")
    sys.stdout.write(add_entry(arguments.book, arguments.text, verdict))
    return 0
