"""`davinci convert to-hf RUN[@step] OUT`: export a checkpoint to Hugging Face."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_davinci.config import load_config
from megatron_davinci.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="write a folder that transformers loads")
    to_hf.add_argument("run", help="run directory, or RUN@STEP for a checkpoint that is not the newest")
    to_hf.add_argument("out", type=Path, nargs="?", help="folder to make (default: RUN/hf/step-XXXXXXXX)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    print(export(arguments.run, arguments.out, arguments.dtype))
    return 0


def export(run_name: str, out: Path | None = None, dtype: str | None = None) -> Path:
    """Export a checkpoint of a run.

    Args:
        run_name: `RUN` or `RUN@STEP`.
        out: The folder to make; default `RUN/hf/step-XXXXXXXX`.
        dtype: See `convert.export.export_to_hf`.
    """
    from megatron_davinci.convert.export import export_to_hf
    from megatron_davinci.data.tokenizer import Tokenizer
    from megatron_davinci.train import checkpoint_files

    folder, _, step = run_name.rpartition("@") if "@" in Path(run_name).name else (run_name, "", "")
    checkpoints = Path(folder) / "checkpoints"
    if step:
        if not step.isdigit():
            raise CheckpointError(
                "The step is not a number.", where=run_name, expected="RUN@STEP, as in runs/a@500"
            )
        checkpoint = checkpoint_files.read(checkpoint_files.step_folder(checkpoints, int(step)))
    else:
        newest, problems = checkpoint_files.newest_good(checkpoints)
        if newest is None:
            raise CheckpointError(
                "The run has no good checkpoint.",
                where=checkpoints,
                found="\n".join(str(problem) for problem in problems) or "none at all",
                do="train first, or check the run directory's path",
            )
        checkpoint = newest
    config = load_config(Path(folder) / "config.yaml")
    tokenizer = config.data.tokenizer
    return export_to_hf(
        checkpoint.state,
        checkpoint.manifest["model"],
        out or Path(folder) / "hf" / checkpoint.folder.name,
        tokenizer=tokenizer,
        eod_id=Tokenizer.load(tokenizer).eod_id if tokenizer else None,
        dtype=dtype,
    )
