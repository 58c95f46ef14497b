"""`davinci eval`: lm-eval's tasks on a checkpoint as it is, on any layout, without conversion."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.cli.eval_plan import SUITES, Planned, given_in, task_names
from megatron_davinci.cli.model_options import add_model_options, check_bounds
from megatron_davinci.config import check_layout
from megatron_davinci.errors import MEND, ConfigError, DataError, EnvironmentProblem
from megatron_davinci.evaluate.results import finite, samples_folder, ways_apart
from megatron_davinci.files import disk_errors, write_atomically

if TYPE_CHECKING:
    from megatron_davinci.cli.convert_to_hf import Found
    from megatron_davinci.evaluate.tasks import TaskResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run",
        help="run directory, RUN@STEP for a checkpoint that is not the newest, or a checkpoint's folder",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="how to compute it, such as parallel.tensor=2"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", help="names of lm-eval's tasks or groups, with commas between")
    what.add_argument(
        "--suite",
        choices=SUITES,
        help="local: items made from held-out texts, without download; davinci19: the report's 19 benchmarks; "
        "knowledge: what is known of made-up texts; contamination: were these texts in the training data",
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="your own tasks, as YAML",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data sets of tasks, in folders of their names on the hub"
    )
    parser.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="texts, JSON lines or Parquet: for --suite local instead of the run's held-out sources; for --suite "
        "contamination suspects, and then unseen ones of the same kind",
    )
    parser.add_argument(
        "--knowledge",
        type=Path,
        metavar="DIR",
        help="what `davinci data knowledge` has made, for --suite knowledge, or beside --suite local",
    )
    parser.add_argument(
        "--samples",
        metavar="FIRST:END",
        help="for --suite contamination, where to look (default: all samples before the checkpoint)",
    )
    parser.add_argument(
        "--both-ways", action="store_true", help="each of --tasks that has options by generation too"
    )
    parser.add_argument(
        "--formats",
        action="store_true",
        help="tasks with options in several other formats too, to see what those do to a score",
    )
    parser.add_argument("--shots", type=int, help="examples before each item (default: as the task says)")
    parser.add_argument("--limit", type=int, help="the first so many items of each task only")
    parser.add_argument("--ranks", type=int, help="ranks on this machine (default: what the layout needs)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/evals)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="evaluate every checkpoint of a run, those that are still to come too, until the run has ended",
    )
    parser.add_argument("--again", action="store_true", help="compute what is answered already too")
    parser.add_argument(
        "--download", action="store_true", help="let datasets fetch what is not on this machine"
    )
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check what is asked, here, once; then compute it on this process or on several."""
    from megatron_davinci.cli.convert_to_hf import find
    from megatron_davinci.cli.eval_knowledge import check
    from megatron_davinci.cli.eval_model import config_of, tokenizer_for
    from megatron_davinci.train.launch import Watched, inside_launcher, launch

    _offline(arguments.download)
    _refuse_unused(arguments)
    check_bounds(arguments, {"limit": (1, 1 << 40), "shots": (0, 1 << 20), "ranks": (1, 1 << 20)})
    if arguments.tasks is not None:
        task_names(arguments.tasks)
    check(arguments)
    if arguments.follow and not inside_launcher():
        from megatron_davinci.cli.eval_follow import follow_run

        _check_installed()
        return follow_run(arguments, _words(arguments))
    found = find(arguments.run)
    if inside_launcher():
        return evaluate(arguments, found, int(os.environ["WORLD_SIZE"]))
    config = config_of(found.checkpoint.manifest["model"], arguments.overrides)
    ranks = arguments.ranks or config.parallel.model_ranks
    check_layout(config_of(found.checkpoint.manifest["model"], arguments.overrides, ranks), ranks)
    tokenizer_for(found, arguments.tokenizer)
    _check_installed()
    if ranks == 1:
        return evaluate(arguments, found, 1)
    # The step that was found now, for every rank, though the run may go on meanwhile.
    name = str(found.checkpoint.folder) if found.run is None else f"{found.run}@{found.checkpoint.step}"
    return launch(name, _words(arguments), ranks, Watched(), module=("megatron_davinci.cli.main", "eval"))


def evaluate(arguments: argparse.Namespace, found: Found, ranks: int) -> int:
    """What one rank does."""
    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for

    tokenizer = tokenizer_for(found, arguments.tokenizer)
    with on_ranks(found, arguments.overrides, tokenizer, ranks, arguments.tokens_at_once) as measured:
        import torch.distributed as dist

        from megatron_davinci.evaluate.ranks import Leader, follow

        if dist.get_rank() != 0:
            follow(measured.engine, tokenizer)
            return 0
        with Leader(measured.engine, tokenizer) as leader:
            return lead(arguments, found, leader, tokenizer, measured.identity)


def lead(
    arguments: argparse.Namespace, found: Found, leader: Any, tokenizer: Any, identity: dict[str, Any]
) -> int:
    """Run the tasks on rank 0, keep and print what they came to."""
    from megatron_davinci.cli.eval_knowledge import probe_knowledge
    from megatron_davinci.cli.eval_plan import in_formats
    from megatron_davinci.cli.eval_screen import averaged, format_table, progress, show, side_by_side
    from megatron_davinci.evaluate.answers import Answers
    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import TaskResult, run_task

    out = arguments.out or (found.run / "evals" if found.run is not None else None)
    file = out / "answers" / f"{found.checkpoint.folder.name}.jsonl" if out is not None else None
    if file is not None and arguments.again:
        file.unlink(missing_ok=True)
    about: dict[str, Any] = {"suite": arguments.suite, "limit": arguments.limit, "identity": identity}
    about |= {"formats": True} if arguments.formats else {}
    about |= {"given": given} if (given := given_in(arguments)) else {}
    if arguments.suite == "contamination":
        from megatron_davinci.cli.eval_contamination import contamination

        found_out = contamination(arguments, found, leader, tokenizer, identity["length"], out)
        if out is not None:
            append(out, {**_point(found), **found_out, **about})
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="davinci-eval-") as scratch, progress() as told:
        # A look at fewer items, or at other texts, must not change those that another command is about to load.
        apart = ways_apart(arguments.suite, arguments.limit, given)
        planned = plan(arguments, found, tokenizer, (out or Path(scratch)) / "local" / apart)
        if arguments.formats:
            planned = in_formats(planned)
        answers = Answers(file, identity, told)
        lm = NativeLM(leader, tokenizer, identity["length"], answers)
        for one in planned:
            told.task(one.label)
            began, known = time.monotonic(), answers.known
            if one.problem is not None:
                result = TaskResult(one.label, problem=one.problem)
            else:
                result = run_task(lm, one.label, one.load, shots=one.shots, limit=arguments.limit)
            _, unloaded, why = (result.problem or "").partition("could not be loaded: ")
            if one.help and unloaded:
                said = f"its data is not here, or cannot be used ({why}). To get it: {one.help}"
                result = dataclasses.replace(result, problem=said)
            results.append(result)
            if out is not None:
                seconds = round(time.monotonic() - began, 3)
                computed = {"seconds": seconds, "answers_found": answers.known - known}
                keep(out, found, result, about | computed)
        told.task("knowledge")
        probed = probe_knowledge(arguments, found, lm)
        results += probed
        for result in probed:
            ends = arguments.suite == "knowledge" and result is probed[-1]
            if out is not None:
                keep(out, found, result, about | ({"suite_ends": True} if ends else {}))
        if arguments.suite == "local":
            results.append(measure_geometry(found, leader, tokenizer, identity["length"], arguments))
            if out is not None:
                keep(out, found, results[-1], about)
    show(results, out)
    side_by_side(results)
    format_table(results)
    if arguments.suite == "davinci19":
        means = suite_means(planned, results)
        averaged(means)
        if out is not None:
            append(out, {**_point(found), "means": means, **about})
    return MEND if any(result.problem for result in results) else 0


def plan(arguments: argparse.Namespace, found: Found, tokenizer: Any, folder: Path) -> list[Planned]:
    """What is to be run."""
    from megatron_davinci.cli import eval_plan

    if arguments.suite == "local":
        return eval_plan.local(found, tokenizer, arguments.texts, folder, arguments.limit)
    if arguments.suite == "knowledge":
        return []
    if arguments.suite == "davinci19":
        return eval_plan.davinci19(arguments.data)
    return eval_plan.by_name(
        task_names(arguments.tasks),
        arguments.include_path,
        arguments.data,
        arguments.shots,
        both_ways=arguments.both_ways,
    )


def measure_geometry(
    found: Found, leader: Any, tokenizer: Any, longest: int, arguments: argparse.Namespace
) -> TaskResult:
    """RankMe and alpha-ReQ of the last tokens' states of held-out texts: the same texts at every checkpoint."""
    from megatron_davinci.cli.eval_plan import texts_for
    from megatron_davinci.evaluate.geometry import geometry, probe
    from megatron_davinci.evaluate.tasks import TaskResult

    texts = texts_for(found, tokenizer, arguments.texts, arguments.limit)
    try:
        shape = geometry(leader.last_states(probe(tokenizer, texts, longest)))
    except DataError as error:
        return TaskResult("geometry", problem=str(error.found))
    metrics = {"rank_me,none": shape.rank_me, "alpha_req,none": shape.alpha_req}
    metrics = {name: value for name, value in metrics.items() if value == value}
    return TaskResult("geometry", protocol="states", items=shape.sequences, metrics=metrics)


def suite_means(planned: Sequence[Planned], results: Sequence[TaskResult]) -> dict[str, dict[str, Any]]:
    """Means by group of a suite whose tasks say what counts of each."""
    from megatron_davinci.evaluate.suites import averages

    entries = [one.entry for one in planned if one.entry is not None]
    by_name = {result.task: result for result in results}
    scores = {
        entry.name: by_name[entry.name].metrics[entry.metric]
        for entry in entries
        if entry.metric in by_name[entry.name].metrics
    }
    return averages(entries, scores)


def keep(out: Path, found: Found, result: TaskResult, about: dict[str, Any]) -> None:
    """Append a task's result to `results.jsonl`, and write what was answered to each item."""
    checkpoint = found.checkpoint.folder.name
    folder = samples_folder(checkpoint, about.get("suite"), about.get("limit"), about.get("given"))
    for name, rows in result.samples.items():
        write_atomically(
            out / "samples" / folder / f"{name}.jsonl",
            "".join(json.dumps(row, default=str) + "\n" for row in rows),
        )
    where = {"samples_in": folder} if result.samples else {}
    append(out, {**_point(found), **result.record(), **where, **about})


def append(out: Path, record: dict[str, Any]) -> None:
    """Append a line to `results.jsonl`."""
    with disk_errors(out, "keeping results"):
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "results.jsonl", "a+b") as file:
            about = {**record, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            line = json.dumps(finite(about)) + "\n"
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A line without an end was being written when it stopped. This one is none of it.
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())


def _point(found: Found) -> dict[str, Any]:
    """Where in the run a checkpoint is."""
    samples = found.checkpoint.consumed_samples
    length = found.config.data.sequence_length if found.config is not None else None
    return {
        "step": found.checkpoint.step,
        "consumed_samples": samples,
        "tokens": samples * length if length is not None else None,
    }


def _offline(download: bool) -> None:
    """Say to datasets, before it is imported, whether it may use the network."""
    if not download:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _check_installed() -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            "lm-eval is not installed.", where="davinci eval", do="pip install 'megatron-davinci[eval]'"
        )


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options that nothing of what is asked would look at, though the record would name them."""
    asked = "--tasks" if arguments.suite is None else f"--suite {arguments.suite}"
    for name, goes_with in (
        ("shots", ("--tasks",)),
        ("both_ways", ("--tasks", "--suite local")),  # which always is
        ("include_path", ("--tasks",)),
        ("data", ("--tasks", "--suite davinci19")),
        ("texts", ("--suite local", "--suite contamination")),
        ("samples", ("--suite contamination",)),
        ("formats", ("--tasks", "--suite local", "--suite davinci19")),
    ):
        if getattr(arguments, name) not in (None, False, []) and asked not in goes_with:
            raise ConfigError(
                "This option says nothing about what is asked.",
                where=f"--{name.replace('_', '-')}",
                found=asked,
                expected=" or ".join(goes_with),
                do="leave it out",
            )


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command's options as they were given, for the ranks."""
    words = list(arguments.overrides)
    for name in (
        "tasks",
        "suite",
        "data",
        "knowledge",
        "samples",
        "shots",
        "limit",
        "tokenizer",
        "out",
        "tokens_at_once",
    ):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if arguments.ranks is not None and arguments.follow:
        words += ["--ranks", str(arguments.ranks)]
    for folder in arguments.include_path:
        words += ["--include-path", str(folder)]
    for texts in arguments.texts:
        words += ["--texts", texts]
    flags = ("again", "download", "both_ways", "formats")
    return words + [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]
