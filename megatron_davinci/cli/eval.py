"""`davinci eval`: lm-eval's tasks on a checkpoint as it is, on any layout, without conversion."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.config import check_layout
from megatron_davinci.errors import MEND, EnvironmentProblem
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
    parser.add_argument(
        "--tasks", required=True, help="names of lm-eval's tasks or groups, with commas between"
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="your own tasks, as YAML",
    )
    parser.add_argument("--shots", type=int, help="examples before each item (default: as the task says)")
    parser.add_argument("--limit", type=int, help="the first so many items of each task only")
    parser.add_argument("--ranks", type=int, help="ranks on this machine (default: what the layout needs)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the run's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/evals)")
    parser.add_argument("--again", action="store_true", help="compute what is answered already too")
    parser.add_argument(
        "--download", action="store_true", help="let datasets fetch what is not on this machine"
    )
    parser.add_argument(
        "--tokens-at-once",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of one forward pass (default: 4096)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check what is asked, here, once; then compute it on this process or on several."""
    from megatron_davinci.cli.convert_to_hf import find
    from megatron_davinci.cli.eval_model import config_of, tokenizer_for
    from megatron_davinci.train.launch import Watched, inside_launcher, launch

    _offline(arguments.download)
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
    from megatron_davinci.cli.eval_screen import progress, show
    from megatron_davinci.evaluate.answers import Answers
    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import Tasks, run_task

    names = [name for name in arguments.tasks.split(",") if name]
    tasks = Tasks(arguments.include_path)
    managers = [tasks.manager(name) for name in names]
    out = arguments.out or (found.run / "evals" if found.run is not None else None)
    step = found.checkpoint.folder.name
    file = out / "answers" / f"{step}.jsonl" if out is not None else None
    if file is not None and arguments.again:
        file.unlink(missing_ok=True)
    results = []
    with progress() as told:
        answers = Answers(file, identity, told)
        lm = NativeLM(leader, tokenizer, identity["length"], answers)
        for name, manager in zip(names, managers, strict=True):
            told.task(name)
            began, known = time.monotonic(), answers.known
            result = run_task(lm, name, manager, shots=arguments.shots, limit=arguments.limit)
            results.append(result)
            if out is not None:
                seconds = time.monotonic() - began
                keep(out, found, result, identity, arguments.limit, seconds, answers.known - known)
    show(results, out)
    return MEND if any(result.problem for result in results) else 0


def keep(
    out: Path,
    found: Found,
    result: TaskResult,
    identity: dict[str, Any],
    limit: int | None,
    seconds: float,
    known: int,
) -> None:
    """Append a task's result to `results.jsonl`, and write what was answered to each item."""
    checkpoint = found.checkpoint
    record = {
        "step": checkpoint.step,
        "consumed_samples": checkpoint.consumed_samples,
        "tokens": checkpoint.consumed_samples * found.config.data.sequence_length if found.config else None,
        **result.record(),
        "limit": limit,
        "identity": identity,
        "seconds": round(seconds, 3),
        "answers_found": known,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder = out / "samples" / checkpoint.folder.name
    for name, rows in result.samples.items():
        write_atomically(
            folder / f"{name}.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in rows)
        )
    with disk_errors(out, "keeping results"):
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


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


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command's options as they were given, for the ranks."""
    words = list(arguments.overrides)
    for name in ("tasks", "shots", "limit", "tokenizer", "out", "tokens_at_once"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for folder in arguments.include_path:
        words += ["--include-path", str(folder)]
    return words + [f"--{name}" for name in ("again", "download") if getattr(arguments, name)]
